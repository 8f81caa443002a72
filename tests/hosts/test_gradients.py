"""Gradients through quantized models: of adapters against the dequantized float32 model, of layers against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lowbit.checkpoints import component
from lowbit.hosts.attention import quantize_attention
from lowbit.ops import elementwise
from lowbit.ops.attention import attention_operator
from lowbit.ops.dispatch import verdicts
from lowbit.quantization import QuantizedLinear, build_quant_config, quantize_model
from lowbit.quantization.joint import gated_linear, linears
from lowbit.quantization.plan import quantized_layers
from tests.support.foreign_models import FOREIGN, foreign_model
from tests.support.models import FAMILIES, METHODS, language_model, quantized_model

peft = pytest.importorskip("peft")

TARGETS = {"z-image": ["to_q", "to_k", "to_v", "w1"], "flux": ["to_q", "to_k", "to_v", "proj_mlp"]}
# The forward pass rounds activations to four bits: the gradient is taken at other activations than the float model's.
FOUR_BIT_ACTIVATIONS = ("mxfp4-rotation", "mxfp4_dualscale", "nvfp4-smoothing", "svdquant-smoothing")
EIGHT_BIT = [name for name in METHODS if name not in (*FOUR_BIT_ACTIVATIONS, "int8-onednn")]


def add_adapter(model: Any, targets: list[str]) -> dict[str, nn.Parameter]:
    """Add a LoRA of a few per cent of the weights' size, the same whatever the dtype."""
    model.add_adapter(peft.LoraConfig(r=4, target_modules=targets))
    adapters = {name: p for name, p in sorted(model.named_parameters()) if ".lora_A." in name or ".lora_B." in name}
    torch.manual_seed(5)
    for name, parameter in adapters.items():
        size = 0.02 if "lora_B" in name else parameter.shape[1] ** -0.5
        parameter.data.copy_(torch.randn(parameter.shape) * size)
    return adapters


def gradients(family: Any, model: Any, targets: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    adapters = add_adapter(model, targets)
    torch.manual_seed(7)
    output = model(**family.inputs(dtype), return_dict=False)[0]
    output = output[0] if isinstance(output, list) else output
    torch.manual_seed(3)
    (output.float() * torch.randn(output.shape)).sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in adapters)
    missing = [name for name, p in adapters.items() if p.grad is None]
    assert not missing
    return {name: p.grad for name, p in adapters.items() if p.grad is not None}


def cosine(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the cosine of all gradients taken together; none of them may be far off."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].double().flatten(), expected[name].double().flatten()) for name in found]
    assert min(float(nn.functional.cosine_similarity(a, b, dim=0)) for a, b in pairs) > 0.8
    left, right = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    return float(nn.functional.cosine_similarity(left, right, dim=0))


def compare(name: str, model: Any, checkpointing: bool = False) -> float:
    """Return the cosine of all adapters' gradients to those on the dequantized float32 model."""
    plain = copy.deepcopy(model)
    component.dequantize(plain)
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    family, targets = FAMILIES[name], TARGETS[name]
    found = gradients(family, model, targets, torch.bfloat16)
    return cosine(found, gradients(family, nn.Module.float(plain), targets, torch.float32))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("method", EIGHT_BIT)
def test_adapters_get_the_gradients_of_the_dequantized_model(name: str, method: str) -> None:
    assert compare(name, quantized_model(FAMILIES[name], method)) >= 0.99


@pytest.mark.parametrize("method", FOUR_BIT_ACTIVATIONS)
def test_activations_of_four_bits_keep_the_direction(method: str) -> None:
    assert compare("flux", quantized_model(FAMILIES["flux"], method)) >= 0.97


@pytest.mark.parametrize("method", ["int8", "int8-smoothing-rotation", "svdquant-nvfp4", "gguf-Q4_0"])
def test_adapters_under_activation_checkpointing(method: str) -> None:
    assert compare("z-image", quantized_model(FAMILIES["z-image"], method), checkpointing=True) >= 0.99


@pytest.mark.parametrize("name", FOREIGN)
def test_adapters_on_checkpoints_of_other_tools(name: str, tmp_path: Any) -> None:
    assert compare("flux", foreign_model(name, tmp_path / "model")) >= (0.97 if name.startswith("ascend") else 0.99)


@pytest.mark.parametrize("method", ["int8", "fp8", "nvfp4-weight_only"])
def test_a_language_model(method: str) -> None:
    model: Any = language_model().to(torch.bfloat16).requires_grad_(False)
    quantize_model(model, METHODS[method])
    plain = copy.deepcopy(model)
    component.dequantize(plain)
    found: list[Any] = []
    for each in (model, plain.float()):
        adapters = add_adapter(each, ["q_proj", "up_proj"])
        each(torch.arange(3, 19)[None]).logits.float().logsumexp(-1).sum().backward()
        found.append({name: p.grad for name, p in adapters.items()})
    assert cosine(*found) >= 0.99


# Layers.


def layer_of(method: str, dtype: torch.dtype, kernel: str = "auto") -> QuantizedLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96)).to(dtype).requires_grad_(False)
    quantize_model(model, {**METHODS[method], "kernel": kernel})
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    return layer


def kernels_of(method: str) -> list[str]:
    """Return the names of the kernels that can run the method here."""
    layer = layer_of(method, torch.bfloat16)
    problem = layer.method.problem(layer, torch.device("cpu"))
    return sorted({entry.name for entry, refusal in verdicts(layer.method.table, problem) if refusal is None})


PLAIN = ("int8", "fp8", "fp8-block", "mxfp8", "mxfp4", "nvfp4", "gguf-Q4_0", "auto-round", "svdquant-int4", "comfyui")
CASES = [(method, kernel) for method in PLAIN for kernel in kernels_of(method)]


@pytest.mark.parametrize(("method", "kernel"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_input_gradient_is_the_product_with_the_dequantized_weight(
    method: str, kernel: str, dtype: torch.dtype
) -> None:
    layer = layer_of(method, dtype, kernel)
    weight = layer.dequantized().double()
    x = torch.randn(2, 5, 64)
    x[0, 1], x[0, 2] = 0, 1e4  # all zero, outliers
    x = x.to(dtype).requires_grad_()
    grad = torch.randn(2, 5, 96).to(dtype)
    with torch.no_grad():
        plain = layer(x)
    result = layer(x)
    assert torch.equal(result, plain)
    result.backward(grad)
    assert x.grad is not None
    expected = grad.double() @ weight
    bound = grad.double().abs() @ weight.abs()
    unit = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22}[dtype]  # the weight and the result are rounded once each
    assert ((x.grad.double() - expected).abs() <= 2 * unit * bound).all()
    assert all(p.grad is None for p in layer.parameters())


def test_a_bias_that_is_trained_gets_its_gradient() -> None:
    layer = layer_of("int8", torch.float32)
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    grad = torch.randn(7, 96)
    layer(torch.randn(7, 64)).backward(grad)
    assert layer.bias.grad is not None
    assert torch.allclose(layer.bias.grad, grad.sum(0), atol=1e-5)


def test_joint_layers_have_gradients() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(64, 96), nn.Linear(64, 96)]).requires_grad_(False)
    quantize_model(model, "int8")
    x: Any = torch.randn(5, 64, requires_grad=True)
    first, second = linears(list(model), x)
    (first * second).sum().backward()
    assert x.grad is not None
    of_linears, x.grad = x.grad, None
    gated_linear(model[0], model[1], x).sum().backward()
    assert of_linears.any()
    assert x.grad.any()


# What is computed between products.


def test_elementwise_operators_have_the_gradients_of_plain_torch() -> None:
    torch.manual_seed(0)
    x, other = (torch.randn(2, 3, 4, 8, dtype=torch.float64).float().requires_grad_() for _ in range(2))
    weight = torch.randn(8, requires_grad=True)
    angles = torch.randn(1, 3, 4)
    frequencies = torch.stack([angles.cos(), angles.sin()], dim=-1)
    inputs = (x, other, weight)

    def loss(gate: Any, normalize: Any) -> torch.Tensor:
        total: torch.Tensor = (gate(x, other) * normalize(x, 1e-6, weight, frequencies)).square().sum()
        return total

    found = torch.autograd.grad(loss(elementwise.gate_operator, elementwise.normalize_operator), inputs)
    expected = torch.autograd.grad(loss(elementwise.gate, elementwise.normalize), inputs)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("masked", [False, True])
def test_quantized_attention_has_the_gradient_of_torchs(kind: str, masked: bool) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 70, 4, 32, requires_grad=True) for _ in range(3)]
    mask = torch.arange(70)[None].expand(2, 70) < 61 if masked else None
    grad = torch.randn(2, 70, 4, 32)
    result = attention_operator(*tensors, mask, 32**-0.5, False, kind, "reference")
    found = torch.autograd.grad(result, tensors, grad)
    query, key, value = (tensor.double().transpose(1, 2) for tensor in tensors)
    full = None if mask is None else mask[:, None, None, :]
    plain = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=full).transpose(1, 2)
    expected = torch.autograd.grad(plain, tensors, grad.double())
    for left, right in zip(found, expected, strict=True):
        assert torch.allclose(left, right, atol=1e-4)


def test_a_model_with_quantized_attention_trains() -> None:
    model = quantized_model(FAMILIES["z-image"], "int8")
    quantize_attention(model, "int8", device=torch.device("cpu"), dtype=torch.bfloat16)
    found = gradients(FAMILIES["z-image"], model, TARGETS["z-image"], torch.bfloat16)
    assert all(grad.any() for grad in found.values())


def test_other_operators_refuse_to_be_recorded() -> None:
    x = torch.randn(3, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="lowbit::quantize_int8_per_token has no gradient.*torch.no_grad"):
        torch.ops.lowbit.quantize_int8_per_token(x)
    with torch.no_grad():
        codes, _ = torch.ops.lowbit.quantize_int8_per_token(x)
    assert codes.dtype == torch.int8


def test_a_compiled_layer_has_the_gradient() -> None:
    layer = layer_of("int8", torch.float32)
    compiled = torch.compile(layer, fullgraph=True)
    x: Any = torch.randn(5, 64, requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad is not None
    found, x.grad = x.grad, None
    layer(x).sum().backward()
    assert torch.allclose(found, x.grad, rtol=1e-5, atol=1e-6)


def test_quantized_models_say_that_they_can_be_trained() -> None:
    model = quantized_model(FAMILIES["z-image"], "int8")
    assert model.hf_quantizer.is_trainable
    assert len(quantized_layers(model)) > 10
    assert build_quant_config("int8") is not None
