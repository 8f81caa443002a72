"""Looking into the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import Omni
from lowbit.evaluation.comparison import Plan, compare
from lowbit.evaluation.layers import (
    ROWS,
    Watch,
    block_errors,
    blocks,
    linear_layers,
    probe_steps,
    sample_rows,
    worst_layers,
)
from lowbit.evaluation.recording import Side, Task
from lowbit.inputs.data import OmniDiffusionSamplingParams

PLANTED = "layers.2.feed_forward.w2"
PARAMS = OmniDiffusionSamplingParams(num_inference_steps=3, height=128, width=128, guidance_scale=0.0)
TASK = Task(prompts=("a red circle",), params=PARAMS)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in Int8 with one layer's scale doubled."""
    folder = tmp_path_factory.mktemp("spoilt") / "model"
    Omni(quantization="int8", device="cpu").save_pretrained(str(folder))
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors[f"{PLANTED}.weight_scale"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_a_doubled_scale_is_found_as_the_worst_layer(spoilt: Path, tmp_path: Path) -> None:
    reference = Side(name="reference", device="cpu")
    candidate = Side(name="candidate", model=str(spoilt), device="cpu")
    found = compare(Plan(reference=reference, candidate=candidate, task=TASK, layers=True), tmp_path).result["layers"]
    assert [row["step"] for row in found] == [0, 1, 2]
    (name, error), (_, second), *_ = worst_layers(found)
    assert name == f"transformer.{PLANTED}"
    assert error == pytest.approx(1.0, abs=0.05)  # twice the output: the difference is as large as the reference
    assert second < 0.1
    for row in found:
        for errors in row["blocks"].values():
            assert 0 < errors["output_relative_l2"] < 0.1


def test_kept_layers_are_exact(tmp_path: Path) -> None:
    sides = [Side(name=name, device="cpu") for name in ("reference", "candidate")]
    found = compare(Plan(reference=sides[0], candidate=sides[1], task=TASK, layers=True), tmp_path).result["layers"]
    assert [row["step"] for row in found] == [0, 1, 2]
    for row in found:
        assert row["linear"]
        assert all(errors["relative_l2"] == 0 for errors in row["linear"].values())
        assert all(errors["output_relative_l2"] == 0 for errors in row["blocks"].values())


def test_every_layer_and_block_is_there() -> None:
    omni = Omni(device="cpu")
    assert f"transformer.{PLANTED}" in linear_layers(omni)
    assert {"transformer.layers.0", "transformer.noise_refiner.0"} <= set(blocks(omni))


def test_a_watch_keeps_while_active_and_only_then() -> None:
    module, watch = torch.nn.Linear(4, 2), Watch()
    value = torch.randn(3, 5, 4)
    with watch.on({"a": module}):
        module(value)
        watch.active = True
        first = module(value)
        module(input=value + 1)
    module(value)
    samples = watch.take()
    assert torch.equal(samples["a.input"], torch.cat([value.reshape(-1, 4), value.reshape(-1, 4) + 1]))
    assert torch.equal(samples["a.output"][:15], first.detach().reshape(-1, 2))
    assert watch.take() == {}


def test_rows_are_evenly_spaced_with_both_ends() -> None:
    value = torch.arange(1000.0)[:, None]
    rows = sample_rows(value)
    assert len(rows) == ROWS
    assert rows[0] == 0
    assert rows[-1] == 999
    assert (rows.diff(dim=0) >= 7).all()
    assert torch.equal(sample_rows(value[:5]), value[:5])


def test_blocks_of_several_outputs_give_the_pictures_stream() -> None:
    class Double(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return text * 2, hidden_states * 3

    watch, module = Watch(), Double()
    watch.active = True
    hidden, text = torch.ones(1, 4, 8), torch.ones(1, 3, 8)
    with watch.on({"b": module}):
        module(hidden_states=hidden, text=text)
    assert torch.equal(watch.samples["b.output"], hidden[0] * 3)


def test_steps_and_errors() -> None:
    assert probe_steps(20) == (0, 10, 19)
    assert probe_steps(1) == (0,)
    reference = {"x.input": torch.ones(2, 2), "x.output": torch.ones(2, 2), "y.input": torch.ones(1, 1)}
    found = block_errors(reference, {"x.input": torch.ones(2, 2), "x.output": torch.full((2, 2), 1.5)})
    assert list(found) == ["x"]
    assert found["x"]["input_relative_l2"] == 0
    assert found["x"]["output_relative_l2"] == pytest.approx(0.5)
