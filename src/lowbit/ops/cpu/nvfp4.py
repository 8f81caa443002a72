"""NVFP4 weights on CPUs, with activations left as they are: no CPU multiplies e2m1.

The weight is decoded a block of output channels at a time and multiplied in the precision that this CPU is fastest in.
"""

from __future__ import annotations

import torch

from lowbit.ops import nvfp4
from lowbit.ops.cpu import native
from lowbit.ops.cpu.fp4 import decode_fp4
from lowbit.ops.cpu.weight_only import multiply_decoded
from lowbit.ops.dispatch import Problem
from lowbit.ops.library import define_operator


def supports(problem: Problem) -> str | None:
    """Return why ``problem`` can't be run, ``None`` when it can."""
    if problem.dtype not in native.ELEMENT_TYPES:
        return f"computes in bfloat16, float16 or float32, not in {problem.dtype}"
    return None


def pack_weight(weight: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
    """Return ``weight`` e2m1 uint8 [N, K / 2], dense."""
    return weight.contiguous()


def unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    """Return ``packed``: see ``pack_weight``."""
    return packed


@torch.no_grad()
def multiply_weight_only(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    global_scale: torch.Tensor,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N] in the dtype of ``x`` [M, K]; the weight as in ``ops.nvfp4.linear``."""

    def decode(first: int, weight: torch.Tensor) -> None:
        rows = slice(first, first + weight.shape[0])
        decode_fp4(packed[rows], weight_scale[rows].float().mul_(global_scale), weight, nvfp4.GROUP_SIZE)

    return multiply_decoded(x, packed.shape[0], decode, bias)


def _fake_weight_only(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    global_scale: torch.Tensor,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


weight_only_operator = define_operator(
    "nvfp4_weight_only_mm(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, Tensor global_scale) -> Tensor",
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
    compute = weight_only_operator if torch.compiler.is_compiling() else multiply_weight_only
    result = compute(x.reshape(-1, x.shape[-1]), packed, weight_scale, bias, global_scale)
    return result.reshape(*x.shape[:-1], packed.shape[0])
