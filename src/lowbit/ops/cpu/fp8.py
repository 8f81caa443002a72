"""FP8 weights on CPUs, with activations left as they are: no CPU multiplies e4m3.

The weight is decoded a block of output channels at a time and multiplied in the precision that this CPU is fastest in:
in the activations' own where it has instructions for it, else in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowbit.ops import fp8
from lowbit.ops.cpu import native
from lowbit.ops.cpu.blocked import linear_by_blocks
from lowbit.ops.dispatch import Problem
from lowbit.ops.library import define_operator


def supports(problem: Problem) -> str | None:
    """Return why ``problem`` can't be run, ``None`` when it can."""
    if problem.dtype not in native.ELEMENT_TYPES:
        return f"computes in bfloat16, float16 or float32, not in {problem.dtype}"
    return None


def pack_weight(weight: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
    """Return ``weight`` e4m3 [N, K], dense."""
    return weight.contiguous()


def unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    """Return ``packed``: see ``pack_weight``."""
    return packed


def decode_rows(
    packed: torch.Tensor, scale: torch.Tensor, block_size: Sequence[int] | None, first: int, output: torch.Tensor
) -> None:
    """Write rows of ``packed`` times ``scale``, from ``first`` on, to ``output``.

    Args:
        packed: e4m3 [N, K].
        scale: float32: per tensor, [N, 1], or per block.
        block_size: (rows, columns) of a block, ``None`` for the other two.
        first: the first row.
        output: dense [rows, K] float32, bfloat16 or float16.
    """
    rows, columns = output.shape
    codes = packed[first : first + rows]
    if native.available():
        height, width = block_size or ((packed.shape[0] if scale.numel() == 1 else 1), columns)
        native.dequantize(codes, scale, output, height, width, first)
        return
    if block_size is not None:
        top = first // block_size[0]
        skipped = first - top * block_size[0]
        grid = scale[top : -(-(first + rows) // block_size[0])]
        scale = fp8.expand_scale(grid, torch.Size((skipped + rows, columns)), block_size)[skipped:]
    elif scale.numel() > 1:
        scale = scale[first : first + rows]
    output.copy_(codes.float().mul_(scale))


@torch.no_grad()
def multiply_weight_only(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    weight_block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return ``x @ (packed * weight_scale).T + bias`` [M, N] in the dtype of ``x`` [M, K]."""
    weight_scale = weight_scale.contiguous()

    def decode(first: int, weight: torch.Tensor) -> None:
        decode_rows(packed, weight_scale, weight_block_size, first, weight)

    return linear_by_blocks(x, packed.shape[0], decode, bias)


def _fake_weight_only(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    weight_block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


weight_only_operator = define_operator(
    "fp8_weight_only_mm(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int[]? weight_block_size=None)"
    " -> Tensor",
    multiply_weight_only,
    _fake_weight_only,
)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None = None,
    weight_block_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Apply a linear layer with FP8 weights to unquantized activations.

    Arguments and result as in ``lowbit.ops.fp8.linear``; ``input_scale`` is not needed, as nothing is rounded.
    """
    rows = x.reshape(-1, x.shape[-1])
    result: torch.Tensor
    if torch.compiler.is_compiling():
        block = None if weight_block_size is None else list(weight_block_size)
        result = weight_only_operator(rows, packed, weight_scale, bias, block)
    else:
        result = multiply_weight_only(rows, packed, weight_scale, bias, weight_block_size)
    return result.reshape(*x.shape[:-1], packed.shape[0])
