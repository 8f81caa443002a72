"""MX weights with activations left as they are, in Triton: the weight is decoded in registers.

For chips that don't multiply MX elements.
"""

from __future__ import annotations

import torch

from lowbit.ops.dispatch import Problem
from lowbit.ops.library import define_operator
from lowbit.ops.triton.launch import device_refusal, row_major
from lowbit.ops.triton.microscaling import PLAIN, multiply
from lowbit.ops.triton.mx import kinds


def supports(problem: Problem) -> str | None:
    """Return why the kernel can't run ``problem``, or ``None``."""
    refusal = device_refusal(problem.device, problem.dtype)
    if refusal is None and problem.dtype == torch.float16:
        return "takes bfloat16 or float32: float16 has no place for the range of MX scales"
    return refusal


def pack_weight(weight: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
    """Return ``weight``, dense: the kernel reads the canonical layout."""
    return weight.contiguous()


def unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    """Return ``packed``: see ``pack_weight``."""
    return packed


def multiply_weight_only(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dual_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N] in the dtype of x [M, K]; the weight as in ``lowbit.ops.mx.linear``."""
    outer = None if dual_scale is None else dual_scale.contiguous()
    constants = {**kinds(packed, dual_scale), "X_KIND": PLAIN.value}
    scale = weight_scale.contiguous()
    return multiply(row_major(x), None, None, packed.contiguous(), scale, outer, bias, x.dtype, constants)


def _fake_weight_only(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dual_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


weight_only_operator = define_operator(
    "mx_weight_only_triton(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, Tensor? dual_scale=None)"
    " -> Tensor",
    multiply_weight_only,
    _fake_weight_only,
)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dual_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply a linear layer with an MX weight to unquantized activations; arguments as in ``lowbit.ops.mx.linear``."""
    result: torch.Tensor = weight_only_operator(x.reshape(-1, x.shape[-1]), packed, weight_scale, bias, dual_scale)
    return result.reshape(*x.shape[:-1], packed.shape[0])
