"""Int8 W8A8 on CPUs with an 8-bit dot product (VNNI): products by oneDNN, everything around them in the cache.

oneDNN's fast kernels multiply unsigned by signed bytes; signed activations fall to a reference kernel that is thousands
of times slower. So activations are stored with 128 added and oneDNN is told of the zero point. In eager mode rows are
quantized, multiplied and scaled a few hundred at a time, which keeps the float32 product out of main memory. When
compiling, quantization is plain torch, to fuse with what precedes it, and the rest is one operator.
"""

from __future__ import annotations

from functools import cache

import torch

from lowbit.ops import int8
from lowbit.ops.cpu import native
from lowbit.ops.cpu.blocked import finish
from lowbit.ops.cpu.features import has_vnni
from lowbit.ops.cpu.quantize import quantize_uint8_rows
from lowbit.ops.cpu.workspace import scratch
from lowbit.ops.dispatch import Problem
from lowbit.ops.library import define_operator
from lowbit.ops.weight_format import Prepared

ZERO_POINT = 128

# A sum of more products of u8 and s8 may leave int32: K * 255 * 127 < 2**31.
LARGEST_IN_FEATURES = 66311

# Rows at a time. Of 32 ... 1088 on 3840x3840 and 10240x3840 the product is fastest from 192 on (below, oneDNN reads the
# weight too often), and the float32 result of 256 rows is still in the cache when it is scaled.
ROWS_AT_ONCE = 256


def can_run(problem: Problem) -> str | None:
    """Return why ``problem`` can't be run, ``None`` when it can."""
    if not hasattr(torch.ops.onednn, "qlinear_prepack") or not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    if not has_vnni():
        return "the CPU has neither AVX512-VNNI nor AVX-VNNI, without which oneDNN's 8-bit products may saturate"
    if problem.in_features > LARGEST_IN_FEATURES:
        return f"int32 sums may overflow with more than {LARGEST_IN_FEATURES} input features"
    return native.dtype_refusal(problem.dtype)


def prepare(tensors: Prepared, overwrite: bool = False) -> Prepared:
    """Return the tensors with the weight in oneDNN's layout."""
    return tensors._replace(weight=pack_weight(tensors.weight))


def restore(prepared: Prepared) -> Prepared:
    """Undo ``prepare``."""
    return prepared._replace(weight=unpack_weight(prepared.weight))


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Bring ``weight`` int8 [N, K] to oneDNN's blocked layout: an opaque mkldnn tensor [K, N]."""
    packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return packed


def unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    """Return the int8 [N, K] that ``packed`` was made of."""
    return packed.to_dense().t().contiguous()


@cache
def _unit_scales(features: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        return torch.ones(features), torch.zeros(features, dtype=torch.int64)


def _integer_product(codes: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Multiply uint8 [rows, K] (int8 + 128) by the packed weight: exact integers, rounded to float32 [rows, N]."""
    ones, zeros = _unit_scales(packed.shape[1])
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, ZERO_POINT, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


def _pieces(rows: int) -> list[slice]:
    """Divide ``rows`` into equal pieces of at most ``ROWS_AT_ONCE``, in multiples of 16."""
    count = max(-(-rows // ROWS_AT_ONCE), 1)
    step = -(-rows // (16 * count)) * 16
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)] if rows else []


@torch.no_grad()
def scale_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply quantized activations by a packed weight and scale the result.

    Args:
        x: uint8 [M, K], int8 values + 128.
        x_scale: float32 [M, 1].
        packed: from ``pack_weight``.
        weight_scale: float32 [N, 1].
        bias: [N] or ``None``.
        out_dtype: of the result.

    Returns:
        [M, N] in ``out_dtype``, with the numbers of ``lowbit.ops.int8.int8_scaled_mm``.
    """
    output = torch.empty((x.shape[0], packed.shape[1]), dtype=out_dtype)
    bias = None if bias is None else bias.float()
    x, x_scale = x.contiguous(), x_scale.contiguous()
    for rows in _pieces(x.shape[0]):
        finish(_integer_product(x[rows], packed), x_scale[rows], weight_scale, bias, output[rows])
    return output


def _fake_scale_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight_scale.shape[0]), dtype=out_dtype)


product_operator = define_operator(
    "int8_onednn_scaled_mm(Tensor x, Tensor x_scale, Tensor packed, Tensor weight_scale, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor",
    scale_product,
    _fake_scale_product,
)


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a W8A8 linear layer: ``lowbit.ops.int8.linear`` with ``packed`` from ``pack_weight``."""
    packed, weight_scale = prepared.weight, prepared.scales
    rows = x.reshape(-1, x.shape[-1])
    result: torch.Tensor
    if torch.compiler.is_compiling():
        quantized, scale = int8.quantize_int8_per_token(rows)
        shifted = (quantized.to(torch.int16) + ZERO_POINT).to(torch.uint8)
        result = product_operator(shifted, scale, packed, weight_scale, bias, x.dtype)
    else:
        result = _linear_rows(rows, packed, weight_scale, bias)
    return result.reshape(*x.shape[:-1], weight_scale.shape[0])


@torch.no_grad()
def _linear_rows(
    x: torch.Tensor, packed: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Quantize, multiply and scale x [M, K] a few rows at a time."""
    if x.stride(1) != 1:
        x = x.contiguous()
    output = torch.empty((x.shape[0], packed.shape[1]), dtype=x.dtype)
    bias = None if bias is None else bias.float()
    for rows in _pieces(x.shape[0]):
        part = x[rows]
        codes = scratch("codes", tuple(part.shape), torch.uint8)
        scale = scratch("scale", (part.shape[0], 1), torch.float32)
        quantize_uint8_rows(part, codes, scale)
        finish(_integer_product(codes, packed), scale, weight_scale, bias, output[rows])
    return output
