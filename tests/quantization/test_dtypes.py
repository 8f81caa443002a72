"""Every activation dtype is computed by every method and kernel, held to float64, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import nn

from lowbit.errors import UnsupportedError
from lowbit.ops import attention, elementwise
from lowbit.ops.cpu import attention as native_attention
from lowbit.ops.cpu import helper
from lowbit.ops.dispatch import verdicts
from lowbit.quantization import QuantizationConfig, QuantizedLinear, build_quant_config, quantize_model
from lowbit.quantization.calibration.smoothing import watched_inputs
from lowbit.quantization.calibration.static import calibration
from lowbit.quantization.joint import gated_linear, linears
from tests.support.models import METHODS, STATIC, relative_error

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# A weight in the activations' dtype, one more rounding of the result, the transform's own rounding.
OF_THE_DTYPE = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 1e-6, torch.float64: 1e-6}
# Rounding of normally distributed activations of 8 and 4 bits; e4m3 has three bits of mantissa.
OF_THE_CODES = {"int8": 0.01, "fp8": 0.04, "mxfp8": 0.04, "comfyui": 0.04, "modelopt": 0.04}
FOUR_BITS = 0.16


@functools.cache
def _quantized(method: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96)).to(torch.bfloat16).requires_grad_(False)
    config = build_quant_config({**METHODS[method], "kernel": "auto"})
    assert isinstance(config, QuantizationConfig)
    x, seen = 3 * torch.randn(64, 64).to(torch.bfloat16), None
    if config.needs_calibration:
        with watched_inputs(model) as seen:
            model(x)
    quantize_model(model, config, seen_inputs=seen)
    if method in STATIC:
        with calibration(model):
            model(x)
    return model


def layer_of(method: str, kernel: str, dtype: torch.dtype) -> QuantizedLinear:
    layer = copy.deepcopy(_quantized(method))[0]
    assert isinstance(layer, QuantizedLinear)
    layer.method.kernel = kernel
    return layer.to(dtype)


def kernels_of(method: str) -> list[str]:
    layer: Any = _quantized(method)[0]
    problem = layer.method.problem(layer, torch.device("cpu"))
    return sorted({entry.name for entry, refusal in verdicts(layer.method.table, problem) if refusal is None})


def bound(layer: QuantizedLinear, dtype: torch.dtype) -> float:
    assert layer.implementation is not None
    rounds = layer.method.activation_scheme != "none" and layer.implementation.name in (
        "reference",
        "float32",
        "native",
    )
    if layer.method.family in ("gguf", "w4a16", "w8a16") or not rounds:
        return OF_THE_DTYPE[dtype]
    return OF_THE_DTYPE[dtype] + OF_THE_CODES.get(layer.method.name.partition("_")[0], FOUR_BITS)


CASES = [(method, kernel) for method in METHODS for kernel in kernels_of(method)]


@pytest.mark.parametrize(("method", "kernel"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype_of_layer_and_input(method: str, kernel: str, dtype: torch.dtype) -> None:
    layer = layer_of(method, kernel, dtype)
    assert layer.bias is not None
    assert layer.compute_dtype == layer.bias.dtype == dtype
    weight, bias = layer.dequantized().double(), layer.bias.double()
    for given in DTYPES:
        for rows in (1, 7, 65):
            x = torch.randn(rows, 64).to(given)
            result = layer(x)
            assert result.dtype == given
            assert layer.implementation is not None
            assert layer.implementation.name == kernel
            error = relative_error(result, x.double() @ weight.t() + bias)
            assert error < bound(layer, given), (given, rows)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_cast_after_its_use_computes_as_one_made_in_that_dtype(method: str) -> None:
    used, fresh = layer_of(method, "auto", torch.bfloat16), layer_of(method, "auto", torch.float64)
    used(torch.randn(3, 64).to(torch.bfloat16))
    used.double()
    x = torch.randn(5, 64, dtype=torch.float64)
    assert torch.equal(used(x), fresh(x))
    assert used.implementation == fresh.implementation


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_other_dtypes_are_refused_by_name(method: str, dtype: torch.dtype) -> None:
    layer = layer_of(method, "auto", torch.bfloat16)
    layer.prefix = "blocks.0.to_q"
    named = str(dtype).removeprefix("torch.")
    with pytest.raises(UnsupportedError, match=rf"blocks.0.to_q: .*bfloat16, float16, float32, not in {named}: cast"):
        layer(torch.zeros(2, 64).to(dtype))


def narrow(layer: QuantizedLinear, *dtypes: torch.dtype) -> None:
    layer.binding = dataclasses.replace(layer.bound, input_dtypes=frozenset(dtypes))


def test_a_kernel_that_takes_fewer_dtypes_gets_them_in_float32() -> None:
    layer = layer_of("int8", "auto", torch.bfloat16)
    x = torch.randn(5, 64).to(torch.float16)
    layer(x)
    narrow(layer, torch.bfloat16, torch.float32)
    assert torch.equal(layer(x), layer(x.float()).to(torch.float16))
    narrow(layer, torch.bfloat16)
    with pytest.raises(UnsupportedError, match="takes activations in bfloat16, not in float16"):
        layer(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_layers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(64, 96), nn.Linear(64, 96)]).to(torch.bfloat16).requires_grad_(False)
    quantize_model(model, "int8")
    for cast in (None, dtype):
        layers: list[Any] = list(model if cast is None else model.to(cast))
        x = torch.randn(7, 64).to(dtype)
        exact = [x.double() @ layer.dequantized().double().t() + layer.bias.double() for layer in layers]
        for found, expected in zip(linears(layers, x), exact, strict=True):
            assert found.dtype == dtype
            assert relative_error(found, expected) < 0.02
        gated = gated_linear(layers[0], layers[1], x)
        assert gated.dtype == dtype
        assert relative_error(gated, nn.functional.silu(exact[0]) * exact[1]) < 0.03


@pytest.mark.parametrize("method", ["int8", "mxfp4_dualscale", "svdquant-int4"])
def test_float64_has_gradients(method: str) -> None:
    layer = layer_of(method, "auto", torch.float64)
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 96, dtype=torch.float64)
    layer(x).backward(grad)
    assert x.grad is not None
    assert relative_error(x.grad, grad @ layer.dequantized().double()) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_between_products(dtype: torch.dtype) -> None:
    x, value = (torch.randn(2, 5, 4, 16).to(dtype) for _ in range(2))
    gated = elementwise.gate_operator(x, value)
    assert relative_error(gated, nn.functional.silu(x.double()) * value.double()) < OF_THE_DTYPE[dtype]
    normalized = elementwise.normalize_operator(x, 1e-6, None, None)
    assert relative_error(normalized, nn.functional.rms_norm(x.double(), (16,), eps=1e-6)) < OF_THE_DTYPE[dtype]
    query, key = x.double().transpose(1, 2), value.double().transpose(1, 2)
    exact = nn.functional.scaled_dot_product_attention(query, key, key)
    for kind, kernel, allowed in (("int8", "reference", 0.05), ("fp8", "reference", 0.1), ("none", "sdpa", 1e-2)):
        found = attention.attention_operator(x, value, value, None, 0.25, False, kind, kernel)
        assert found.dtype == dtype
        assert relative_error(found, exact.transpose(1, 2)) < allowed


@pytest.mark.parametrize("kind", ["int8", "fp8", "none"])
def test_native_attention_refuses_float64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "multiplies_int8", lambda: True)
    x = torch.randn(1, 5, 2, 16, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="bfloat16, float16 or float32, not in torch.float64"):
        native_attention.attention(x, x, x, None, 0.25, False, kind)
