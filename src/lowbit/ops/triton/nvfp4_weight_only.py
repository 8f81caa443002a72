"""NVFP4 weights with activations left as they are, in Triton: the weight is decoded in registers.

For chips that don't multiply NVFP4 elements, and for layers whose activations are not to be quantized (W4A16).
"""

from __future__ import annotations

import torch

from lowbit.ops.dispatch import Problem
from lowbit.ops.library import define_operator
from lowbit.ops.triton.launch import device_refusal, row_major
from lowbit.ops.triton.microscaling import PLAIN, multiply
from lowbit.ops.triton.nvfp4 import KINDS


def supports(problem: Problem) -> str | None:
    """Return why the kernel can't run ``problem``, or ``None``."""
    return device_refusal(problem.device, problem.dtype)


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
    global_scale: torch.Tensor,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N] in the dtype of x [M, K]; the weight as in ``lowbit.ops.nvfp4.linear``."""
    constants = {**KINDS, "X_KIND": PLAIN.value}
    outer, scale = global_scale.reshape(1, 1), weight_scale.contiguous()
    return multiply(row_major(x), None, None, packed.contiguous(), scale, outer, bias, x.dtype, constants)


def _fake_weight_only(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    global_scale: torch.Tensor,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


weight_only_operator = define_operator(
    "nvfp4_weight_only_triton(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, Tensor global_scale)"
    " -> Tensor",
    multiply_weight_only,
    _fake_weight_only,
)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    global_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    weight_only: bool = False,
) -> torch.Tensor:
    """Apply a linear layer with an NVFP4 weight to unquantized activations.

    Arguments and result as in ``lowbit.ops.nvfp4.linear``; ``input_scale`` is not needed, as nothing is rounded.
    """
    result: torch.Tensor = weight_only_operator(x.reshape(-1, x.shape[-1]), packed, weight_scale, bias, global_scale)
    return result.reshape(*x.shape[:-1], packed.shape[0])
