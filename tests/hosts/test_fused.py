"""Fused norms, rotary embeddings and gates: as near float64 as diffusers' own, and undone without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lowbit.hosts import fused
from lowbit.hosts.fused import fuse_elementwise, unfuse_elementwise
from lowbit.ops.cpu import elementwise, helper
from lowbit.quantization import quantize_model
from tests.support.models import FAMILIES

CPU = torch.device("cpu")
REFUSAL = elementwise.refusal(torch.float32)
NEEDS_KERNEL = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
# Norms, gates and attention processors of the small models.
PARTS = {"z-image": 33, "qwen-image": 11, "flux": 6, "wan": 8}


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "FEWEST_ELEMENTS", 1)


def make(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = FAMILIES[name].make().eval()
    for parameter in model.parameters():  # norms with weights that differ from one
        if parameter.dim() == 1:
            parameter.data = torch.rand_like(parameter) + 0.5
    return model


def outputs(name: str, model: Any) -> torch.Tensor:
    return FAMILIES[name].run(model).double()


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def kinds(model: torch.nn.Module) -> list[type]:
    return [type(part) for part in fused._parts(model)]


@NEEDS_KERNEL
@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("name", PARTS)
def test_the_same_in_float32_and_undone(name: str) -> None:
    model = make(name)
    before, own = outputs(name, model), kinds(model)
    assert fuse_elementwise(model, device=CPU, dtype=torch.float32) == PARTS[name]
    assert relative(outputs(name, model), before) < 1e-5
    assert not torch.equal(outputs(name, model), before)
    unfuse_elementwise(model)
    assert kinds(model) == own
    assert torch.equal(outputs(name, model), before)


@NEEDS_KERNEL
@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("name", PARTS)
def test_as_near_the_exact_result_as_diffusers(name: str) -> None:
    errors = torch.zeros(2)
    for seed in range(8):
        model = make(name, seed).to(torch.bfloat16)
        exact = outputs(name, copy.deepcopy(model).float())
        theirs = relative(outputs(name, model), exact)
        fuse_elementwise(model, device=CPU, dtype=torch.bfloat16)
        errors += torch.tensor([relative(outputs(name, model), exact), theirs])
    assert errors[0] < 1.05 * errors[1]


@NEEDS_KERNEL
@pytest.mark.usefixtures("_small")
def test_masks_of_either_model_are_kept() -> None:
    z_image = make("z-image")
    torch.manual_seed(1)
    given = {
        "x": [torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 12)],
        "t": torch.tensor([0.5, 0.5]),
        "cap_feats": [torch.randn(7, 32), torch.randn(24, 32)],
    }
    qwen = make("qwen-image")
    inputs = FAMILIES["qwen-image"].inputs(torch.float32)
    inputs["encoder_hidden_states_mask"][:, 5:] = 0
    with torch.no_grad():
        before = z_image(**given, return_dict=False)[0], qwen(**inputs, return_dict=False)[0]
        fuse_elementwise(z_image, device=CPU, dtype=torch.float32)
        fuse_elementwise(qwen, device=CPU, dtype=torch.float32)
        after = z_image(**given, return_dict=False)[0], qwen(**inputs, return_dict=False)[0]
    for ours, theirs in zip([*after[0], after[1]], [*before[0], before[1]], strict=True):
        assert 0 < relative(ours, theirs) < 1e-5


@NEEDS_KERNEL
@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
def test_quantized_layers_agree_and_compile(name: str) -> None:
    model = make(name)
    quantize_model(model, "int8")
    before = outputs(name, model)
    fuse_elementwise(model, device=CPU, dtype=torch.float32)
    eager = outputs(name, model)
    assert relative(eager, before) < 0.02  # a code may change here and there
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert relative(outputs(name, model), eager) < 0.02


@NEEDS_KERNEL
def test_small_tensors_stay_as_they_are() -> None:
    model = make("z-image")
    before = outputs("z-image", model)
    fuse_elementwise(model, device=CPU, dtype=torch.float32)
    assert torch.equal(outputs("z-image", model), before)


@NEEDS_KERNEL
@pytest.mark.usefixtures("_small")
def test_gradients_flow_as_before() -> None:
    model = make("z-image")
    given = FAMILIES["z-image"].inputs(torch.float32)
    fuse_elementwise(model, device=CPU, dtype=torch.float32)
    model.requires_grad_(False)
    trained = model.layers[0].attention.to_q.weight.requires_grad_()
    model(**given, return_dict=False)[0][0].sum().backward()
    assert trained.grad.norm() > 0


def test_nothing_is_fused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("z-image")
    own = kinds(model)
    assert fuse_elementwise(model, device=torch.device("meta"), dtype=torch.float32) == 0
    assert fuse_elementwise(model, device=CPU, dtype=torch.float64) == 0
    monkeypatch.setattr(helper, "available", lambda: False)
    monkeypatch.setattr(helper, "refusal", lambda: "turned off")
    assert fuse_elementwise(model, device=CPU, dtype=torch.float32) == 0
    assert kinds(model) == own


def test_says_why_nothing_computes_it() -> None:
    assert fused.kernel_refusal(torch.device("meta"), torch.float32) == "there is no kernel for meta"
    assert "float64" in (fused.kernel_refusal(CPU, torch.float64) or "")
    pytest.importorskip("triton")
    assert fused.kernel_refusal(torch.device("cuda"), torch.bfloat16) is None
    assert "float64" in (fused.kernel_refusal(torch.device("cuda"), torch.float64) or "")
