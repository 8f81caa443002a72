"""Attention on CPUs with AVX512-VNNI by the native helper: in int8, rounded to e4m3, or unquantized.

With AMX unquantized bfloat16 is multiplied as it is, with powers of two rounded to bfloat16, as torch does. Elsewhere
it is multiplied as 16-bit integers, 32 at a time, summed in int32: queries and keys (less their mean, which softmax
does not see) with an exponent per token, 14 bits or more, so that by Cauchy's inequality no sum overflows; values with
13 bits and an exponent per channel and 64 keys; the softmax with 12 bits relative to its highest value of 64 keys. What
that loses is less than rounding the result to bfloat16 may. Where the CPU multiplies bfloat16 32 at a time, too, it is
faster than torch's scaled_dot_product_attention all the same. Other dtypes are multiplied in float32, unless the CPU
multiplies them faster. FP8 has no instructions on any CPU: there it shows what 8-bit floating point would do to the
pictures, at float32's speed.
"""

from __future__ import annotations

import torch

from lowbit.errors import UnsupportedError
from lowbit.ops.attention import LOG2_E, UNQUANTIZED, AttentionProblem
from lowbit.ops.cpu import helper, native
from lowbit.ops.cpu.features import fast_matmul_dtype


def can_run(problem: AttentionProblem) -> str | None:
    """Return why ``problem`` can't be run, ``None`` when it can."""
    if not helper.available():
        return f"native helper {helper.refusal()}"
    if not helper.multiplies_int8():
        return "the CPU has no AVX512-VNNI"
    if problem.head_dim is not None and problem.head_dim > native.LARGEST_HEAD_DIM:
        return f"heads are at most {native.LARGEST_HEAD_DIM} wide, not {problem.head_dim}"
    is_fast = fast_matmul_dtype(problem.dtype) != torch.float32
    if problem.kind == UNQUANTIZED and is_fast and _unquantized_kind(problem.dtype) == "float32":
        return f"the CPU multiplies {problem.dtype} itself"
    return native.dtype_refusal(problem.dtype)


def _unquantized_kind(dtype: torch.dtype) -> str:
    """Return the kind of ``native.attention`` that computes unquantized attention in ``dtype``."""
    if dtype != torch.bfloat16:
        return "float32"
    return "bfloat16" if helper.has_amx() else "int16"


@torch.no_grad()
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    kind: str,
) -> torch.Tensor:
    """Compute attention; arguments and result as in ``lowbit.ops.attention.attention``."""
    wrong_dtype = native.dtype_refusal(query.dtype)
    refusal = wrong_dtype or can_run(AttentionProblem(query.device, query.dtype, kind, query.shape[3]))
    if wrong_dtype or (refusal is not None and (kind != UNQUANTIZED or not helper.multiplies_int8())):
        raise UnsupportedError(f"attention can't be computed: {refusal}")
    output = torch.empty(query.shape, dtype=query.dtype)
    query, key, value = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key, value))
    keep = None if key_mask is None else key_mask.contiguous()
    if kind == UNQUANTIZED:
        kind = _unquantized_kind(query.dtype)
    native.attention(query, key, value, keep, output, scale * LOG2_E, is_causal, kind)
    return output
