"""Layers with one input give what they give one by one, however they are computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from lowbit.ops.cpu import int8_native
from lowbit.ops.dispatch import ANY_DEVICE, AUTO, Implementation, Problem
from lowbit.quantization import QuantizedLinear, quantize_model
from lowbit.quantization.base import LinearMethod
from lowbit.quantization.joint import gated_linear, linears
from lowbit.quantization.linear import Binding
from lowbit.quantization.methods.comfyui import ComfyUiFp8LinearMethod
from lowbit.quantization.methods.fp8 import Fp8LinearMethod
from lowbit.quantization.methods.int8 import Int8LinearMethod
from lowbit.quantization.methods.modelopt import ModelOptFp8LinearMethod

METHODS: dict[str, LinearMethod] = {
    "int8": Int8LinearMethod(AUTO),
    "int8, 6 bits of activations": Int8LinearMethod(AUTO, 6),
    "fp8": Fp8LinearMethod("dynamic", None, AUTO),
    "fp8, static": Fp8LinearMethod("static", None, AUTO),
    "fp8, blocks": Fp8LinearMethod("dynamic", (128, 128), AUTO),
    "modelopt": ModelOptFp8LinearMethod("dynamic", AUTO),
    "modelopt, static": ModelOptFp8LinearMethod("static", AUTO),
    "comfyui": ComfyUiFp8LinearMethod(),
}
REFUSAL = int8_native.can_run(Problem(torch.device("cpu"), torch.float32, 64, 64))


def make(method: str | None, features: tuple[int, ...] = (64, 32, 48)) -> nn.ModuleList:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(64, n, bias=n == 32) for n in features)
    if method is not None:
        quantize_model(layers, method)
    return layers.requires_grad_(False)


@pytest.mark.parametrize("name", METHODS)
def test_kernels_are_alone_only_where_a_layer_is_a_scale_per_token_and_channel(name: str) -> None:
    layer = QuantizedLinear(256, 256, True, METHODS[name])
    given: list[Any] = []

    def linear(*arguments: Any) -> torch.Tensor:
        given.extend(arguments)
        result: torch.Tensor = arguments[0]
        return result

    entry, kernel = Implementation("fake", "", ANY_DEVICE), cast(Any, SimpleNamespace(linear=linear))
    layer.binding, x = Binding(entry, kernel, torch.device("cpu"), torch.strided, False, None), torch.randn(1, 256)
    layer.method.apply(layer, x, layer.bias)
    prepared = given[1]
    assert prepared.weight is layer.weight
    is_per_channel = prepared.scales.shape == (256, 1) and prepared.format.block is None
    is_alone = given[0] is x and given[2] is layer.bias and is_per_channel and prepared.input_scale is None
    assert layer.method.is_kernel_alone == is_alone


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many layers each call of the native kernel had."""
    counts: list[int] = []
    multiply = int8_native.multiply_operator

    def count(x: torch.Tensor, packed: list[torch.Tensor], *rest: object) -> list[torch.Tensor]:
        counts.append(len(packed))
        return multiply(x, packed, *rest)

    monkeypatch.setattr(int8_native, "multiply_operator", count)
    return counts


@pytest.mark.parametrize("method", [None, "int8", "fp8", "mxfp8"])
def test_the_same_as_one_by_one(method: str | None) -> None:
    layers, x = make(method), torch.randn(2, 5, 64)
    for result, layer in zip(linears(list(layers), x), layers, strict=True):
        assert torch.equal(result, layer(x))
    expected = torch.nn.functional.silu(layers[0](x)) * layers[0](x)
    torch.testing.assert_close(gated_linear(layers[0], layers[0], x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
def test_int8_is_quantized_once(calls: list[int]) -> None:
    layers, x = list(make("int8")), torch.randn(5, 64)
    linears(layers, x)
    assert calls == [3]


@pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
@pytest.mark.parametrize("case", ["hook", "wrapped forward", "offloaded", "another method", "unquantized", "subclass"])
def test_what_does_more_is_computed_alone(case: str, calls: list[int]) -> None:
    layers, x = list(make("int8")), torch.randn(5, 64)
    plain = linears(layers, x)
    seen: list[object] = []
    first = layers[0]
    if case == "hook":
        first.register_forward_hook(lambda *arguments: seen.append(arguments))
    elif case == "wrapped forward":
        forward = first.forward
        first.forward = lambda x: forward((seen.append((x,)), x)[1])
    elif case == "offloaded":
        first.let_others_move()
    elif case == "another method":
        layers[0] = make("fp8")[0]
    elif case == "unquantized":
        layers[0] = make(None)[0]
    else:
        first.__class__ = type("Other", (type(first),), {})
    calls.clear()
    results = linears(layers, x)
    assert 3 not in calls
    assert bool(seen) == (case in ("hook", "wrapped forward"))
    assert all(torch.equal(result, before) for result, before in zip(results[1:], plain[1:], strict=True))
    assert (results[0] - plain[0]).norm() < 0.05 * plain[0].norm()
