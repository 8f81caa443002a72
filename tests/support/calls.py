"""Kernels called with a weight's tensors one by one, as the formulas in ``lowbit.ops`` name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowbit.ops.weight_format import Prepared, WeightFormat


def _int8(weight: Any, scale: Any, bias: Any) -> tuple[Prepared, Any]:
    return Prepared(weight, scale), bias


def _fp8(weight: Any, scale: Any, bias: Any, input_scale: Any = None, block: Any = None) -> tuple[Prepared, Any]:
    return Prepared(weight, scale, input_scale=input_scale, format=WeightFormat("e4m3", block)), bias


def _mx(weight: Any, scale: Any, bias: Any, dual_scale: Any = None) -> tuple[Prepared, Any]:
    return Prepared(weight, scale, outer_scale=dual_scale), bias


def _nvfp4(
    weight: Any, scale: Any, bias: Any, outer: Any, input_scale: Any = None, weight_only: bool = False
) -> tuple[Prepared, Any]:
    format = WeightFormat("nvfp4", activation=None if weight_only else "dynamic")
    return Prepared(weight, scale, outer_scale=outer, input_scale=input_scale, format=format), bias


def _gguf(weight: Any, kind: str, bias: Any) -> tuple[Prepared, Any]:
    return Prepared(weight, format=WeightFormat(kind, activation=None)), bias


def _groups(weight: Any, scale: Any, bias: Any, zero_point: Any = None) -> tuple[Prepared, Any]:
    return Prepared(weight, scale, zero_point), bias


def _int8_static(weight: Any, input_scale: Any, offset: Any, quant_bias: Any, scale: Any) -> tuple[Prepared, None]:
    return Prepared(weight, scale, input_scale=input_scale, input_offset=offset, quant_bias=quant_bias), None


# Names of modules begin with those of the families; the longer ones first.
_FAMILIES: dict[str, Callable[..., tuple[Prepared, Any]]] = {
    "int8_static": _int8_static,
    "int8": _int8,
    "fp8": _fp8,
    "mx": _mx,
    "nvfp4": _nvfp4,
    "gguf": _gguf,
    "w4a16": _groups,
    "w8a16": _groups,
    "w4a4": _int8,
}


def function(module: Any) -> Callable[..., torch.Tensor]:
    """Return ``module.linear`` as a function of x and the tensors in the order of the family's formula."""
    name = module.__name__.rpartition(".")[2]
    arrange = next((arrange for family, arrange in _FAMILIES.items() if name.startswith(family)), _int8)

    def linear(x: torch.Tensor, *tensors: Any) -> torch.Tensor:
        prepared, bias = arrange(*tensors)
        result: torch.Tensor = module.linear(x, prepared, bias)
        return result

    return linear


def linear(module: Any, x: torch.Tensor, *tensors: Any) -> torch.Tensor:
    """Return ``module.linear`` of x and the tensors, see ``function``."""
    return function(module)(x, *tensors)


def layers(weights: Any, scales: Any) -> list[Prepared]:
    """Return what ``linears`` and ``gated_linear`` take of several int8 or FP8 layers."""
    return [Prepared(weight, scale) for weight, scale in zip(weights, scales, strict=True)]


def packed(module: Any, weight: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
    """Return ``weight`` in the layout of ``module``'s kernel."""
    result: torch.Tensor = module.prepare(Prepared(weight), overwrite).weight
    return result


def unpacked(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """Undo ``packed``."""
    result: torch.Tensor = module.restore(Prepared(weight)).weight
    return result
