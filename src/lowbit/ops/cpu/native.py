"""What the native helper computes (``lowbit.ops.cpu.helper``): quantizing, decoding, products, attention, norms, gates.

Outputs are given and filled. What quantizes, decodes and scales gives the results of the plain-torch references, bit
for bit.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowbit.ops.cpu.helper import library

# Type codes of the C functions: _native/common.h has the same.
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODE_TYPES = {torch.int8: 0, torch.uint8: 1, torch.float8_e4m3fn: 2}


def dtype_refusal(dtype: torch.dtype) -> str | None:
    """Return why activations of ``dtype`` can't be computed with on CPUs, ``None`` when they can."""
    return None if dtype in ELEMENT_TYPES else f"computes in bfloat16, float16 or float32, not in {dtype}"


def quantize(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, block_rows: int = 1, block_columns: int | None = None
) -> None:
    """Quantize ``x`` by blocks of rows and columns.

    Args:
        x: [rows, columns] float32, bfloat16 or float16; rows may be apart, columns not.
        codes: written: dense [rows, columns] int8, uint8 (int8 + 128) or e4m3.
        scale: written: dense float32, one element per block, row by row.
        block_rows: rows of a block.
        block_columns: columns of a block; ``None``: all.
    """
    rows, columns = x.shape
    assert x.stride(1) == 1 or columns <= 1
    assert codes.is_contiguous()
    assert scale.is_contiguous()
    library().lowbit_quantize(
        x.data_ptr(), ELEMENT_TYPES[x.dtype], rows, columns, x.stride(0), block_rows, block_columns or max(columns, 1),
        codes.data_ptr(), CODE_TYPES[codes.dtype], scale.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    output: torch.Tensor,
    block_rows: int = 1,
    block_columns: int | None = None,
    first_row: int = 0,
) -> None:
    """Write ``codes * scale`` to ``output``.

    Args:
        codes: dense [rows, columns] int8 or e4m3: rows ``first_row``... of a matrix.
        scale: dense float32, one element per block of the whole matrix.
        output: written: dense [rows, columns] float32, bfloat16 or float16.
        block_rows: rows of a block.
        block_columns: columns of a block; ``None``: all.
        first_row: of the matrix that ``scale`` belongs to.
    """
    rows, columns = codes.shape
    assert codes.is_contiguous()
    assert scale.is_contiguous()
    assert output.is_contiguous()
    library().lowbit_dequantize(
        codes.data_ptr(), CODE_TYPES[codes.dtype], rows, columns, first_row, block_rows, block_columns or columns,
        scale.data_ptr(), output.data_ptr(), ELEMENT_TYPES[output.dtype], torch.get_num_threads(),
    )  # fmt: skip


def decode_fp4(packed: torch.Tensor, scale: torch.Tensor, output: torch.Tensor, group_size: int) -> None:
    """Write the values of e2m1 codes times their groups' scales to ``output``.

    Args:
        packed: dense uint8 [rows, columns / 2], the even column in the low nibble.
        scale: dense float32 [rows, ceil(columns / group_size)].
        output: written: dense [rows, columns] float32, bfloat16 or float16.
        group_size: columns of a group, even.
    """
    rows, columns = output.shape
    assert packed.shape == (rows, columns // 2)
    assert scale.shape == (rows, -(-columns // group_size))
    assert packed.is_contiguous()
    assert scale.is_contiguous()
    assert output.is_contiguous()
    library().lowbit_decode_fp4(
        packed.data_ptr(), rows, columns, group_size, scale.data_ptr(), output.data_ptr(),
        ELEMENT_TYPES[output.dtype], torch.get_num_threads(),
    )  # fmt: skip


def scale_product(
    product: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Write ``product * row_scale * column_scale + bias`` to ``output``, rounded once.

    Args:
        product: dense float32 [rows, columns].
        row_scale: dense float32, one element per row; ``None`` together with ``column_scale`` for no scaling.
        column_scale: dense float32, one element per column.
        bias: dense float32, one element per column, or ``None``.
        output: written: [rows, columns] float32, bfloat16 or float16; rows may be apart, columns not.
    """
    rows, columns = product.shape
    assert product.is_contiguous()
    assert output.stride(1) == 1 or columns <= 1
    library().lowbit_scale_product(
        product.data_ptr(), rows, columns, _address(row_scale), _address(column_scale), _address(bias),
        output.data_ptr(), output.stride(0), ELEMENT_TYPES[output.dtype], torch.get_num_threads(),
    )  # fmt: skip


PANEL = 16
"""Output channels that ``int8_product`` computes side by side."""


def int8_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Write ``(x - 128) @ weight.T * x_scale * weight_scale.T + bias`` to ``output``, rounded once.

    Args:
        x: dense uint8 [M, K]; K at most 2**17, so that no sum leaves int32.
        x_scale: dense float32, one element per row.
        weight: dense int8 [N, K]; N a multiple of 16, K of 4.
        weight_scale: dense float32, one element per output channel.
        bias: dense float32, one element per output channel, or ``None``.
        output: written: dense [M, N] float32, bfloat16 or float16.
    """
    rows, depth = x.shape
    features = weight.shape[0]
    assert weight.shape[1] == depth
    assert output.shape == (rows, features)
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert output.is_contiguous()
    library().lowbit_int8_product(
        x.data_ptr(), rows, depth, _address(x_scale), weight.data_ptr(), features, _address(weight_scale),
        _address(bias), output.data_ptr(), ELEMENT_TYPES[output.dtype], torch.get_num_threads(),
    )  # fmt: skip


@dataclass(frozen=True)
class Int8Weight:
    """What ``int8_linears`` multiplies with.

    Attributes:
        weight: dense int8 [N, K]; N a multiple of 16, K of 4.
        weight_scale: dense float32, one element per output channel.
        bias: dense float32, one element per output channel, or ``None``.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None


def int8_linears(
    x: torch.Tensor, weights: Sequence[Int8Weight], outputs: Sequence[torch.Tensor], *, are_gated: bool = False
) -> None:
    """Quantize rows once and multiply them by several weights, as ``quantize`` and ``int8_product`` do.

    It runs where ``int8_product`` does.

    Args:
        x: [M, K] float32, bfloat16 or float16; rows may be apart, columns not; K at most 2**17.
        weights: with K inputs each.
        outputs: written: dense [M, N] for each weight, of the dtype of ``x``.
        are_gated: there are two weights with equal N and one output, silu of the first result times the second, rounded
            once; needs ``has_amx``.
    """
    rows, depth = x.shape
    assert x.stride(1) == 1 or depth <= 1
    assert len(weights) == (2 if are_gated else len(outputs))
    used = [outputs[0]] * 2 if are_gated else outputs
    for entry, output in zip(weights, used, strict=True):
        assert entry.weight.shape[1] == depth
        assert entry.weight.is_contiguous()
        assert output.shape == (rows, entry.weight.shape[0])
        assert output.dtype == x.dtype
        assert output.is_contiguous()
    count = len(weights)
    pointers, sizes = ctypes.c_void_p * count, ctypes.c_int64 * count
    library().lowbit_int8_linears(
        x.data_ptr(), ELEMENT_TYPES[x.dtype], rows, depth, x.stride(0), count,
        pointers(*(entry.weight.data_ptr() for entry in weights)),
        sizes(*(entry.weight.shape[0] for entry in weights)),
        pointers(*(_address(entry.weight_scale) for entry in weights)),
        pointers(*(_address(entry.bias) for entry in weights)),
        pointers(*(output.data_ptr() for output in used)), are_gated, torch.get_num_threads(),
    )  # fmt: skip


LARGEST_HEAD_DIM = 256
ATTENTION_KINDS = {"float32": 0, "int8": 1, "fp8": 2, "int16": 3, "bfloat16": 4}


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor | None,
    output: torch.Tensor,
    scale: float,
    is_causal: bool,
    kind: str,
) -> None:
    """Write attention to ``output``; needs what ``int8_product`` needs.

    Args:
        query: [batch, queries, heads, head_dim] float32, bfloat16 or float16; head_dim at most ``LARGEST_HEAD_DIM``,
            its elements side by side.
        key: [batch, keys, key heads, head_dim], likewise; at least one key, heads a multiple of the key heads.
        value: likewise, like ``key``.
        keep: dense bool [batch, keys], or ``None`` for all.
        output: written: dense, like ``query``.
        scale: of the scores in powers of two.
        is_causal: query i sees the keys 0 ... i.
        kind: a key of ``ATTENTION_KINDS``.
    """
    sizes = (*query.shape[:2], key.shape[1], query.shape[2], key.shape[2], query.shape[3])
    strides = [step for tensor in (query, key, value) for step in tensor.stride()[:3]]
    assert output.is_contiguous()
    assert keep is None or (keep.is_contiguous() and keep.dtype == torch.bool)
    assert all(tensor.stride(3) == 1 for tensor in (query, key, value))
    library().lowbit_attention(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), None if keep is None else keep.data_ptr(),
        output.data_ptr(), ELEMENT_TYPES[query.dtype], _integers(sizes), _integers(strides),
        scale, is_causal, ATTENTION_KINDS[kind], torch.get_num_threads(),
    )  # fmt: skip


MOST_ROWS = 64
"""Rows that ``weight_only_product`` takes."""

ROW_PADDING = 32
INT8_ZERO_COLUMNS = 32
WEIGHT_TYPES = {"int8": 0, "e4m3": 1, "int4": 2, "e2m1": 3}
ZERO_POINTS = {("int4", torch.uint8), ("int8", torch.int16)}
SCALE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.float8_e4m3fn: 3}


@dataclass(frozen=True)
class LowRank:
    """``x @ down @ up.T``, the first product rounded to bfloat16.

    Attributes:
        x: bfloat16 [M, K]; rows may be apart, columns not.
        down: dense bfloat16 [K, rank].
        up: dense bfloat16 [N, rank].
    """

    x: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor


def weight_only_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_type: str,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    block_size: tuple[int, int],
    zero_point: torch.Tensor | None = None,
    outer_scale: torch.Tensor | None = None,
    outer_columns: int = 0,
    low_rank: LowRank | None = None,
) -> None:
    """Write ``x @ ((weight - zero_point) * scale).T + bias`` to ``output``, summed in float32 and rounded once.

    With AVX512-VNNI and an output of 16 bits, up to four rows, of bfloat16 with AMX two, are rounded to integers of
    16 bits with a power of two as scale for each 128, and no weight is rounded. For this K is a multiple of 128 and a
    block all of a row or 16, 32, 64 or 128 columns; of int8 128. e4m3 is never multiplied so. With AMX up to 16 rows of
    bfloat16 by int8, and 3 to 8 by int4, are rounded likewise where N is a multiple of 16, K one of 64 and a block one
    row and all its columns or a multiple of 64.

    Args:
        x: [M, K] float32, M at most ``MOST_ROWS``; each row followed by zeros up to a multiple of ``ROW_PADDING``. For
            int4 in the order of ``w4a16.split_pairs``. Or bfloat16, any M, in its own order, where
            the helper ``multiplies_bfloat16``: then the weight's values are rounded to bfloat16 and the output is
            bfloat16.
        weight: dense int8 or e4m3 [N, K]; int4 or e2m1 as uint8 [N, K / 2]: two in a byte, the even input in the lower
            half.
        weight_type: a key of ``WEIGHT_TYPES``.
        scale: dense, one element per block of the weight: float32, of int4 also bfloat16, else also E8M0 as uint8 and
            e4m3.
        bias: dense float32, one element per output channel, or ``None``.
        output: written: dense [M, N] float32, bfloat16 or float16.
        block_size: rows and columns of a block; of int4 one row and a multiple of 32 columns that divides K, of e2m1
            one row and an even number of columns.
        zero_point: of int4: dense uint8, like ``scale``; ``None``: 8. Of int8 with x of bfloat16 and blocks of one row
            and a multiple of ``INT8_ZERO_COLUMNS``: dense int16; ``None``: 0.
        outer_scale: dense float32, not of int4: multiplied with the scales: [], or [N, ceil(K / outer_columns)].
        outer_columns: that share an outer scale, a multiple of 512; 0: all.
        low_rank: added to the result before it is rounded; only of bfloat16, at most ``MOST_ROWS`` rows, an even K and
            weights of 4 bits.
    """
    rows, depth = x.shape
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert scale.is_contiguous()
    if zero_point is not None:
        assert zero_point.is_contiguous()
        assert zero_point.shape == scale.shape
        assert (weight_type, zero_point.dtype) in ZERO_POINTS
        assert weight_type == "int4" or (x.dtype == torch.bfloat16 and block_size[1] % INT8_ZERO_COLUMNS == 0)
    assert weight_type != "int4" or scale.dtype in (torch.float32, torch.bfloat16)
    assert low_rank is None or weight_type in ("int4", "e2m1")
    outer_scales = output.shape[1] * -(-depth // outer_columns) if outer_columns else 1
    assert outer_scale is None or outer_scale.numel() == outer_scales
    assert outer_columns % 512 == 0
    assert output.is_contiguous()
    arguments = (
        x.data_ptr(), rows, x.stride(0), depth, weight.data_ptr(), WEIGHT_TYPES[weight_type], output.shape[1],
        scale.data_ptr(), SCALE_TYPES[scale.dtype], None if zero_point is None else zero_point.data_ptr(),
        *block_size, _address(outer_scale), outer_columns, _address(bias), output.data_ptr(),
    )  # fmt: skip
    if x.dtype == torch.bfloat16:
        assert output.dtype == torch.bfloat16
        added = (None, 0, None, None, 0) if low_rank is None else _low_rank_arguments(low_rank, rows, depth, output)
        library().lowbit_weight_only_bfloat16(*arguments, *added, torch.get_num_threads())
        return
    assert low_rank is None
    assert x.dtype == torch.float32
    assert rows <= MOST_ROWS
    assert x.stride(0) % ROW_PADDING == 0 or rows <= 1
    library().lowbit_weight_only(*arguments, ELEMENT_TYPES[output.dtype], torch.get_num_threads())


def _low_rank_arguments(
    low_rank: LowRank, rows: int, depth: int, output: torch.Tensor
) -> tuple[int, int, int, int, int]:
    x, down, up = low_rank.x, low_rank.down, low_rank.up
    rank = down.shape[1]
    assert rows <= MOST_ROWS
    assert depth % 2 == 0
    assert x.shape == (rows, depth)
    assert down.shape == (depth, rank)
    assert up.shape == (output.shape[1], rank)
    assert x.dtype == down.dtype == up.dtype == torch.bfloat16
    assert x.stride(1) == 1
    assert down.is_contiguous()
    assert up.is_contiguous()
    return x.data_ptr(), x.stride(0), down.data_ptr(), up.data_ptr(), rank


def decode_int4(
    packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, group_size: int, output: torch.Tensor
) -> None:
    """Write the weight [N, K] that int4 codes stand for to ``output`` float32, its inputs split as activations are.

    Args as of ``weight_only_product``.
    """
    rows, depth = output.shape
    assert packed.is_contiguous()
    assert scale.is_contiguous()
    assert output.is_contiguous()
    library().lowbit_int4_decode(
        packed.data_ptr(), rows, depth, scale.data_ptr(), SCALE_TYPES[scale.dtype],
        None if zero_point is None else zero_point.data_ptr(), group_size, output.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def gguf_decode(raw: torch.Tensor, number: int, output: torch.Tensor) -> None:
    """Write the values of blocks of a GGUF type to ``output``.

    Args:
        raw: dense uint8 [rows, bytes per row].
        number: of the type, see ``lowbit.ops.gguf_types``.
        output: written: dense [rows, columns] float32, bfloat16 or float16.
    """
    assert raw.is_contiguous()
    assert output.is_contiguous()
    assert raw.shape[0] == output.shape[0]
    rows, columns = output.shape
    library().lowbit_gguf_decode(
        raw.data_ptr(), number, rows, columns, raw.shape[1], output.data_ptr(), ELEMENT_TYPES[output.dtype],
        torch.get_num_threads(),
    )  # fmt: skip


def gguf_product(
    x: torch.Tensor, raw: torch.Tensor, number: int, bias: torch.Tensor | None, output: torch.Tensor
) -> None:
    """Write ``x @ weight.T + bias`` to ``output``, summed in float32 and rounded once.

    Few rows are rounded as ``weight_only_product`` does, if K is a multiple of 128.

    Args:
        x: dense float32 [M, K], K a multiple of 32. Or bfloat16, of any K that the type allows, where the helper
            ``multiplies_bfloat16``: then the weight's values are rounded to bfloat16 and the output is bfloat16.
        raw: dense uint8 [N, bytes per row].
        number: of the type, see ``lowbit.ops.gguf_types``.
        bias: dense float32, one element per output channel, or ``None``.
        output: written: dense [M, N] float32, bfloat16 or float16.
    """
    assert x.is_contiguous()
    assert raw.is_contiguous()
    assert output.is_contiguous()
    assert output.shape == (x.shape[0], raw.shape[0])
    arguments = (x.data_ptr(), *x.shape, raw.data_ptr(), number, *raw.shape, _address(bias), output.data_ptr())
    if x.dtype == torch.bfloat16:
        assert output.dtype == torch.bfloat16
        library().lowbit_gguf_product_bfloat16(*arguments, torch.get_num_threads())
    else:
        assert x.dtype == torch.float32
        library().lowbit_gguf_product(*arguments, ELEMENT_TYPES[output.dtype], torch.get_num_threads())


LARGEST_NORMALIZED = 8192
"""Width that ``normalize`` takes at most."""


def normalize(
    x: torch.Tensor,
    epsilon: float | None,
    weight: torch.Tensor | None,
    frequencies: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Write ``x`` normalized and rotated to ``output``; see ``lowbit.ops.elementwise``.

    Args:
        x: dense [batch, tokens, heads, width] float32, bfloat16 or float16; width at most ``LARGEST_NORMALIZED``.
        epsilon: added to the mean square; ``None`` leaves it undivided.
        weight: dense float32 [width], or ``None``.
        frequencies: dense float32 [batch or 1, tokens, width / 2, 2], or ``None``.
        output: written: dense, like ``x``.
    """
    *positions, heads, width = x.shape
    assert x.is_contiguous()
    assert output.is_contiguous()
    assert output.shape == x.shape
    assert output.dtype == x.dtype
    if frequencies is not None:
        positions = [*frequencies.shape[:2]]
    library().lowbit_normalize(
        x.data_ptr(), ELEMENT_TYPES[x.dtype], x.numel() // width, width, epsilon is not None, epsilon or 0.0,
        _address(weight), _address(frequencies), heads, math.prod(positions), output.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def gate(x: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
    """Write ``silu(x) * value`` to ``output``: all dense, of one shape, float32, bfloat16 or float16."""
    assert x.shape == value.shape == output.shape
    assert x.dtype == value.dtype == output.dtype
    assert x.is_contiguous()
    assert value.is_contiguous()
    assert output.is_contiguous()
    library().lowbit_gate(
        x.data_ptr(), value.data_ptr(), ELEMENT_TYPES[x.dtype], x.numel(), output.data_ptr(), torch.get_num_threads()
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    assert tensor.dtype == torch.float32
    return tensor.data_ptr()


def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)
