"""A layer's binding to its kernel: made once, and never changed by a call."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from examples import custom_method as toy
from examples.custom_method import ToyLinearMethod
from lowbit.ops import w4a4_weight_only
from lowbit.ops.weight_format import Prepared
from lowbit.quantization import LinearMethod, QuantizedLinear
from lowbit.quantization.linear import State
from lowbit.quantization.methods.svdquant import SvdQuantLinearMethod
from lowbit.quantization.plan import quantize_layer

THREADS = 8
# Both kernels read a layout of their own; the second one packs in the same memory.
METHODS = {"toy": (ToyLinearMethod(127, "auto"), toy), "svdquant": (SvdQuantLinearMethod("int4", 8), w4a4_weight_only)}


def make(method: LinearMethod) -> QuantizedLinear:
    torch.manual_seed(0)
    return quantize_layer(nn.Linear(128, 64).requires_grad_(False), method, "layer")


def from_threads(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the results of as many calls at once."""
    start = threading.Barrier(THREADS)

    def call(_: int) -> torch.Tensor:
        start.wait()
        with torch.no_grad():
            result: torch.Tensor = layer(x)
        return result

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, range(THREADS)))


@pytest.mark.parametrize("name", METHODS)
def test_threads_that_use_a_new_layer_bind_it_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, kernel = METHODS[name]
    expected, x = make(method), torch.randn(3, 128)
    layer = copy.deepcopy(expected)
    assert layer.binding is None
    layer.owns_weight = True
    calls: list[int] = []
    prepare: Any = kernel.prepare

    def counted(tensors: Prepared, overwrite: bool = False) -> Prepared:
        calls.append(1)
        threading.Event().wait(0.02)  # others come meanwhile
        result: Prepared = prepare(tensors, overwrite)
        return result

    monkeypatch.setattr(kernel, "prepare", counted)
    results = from_threads(layer, x)
    assert len(calls) == 1
    assert all(torch.equal(result, expected(x)) for result in results)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("moved_by_others", [False, True])
def test_a_call_changes_nothing_of_the_layer(name: str, moved_by_others: bool) -> None:
    method, _ = METHODS[name]
    layer, x = make(method), torch.randn(3, 128)
    expected = layer(x)
    if moved_by_others:
        layer.let_others_move()
        layer.process_weights_after_loading()
        assert layer.state is State.EXTERNAL
    before, parameters = dict(layer.__dict__), dict(layer._parameters)
    seen: list[bool] = []

    class Watched(dict):
        def __setitem__(self, key: str, value: Any) -> None:
            seen.append(True)
            super().__setitem__(key, value)

    layer._parameters = Watched(layer._parameters)
    results = from_threads(layer, x)
    assert all(torch.equal(result, expected) for result in results)
    assert not seen
    assert {key: value for key, value in layer.__dict__.items() if key != "_parameters"} == {
        key: value for key, value in before.items() if key != "_parameters"
    }
    assert all(layer._parameters[key] is value for key, value in parameters.items())


@pytest.mark.parametrize("name", METHODS)
def test_a_binding_is_left_with_the_checkpoints_tensors(name: str) -> None:
    method, _ = METHODS[name]
    layer, x = make(method), torch.randn(3, 128)
    expected, stored = layer(x), {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    assert layer.state is State.BOUND
    layer.leave_kernel()
    assert (layer.state, layer.binding) == (State.CANONICAL, None)
    assert all(torch.equal(tensor, stored[key]) for key, tensor in layer.state_dict().items())
    assert torch.equal(layer(x), expected)
