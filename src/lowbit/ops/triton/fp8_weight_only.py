"""E4m3 weights with activations left as they are, in Triton: decoded in the kernel, so on chips without FP8 too."""

from __future__ import annotations

import torch

from lowbit.ops import fp8_weight_only as plain
from lowbit.ops.dispatch import Problem
from lowbit.ops.library import define_operator, register_kernel
from lowbit.ops.triton.int8_weight_only import MOST_ROWS, weight_only_mm
from lowbit.ops.triton.launch import device_refusal


def fp8_few_rows_mm(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply x [M, K] floating by e4m3 weights [N, K] with scales [N, 1]; [M, N] in ``x.dtype``."""
    if x.shape[0] > MOST_ROWS:
        return plain.linear(x, weight, weight_scale, bias)
    return weight_only_mm(x, weight.view(torch.uint8), weight_scale, bias)


def _fake(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


few_rows_operator = define_operator(
    "fp8_few_rows_mm(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor", plain.linear, _fake
)
for _key in ("CUDA", "XPU"):
    register_kernel("fp8_few_rows_mm", _key, fp8_few_rows_mm)


def supports(problem: Problem) -> str | None:
    """Return why the kernel here can't run ``problem``, or ``None``."""
    if problem.weight_block_size is not None:
        return "takes one scale per output channel, not weight blocks"
    return device_refusal(problem.device, problem.dtype)


def pack_weight(weight: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
    """Return ``weight``: the kernel reads the canonical layout."""
    return weight


def unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    """Return ``packed``: see ``pack_weight``."""
    return packed


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None = None,
    weight_block_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Apply a linear layer with FP8 weights to unquantized activations; as ``lowbit.ops.fp8_weight_only.linear``."""
    result: torch.Tensor = few_rows_operator(x.reshape(-1, x.shape[-1]), packed, weight_scale, bias)
    return result.reshape(*x.shape[:-1], packed.shape[0])
