"""Layers that have one input: quantized once where all of them are computed by a kernel that can, else one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lowbit.ops.elementwise import gate_operator
from lowbit.ops.weight_format import Prepared
from lowbit.quantization.autograd import needs_gradient
from lowbit.quantization.linear import QuantizedLinear


def linears(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Return each layer's result for x [..., K]: [..., N] of its own N."""
    kernel = _joint_kernel(layers, x, "joint")
    if kernel is None:
        return [layer(x) for layer in layers]
    results: list[torch.Tensor] = kernel.linears(x, *_tensors(layers))
    return results


def gated_linear(gate: nn.Module, value: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate(x)) * value(x)`` for x [..., K]: [..., N], the N of both."""
    kernel = _joint_kernel((gate, value), x, "gated")
    if kernel is None:
        result: torch.Tensor = gate_operator(*linears((gate, value), x))
        return result
    result = kernel.gated_linear(x, *_tensors((gate, value)))
    return result


def _tensors(layers: Sequence[Any]) -> tuple[list[Prepared], list[torch.Tensor | None]]:
    return [layer.prepared() for layer in layers], [layer.bias for layer in layers]


def _joint_kernel(layers: Sequence[nn.Module], x: torch.Tensor, capability: str) -> Any:
    """Return the kernel with ``capability`` that computes all layers and nothing else does, ``None`` without one.

    Where autograd records, each layer computes by itself: joint kernels have no gradients.
    """
    if any(needs_gradient(x, layer.bias) for layer in layers if isinstance(layer, nn.Linear)):
        return None
    kernels = {_kernel_alone(layer, capability, x.dtype) for layer in layers}
    return kernels.pop() if len(kernels) == 1 else None


def _kernel_alone(layer: nn.Module, capability: str, dtype: torch.dtype) -> Any:
    if type(layer) is not QuantizedLinear or not layer.method.is_kernel_alone:
        return None
    binding = layer.plain_binding()
    if binding is None or dtype not in binding.input_dtypes or capability not in binding.implementation.capabilities:
        return None
    return binding.kernel
