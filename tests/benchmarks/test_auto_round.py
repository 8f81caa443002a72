"""What is written for auto-round to read, and the comparison, with lowbit in the place of auto-round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.auto_round_in_diffusers import prepare
from benchmarks.auto_round_reader import effective_weight, read


@pytest.mark.parametrize("sym", [True, False])
def test_the_comparison_finds_what_is_written_and_what_is_changed(sym: bool, tmp_path: Path) -> None:
    prepare(tmp_path, "flux", {"group_size": 32, "sym": sym})
    found = read(tmp_path, torch.float16)
    assert found["layers"] == 0  # of auto-round's
    assert found["weight_error"] < 1e-3
    assert 0 < found["output_difference"] < 2e-3
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["transformer_blocks.0.attn.to_q.scales"] *= 1.1
    save_file(tensors, file, {"format": "pt"})
    assert read(tmp_path, torch.float16)["weight_error"] == pytest.approx(0.1, rel=0.02)


def test_a_layers_weight_is_found_without_its_bias() -> None:
    layer = torch.nn.Linear(5, 3)
    with torch.no_grad():
        found = effective_weight(layer, 5, torch.float32)
    assert torch.allclose(found, layer.weight, atol=1e-6)
