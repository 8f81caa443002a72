"""Attention quantization through diffusers' dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from lowbit.errors import ConfigError
from lowbit.hosts import attention
from lowbit.hosts.attention import (
    attention_record,
    check_attention,
    quantize_attention,
    restore_attention,
    speed_up_attention,
)
from lowbit.ops.attention import TORCH, UNQUANTIZED, AttentionProblem, select_kernel
from tests.support.attention import relative_error
from tests.support.models import FAMILIES

CPU = torch.device("cpu")
DTYPE = torch.float32


def quantize(model: Any, kind: str = "int8", kernel: str = "reference") -> Any:
    return quantize_attention(model, kind, device=CPU, dtype=DTYPE, kernel=kernel)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_nearly_agrees_and_is_restored(name: str, kind: str) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    model, other = family.make().eval(), family.make().eval()
    other.load_state_dict(model.state_dict())
    default = _AttentionBackendRegistry.get_active_backend()
    before = family.run(model)
    record = quantize(model, kind)
    assert record == attention_record(model)
    assert (record.kind, record.kernel) == (kind, "reference")
    assert record.layers == len(check_attention(model)) > 0
    quantized = family.run(model)
    assert 0 < relative_error(quantized, before) < 0.05
    assert torch.equal(family.run(other), before)
    assert _AttentionBackendRegistry.get_active_backend() == default
    restore_attention(model)
    assert torch.equal(family.run(model), before)
    assert attention_record(model) is None


def test_a_batch_of_prompts_of_different_lengths_is_masked() -> None:
    family = FAMILIES["z-image"]
    torch.manual_seed(0)
    model = family.make().eval()
    sizes = [(8, 7), (24, 20)]
    inputs = {
        "x": [torch.randn(16, 1, size, 8) for size, _ in sizes],
        "t": torch.tensor([0.5, 0.5]),
        "cap_feats": [torch.randn(length, 32) for _, length in sizes],
    }
    with torch.no_grad():
        before = model(**inputs, return_dict=False)[0]
        quantize(model)
        after = model(**inputs, return_dict=False)[0]
    for first, second in zip(before, after, strict=True):
        assert 0 < relative_error(second, first) < 0.05


def test_qwen_image_with_a_mask_of_its_prompt() -> None:
    family = FAMILIES["qwen-image"]
    torch.manual_seed(0)
    model = family.make().eval()
    inputs = family.inputs(torch.float32)
    mask = torch.ones(inputs["encoder_hidden_states"].shape[:2], dtype=torch.long)
    mask[:, -2:] = 0
    with torch.no_grad():
        before = model(**{**inputs, "encoder_hidden_states_mask": mask}, return_dict=False)[0]
        quantize(model)
        after = model(**{**inputs, "encoder_hidden_states_mask": mask}, return_dict=False)[0]
    assert 0 < relative_error(after, before) < 0.05


def test_quantizing_again_replaces_and_restoring_gives_the_first_back() -> None:
    model = FAMILIES["z-image"].make()
    quantize(model)
    assert quantize(model, "fp8").kind == "fp8"
    restore_attention(model)
    restore_attention(model)
    assert {processor._attention_backend for processor in check_attention(model).values()} == {None}


def test_attention_outside_the_dispatcher_is_refused() -> None:
    model = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="SD3Transformer2DModel computes attention in JointAttnProcessor2_0"):
        quantize(model)
    with pytest.raises(ConfigError, match="Linear has no attention"):
        quantize(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="AutoencoderKL computes attention in AttnProcessor2_0"):
        quantize(AutoencoderKL(norm_num_groups=4, block_out_channels=(4,)))


def test_unknown_names() -> None:
    model = FAMILIES["z-image"].make()
    with pytest.raises(ConfigError, match="Unknown attention_quantization: 'int4'"):
        quantize(model, "int4")
    with pytest.raises(ConfigError, match="restore_attention undoes it"):
        quantize(model, "none")
    with pytest.raises(ConfigError, match="Unknown attention kernel: 'fast'"):
        quantize(model, "int8", "fast")


def test_compiled_blocks_agree() -> None:
    family = FAMILIES["z-image"]
    torch.manual_seed(0)
    model = family.make().eval()
    quantize(model, kernel=select_kernel(AttentionProblem(CPU, DTYPE, "int8")))
    eager = family.run(model)
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert relative_error(family.run(model), eager) < 1e-5


@pytest.mark.parametrize("name", ["z-image", "qwen-image", "flux"])
def test_speeding_up_changes_no_more_than_rounding_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.make().eval()
    before = family.run(model)
    record = speed_up_attention(model, device=CPU, dtype=DTYPE)
    if select_kernel(AttentionProblem(CPU, DTYPE, UNQUANTIZED)) == TORCH:
        assert record is None
        return
    assert record is not None
    assert record == attention_record(model)
    assert record.summary() == f"{record.layers} attention layers unquantized (native)"
    assert relative_error(family.run(model), before) == 0  # so few keys stay torch's
    monkeypatch.setattr(attention, "FEWEST_KEYS", 1)
    assert 0 < relative_error(family.run(model), before) < 1e-5
    restore_attention(model)
    assert torch.equal(family.run(model), before)


def test_speeding_up_leaves_what_was_chosen_and_what_it_does_not_know() -> None:
    model = FAMILIES["z-image"].make()
    assert speed_up_attention(torch.nn.Linear(2, 2), device=CPU, dtype=DTYPE) is None
    assert speed_up_attention(model, device=torch.device("meta"), dtype=DTYPE) is None
    model.set_attention_backend("native")
    assert speed_up_attention(model, device=CPU, dtype=DTYPE) is None
    model.reset_attention_backend()
    quantize(model)
    assert speed_up_attention(model, device=CPU, dtype=DTYPE) is None
    assert attention_record(model).kind == "int8"
