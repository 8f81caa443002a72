"""Gradients of quantized linear layers, for adapters trained on top of them.

The gradient passes straight through the rounding of activations (Bengio et al., arXiv 1308.3432). With the dequantized
weight ``W`` [N, K], transforms and low-rank branch included, the gradients of ``y = x W^T + b`` are ``grad_y W`` and
the sum of ``grad_y`` over rows. Codes and scales are frozen: they get none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lowbit.ops.cpu.features import fast_matmul_dtype

if TYPE_CHECKING:
    from lowbit.quantization.linear import QuantizedLinear


def needs_gradient(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Tell whether autograd records what is computed from ``x`` and ``bias``."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


class StraightThroughLinear(torch.autograd.Function):
    """A quantized layer's kernel forward, the product with its dequantized weight backward.

    Nothing but the layer is kept for the backward pass: neither the input nor a dequantized weight.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: QuantizedLinear) -> torch.Tensor:
        """Compute x [..., K] -> [..., N] by the layer's kernel."""
        ctx.layer = layer
        return layer.compute(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Return the gradients [..., K] of the input and [N] of the bias."""
        rows = grad.reshape(-1, grad.shape[-1])
        of_bias = rows.float().sum(0).to(grad.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_bias, None
        of_input = input_gradient(ctx.layer, rows).view(*grad.shape[:-1], ctx.layer.in_features)
        return of_input, of_bias, None


@torch.no_grad()
def input_gradient(layer: QuantizedLinear, grad: torch.Tensor) -> torch.Tensor:
    """Return ``grad @ W`` [M, K] in the dtype of ``grad`` [M, N]; accumulated in float32, W rounded to that dtype.

    Where a CPU has no GEMM of that dtype, both are multiplied in float32.
    """
    dtype = grad.dtype
    if grad.device.type == "cpu" and dtype != torch.float64 and not torch.compiler.is_compiling():
        dtype = fast_matmul_dtype(dtype)
    return (grad.to(dtype) @ layer.dequantized().to(dtype)).to(grad.dtype)
