"""GGUF weights on CPUs with the native helper.

With AVX-512, weights are decoded to float32 and multiplied in one pass: of up to four rows in registers, of up to 64 in
the cache, four output channels at a time; with AVX512-VNNI codes are multiplied with up to four rows of 16 bits as they
are; for bfloat16 they are decoded to it with AVX512-BF16 or AMX. With more rows elsewhere, blocks of output channels
are decoded and handed to torch's product.
"""

from __future__ import annotations

import torch

from lowbit.ops.cpu import helper, native
from lowbit.ops.cpu.gguf import _fake_mm, multiply_blocked, prepare, restore
from lowbit.ops.cpu.gguf import can_run as supported_by_torch
from lowbit.ops.cpu.weight_only import takes_bfloat16
from lowbit.ops.dispatch import Problem
from lowbit.ops.gguf_decode_small import SMALL_DECODERS
from lowbit.ops.gguf_types import block_type
from lowbit.ops.library import define_operator
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]

# Rows up to which decoding and multiplying in one pass is the faster; see docs/gguf.md for the measurement.
FUSED_ROWS = 64


def can_run(problem: Problem) -> str | None:
    """Return why ``problem`` can't be run, ``None`` when it can."""
    if not helper.available():
        return f"native helper {helper.refusal()}"
    if problem.format.name in SMALL_DECODERS:
        return f"does not decode {problem.format.name}"
    return supported_by_torch(problem)


def multiply_native(
    x: torch.Tensor, packed: torch.Tensor, weight_type: str, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N] in the dtype of ``x`` [M, K]."""
    output = torch.empty((x.shape[0], packed.shape[0]), dtype=x.dtype)
    number = block_type(weight_type).number
    if takes_bfloat16(x):
        native.gguf_product(x.contiguous(), packed, number, None if bias is None else bias.float(), output)
        return output
    if x.shape[0] > FUSED_ROWS or x.shape[1] % 32 or not helper.multiplies_gguf():
        return multiply_blocked(x, packed, weight_type, bias)
    bias = None if bias is None else bias.float().contiguous()
    native.gguf_product(x.float().contiguous(), packed, number, bias, output)
    return output


native_operator = define_operator(
    "gguf_native_mm(Tensor x, Tensor packed, str weight_type, Tensor? bias=None) -> Tensor", multiply_native, _fake_mm
)


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear layer; arguments and result as in ``lowbit.ops.gguf.linear``."""
    packed, weight_type = prepared.weight, prepared.format.name
    rows = x.reshape(-1, x.shape[-1])
    product = native_operator if torch.compiler.is_compiling() else multiply_native
    result: torch.Tensor = product(rows, packed, weight_type, bias)
    return result.reshape(*x.shape[:-1], packed.shape[0])
