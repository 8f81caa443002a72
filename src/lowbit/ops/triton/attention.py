"""Attention in int8 or e4m3 in Triton: a kernel that quantizes keys and values, one that does the rest.

The layout is chosen for the products: keys lie as [keys, head_dim], values transposed, as [head_dim, keys], because
tensor cores take 8-bit operands along the depth of the product only. Tensor cores multiply int8 by int8: the softmax,
0 ... 255, is multiplied less 128, and 128 times the sum of the block's values, known beforehand, is added: exact.

Where the chip has no e4m3 in the OCP encoding (SM 8.0, gfx942, XPU) codes are decoded to float16, which is exact: it
saves memory traffic, products run at float16's rate.
"""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lowbit.errors import UnsupportedError
from lowbit.ops import attention as reference
from lowbit.ops.attention import KINDS, LOG2_E, AttentionProblem
from lowbit.ops.triton.launch import Target, device_refusal, on_device_of, target_of
from lowbit.ops.triton.quantize_rows import as_written, encoding_of
from lowbit.ops.triton.rounding import (
    E4M3_MAX,
    E4M3_SOFTWARE,
    INT8,
    INT8_MAX,
    ROUNDER,
    decode_e4m3,
    encode,
    magnitude_bits,
    scale_of,
)
from lowbit.ops.triton.tiles import Tile

CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST_HEAD_DIM = 128  # wider ones don't fit the registers
BLOCK_KEYS = tl.constexpr(reference.BLOCK_KEYS)
NO_SCORE = tl.constexpr(-1e30)  # of a row that has no key yet; finite, so that differences are


@triton.jit
def _largest(ENCODING: tl.constexpr) -> tl.constexpr:
    return INT8_MAX if ENCODING == INT8 else E4M3_MAX


@triton.jit
def quantize_keys_kernel(
    key: tl.tensor,
    value: tl.tensor,
    key_mean: tl.tensor,
    value_mean: tl.tensor,
    mask: tl.tensor,
    key_codes: tl.tensor,
    key_scale: tl.tensor,
    value_codes: tl.tensor,
    value_scale: tl.tensor,
    value_sum: tl.tensor,
    keys: tl.tensor,
    width: tl.tensor,
    key_batch: tl.tensor,
    key_token: tl.tensor,
    key_head: tl.tensor,
    value_batch: tl.tensor,
    value_token: tl.tensor,
    value_head: tl.tensor,
    ENCODING: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Quantize a block of 64 keys and values of one head, less their means.

    key, value: [batch, keys, heads, width] with their strides; means: float32 [batch, heads, width]; mask: uint8
    [batch, keys] or None. Written: key_codes [batch, heads, blocks * 64, BLOCK_D], key_scale float32 [batch, heads,
    blocks * 64], value_codes [batch, heads, BLOCK_D, blocks * 64], value_scale float32 and value_sum (int32: 128 times
    the sum of the codes; int8 only) [batch, heads, blocks, BLOCK_D].
    """
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    unit = batch.to(tl.int64) * tl.num_programs(1) + head
    all_keys = tl.num_programs(0) * BLOCK_KEYS
    rows = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    columns = tl.arange(0, BLOCK_D)
    keep = rows < keys
    if mask is not None:
        keep = keep & (tl.load(mask + batch.to(tl.int64) * keys + rows, mask=keep, other=0) != 0)
    inside = keep[:, None] & (columns[None, :] < width)
    token = rows.to(tl.int64)[:, None]
    origin = key + batch.to(tl.int64) * key_batch + head.to(tl.int64) * key_head
    values = tl.load(origin + token * key_token + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(key_mean + unit * width + columns, mask=columns < width, other=0.0)
    values = tl.where(inside, values - mean[None, :], 0.0)
    scale = scale_of(tl.max(magnitude_bits(values), 1), _largest(ENCODING))
    codes = encode(tl.math.div_rn(values, scale[:, None]), ENCODING)
    tl.store(key_codes + (unit * all_keys + token) * BLOCK_D + columns[None, :], codes)
    tl.store(key_scale + unit * all_keys + rows, scale)
    origin = value + batch.to(tl.int64) * value_batch + head.to(tl.int64) * value_head
    values = tl.load(origin + token * value_token + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(value_mean + unit * width + columns, mask=columns < width, other=0.0)
    values = tl.where(inside, values - mean[None, :], 0.0)
    scale = scale_of(tl.max(magnitude_bits(values), 0), _largest(ENCODING))
    codes = encode(tl.math.div_rn(values, scale[None, :]), ENCODING)
    tl.store(value_codes + (unit * BLOCK_D + columns[None, :]) * all_keys + token, codes)
    channels = (unit * tl.num_programs(0) + block) * BLOCK_D + columns
    tl.store(value_scale + channels, scale)
    if ENCODING == INT8:
        tl.store(value_sum + channels, tl.sum(codes.to(tl.int32), 0) * 128)


@triton.jit
def _operand(codes: tl.tensor, ENCODING: tl.constexpr) -> tl.tensor:
    """Return codes as products take them."""
    return decode_e4m3(codes) if ENCODING == E4M3_SOFTWARE else codes


@triton.jit
def _multiply(left: tl.tensor, right: tl.tensor, ENCODING: tl.constexpr) -> tl.tensor:
    """Return the product, exact in int32 or accumulated in float32."""
    if ENCODING == INT8:
        return tl.dot(left, right, out_dtype=tl.int32)
    else:
        return tl.dot(left, right, out_dtype=tl.float32)


@triton.jit
def _soften(
    scores: tl.tensor,
    mask: tl.tensor,
    batch: tl.tensor,
    columns: tl.tensor,
    keys: tl.tensor,
    rows: tl.tensor,
    IS_CAUSAL: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
) -> tl.tensor:
    """Return powers of two relative to the highest score of each row among the keys (``columns``) that are there."""
    if IS_CAUSAL or not EVEN_KEYS or mask is not None:
        there = columns < keys
        if mask is not None:
            there = there & (tl.load(mask + batch * keys + columns, mask=there, other=0) != 0)
        keep = there[None, :]
        if IS_CAUSAL:
            keep = keep & (columns[None, :] <= rows[:, None])
        scores = tl.where(keep, scores, NO_SCORE)
        top = tl.max(scores, 1)
        return tl.where(keep, tl.math.exp2(scores - top[:, None]), 0.0), top
    else:
        top = tl.max(scores, 1)
        return tl.math.exp2(scores - top[:, None]), top


@triton.jit
def _weigh(powers: tl.tensor, value_codes: tl.tensor, value_sum: tl.tensor, ENCODING: tl.constexpr) -> tl.tensor:
    """Round the softmax and return its product with the block's values, float32, and its rows' sums."""
    if ENCODING == INT8:
        rounded = (powers * 255.0 + ROUNDER) - ROUNDER
        product = _multiply((rounded - 128.0).to(tl.int8), value_codes, ENCODING)
        return (product + tl.load(value_sum)[None, :]).to(tl.float32), tl.sum(rounded, 1)
    else:
        codes = _operand(encode(powers * 448.0, ENCODING), ENCODING)
        return _multiply(codes, _operand(value_codes, ENCODING), ENCODING), tl.sum(codes.to(tl.float32), 1)


@triton.jit
def attention_kernel(
    query: tl.tensor,
    key_codes: tl.tensor,
    key_scale: tl.tensor,
    value_codes: tl.tensor,
    value_scale: tl.tensor,
    value_sum: tl.tensor,
    value_mean: tl.tensor,
    poison: tl.tensor,
    mask: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    key_heads: tl.tensor,
    width: tl.tensor,
    query_batch: tl.tensor,
    query_token: tl.tensor,
    query_head: tl.tensor,
    IS_CAUSAL: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    ENCODING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Compute BLOCK_M rows of one head.

    query: [batch, queries, heads, width] with its strides; what ``quantize_keys_kernel`` wrote; value_mean: float32
    [batch, key heads, width]; poison: float32 [batch, key heads], NaN where keys are not finite; mask: uint8
    [batch, keys] or None; out: [batch, queries, heads, width], dense. EVEN_KEYS: 64 divides keys.
    """
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    unit = batch * key_heads + head // (heads // key_heads)
    blocks = tl.cdiv(keys, BLOCK_KEYS)
    all_keys = blocks * BLOCK_KEYS
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    offsets = tl.arange(0, BLOCK_KEYS)
    inside = (rows < queries)[:, None] & (columns < width)[None, :]
    origin = query + batch * query_batch + head.to(tl.int64) * query_head
    values = tl.load(origin + rows.to(tl.int64)[:, None] * query_token + columns[None, :], mask=inside, other=0.0)
    values = values.to(tl.float32)
    step = scale_of(tl.max(magnitude_bits(values), 1), _largest(ENCODING))
    left = _operand(encode(tl.math.div_rn(values, step[:, None]), ENCODING), ENCODING)
    factor = step * scale
    key_pointers = key_codes + unit * all_keys * BLOCK_D + offsets[None, :] * BLOCK_D + columns[:, None]
    value_pointers = (
        value_codes + unit * BLOCK_D * all_keys + columns[None, :].to(tl.int64) * all_keys + offsets[:, None]
    )
    channels = unit * blocks * BLOCK_D + columns
    highest = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = keys
    if IS_CAUSAL:
        end = tl.minimum(keys, (tl.program_id(0) + 1) * BLOCK_M)
    for start in range(0, end, BLOCK_KEYS):
        scores = _multiply(left, _operand(tl.load(key_pointers), ENCODING), ENCODING).to(tl.float32)
        scores = scores * factor[:, None] * tl.load(key_scale + unit * all_keys + start + offsets)[None, :]
        powers, top = _soften(scores, mask, batch, start + offsets, keys, rows, IS_CAUSAL, EVEN_KEYS)
        now = tl.maximum(highest, top)
        before = tl.math.exp2(highest - now)
        here = tl.math.exp2(top - now)
        product, block_total = _weigh(powers, tl.load(value_pointers), value_sum + channels, ENCODING)
        product = product * tl.load(value_scale + channels)[None, :]
        sums = sums * before[:, None] + product * here[:, None]
        total = total * before + block_total * here
        highest = now
        key_pointers += BLOCK_KEYS * BLOCK_D
        value_pointers += BLOCK_KEYS
        channels += BLOCK_D
    empty = total == 0.0
    mean = tl.load(value_mean + unit * width + columns, mask=columns < width, other=0.0)
    # Zero, or NaN where a query, a key or a score is not finite; comparisons drop it from all else.
    bad = (step - step) + (highest - highest) + tl.load(poison + unit)
    result = sums / tl.where(empty, 1.0, total)[:, None] + mean[None, :]
    result = tl.where(empty[:, None], 0.0, result) + bad[:, None]
    place = (batch * queries + rows.to(tl.int64)) * heads + head
    tl.store(out + place[:, None] * width + columns[None, :], result.to(out.dtype.element_ty), mask=inside)


def tile_for(target: Target) -> Tile:
    """Return the tile's block_m and launch options: without spills for heads of 128; not measured.

    A thread holds its share of the scores, of the block's product and of the sums: of 64 x (64 + 2 x 128) numbers 80
    registers with 8 warps. With 128 rows it would be 160, which leaves too few for the rest.
    """
    if target.backend == "interpreter":
        return Tile(32, 64, 64, num_warps=1, num_stages=1)
    if target.backend == "hip":
        return Tile(64, 64, 64, num_warps=4, num_stages=2)
    return Tile(64, 64, 64, num_warps=8, num_stages=3)


def can_run(problem: AttentionProblem) -> str | None:
    """Return why the kernels here can't run ``problem``, or ``None``."""
    if problem.kind not in KINDS:
        return "quantizes: unquantized attention is torch's"
    refusal = device_refusal(problem.device, problem.dtype)
    if refusal is not None:
        return refusal
    target = target_of(problem.device)
    if target.backend == "cuda" and int(target.arch) < 80:
        return f"Triton's int8 products need SM 8.0 (this is {target})"
    if problem.head_dim is not None and problem.head_dim > LARGEST_HEAD_DIM:
        return _too_wide(problem.head_dim)
    return None


def _too_wide(width: int) -> str:
    return f"heads are at most {LARGEST_HEAD_DIM} wide, not {width}"


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
    """Compute attention in 8 bits; arguments and result as in ``lowbit.ops.attention.attention``."""
    query, key, value = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key, value))
    batch, queries, heads, width = query.shape
    if width > LARGEST_HEAD_DIM:
        raise UnsupportedError(f"attention can't be computed: {_too_wide(width)}")
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    key_mean, value_mean = _mean(key, key_mask), _mean(value, key_mask)
    poison = (key_mean - key_mean).sum(dim=-1)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    encoding = encoding_of(CODE_DTYPES[kind], query.device)
    block_d = max(triton.next_power_of_2(width), 32)
    tile = tile_for(target_of(query.device))
    with on_device_of(query):
        prepared = _quantize_keys(key, value, key_mean, value_mean, mask, kind, encoding, block_d)
        attention_kernel[(-(-queries // tile.block_m), heads, batch)](
            query,
            *prepared,
            value_mean,
            poison,
            mask,
            out,
            scale * LOG2_E,
            queries,
            key.shape[1],
            key.shape[2],
            width,
            *query.stride()[:3],
            IS_CAUSAL=is_causal,
            EVEN_KEYS=key.shape[1] % reference.BLOCK_KEYS == 0,
            ENCODING=encoding,
            BLOCK_M=tile.block_m,
            BLOCK_D=block_d,
            **tile.options(),
        )
    return out


def _quantize_keys(
    key: torch.Tensor,
    value: torch.Tensor,
    key_mean: torch.Tensor,
    value_mean: torch.Tensor,
    mask: torch.Tensor | None,
    kind: str,
    encoding: int,
    block_d: int,
) -> tuple[torch.Tensor, ...]:
    """Return codes and scales of keys and values, and the sums of values, as ``quantize_keys_kernel`` writes them."""
    batch, keys, heads, width = key.shape
    blocks = -(-keys // reference.BLOCK_KEYS)
    whole = blocks * reference.BLOCK_KEYS
    unit, device = (batch, heads), key.device
    key_codes = torch.empty((*unit, whole, block_d), dtype=CODE_DTYPES[kind], device=device)
    value_codes = torch.empty((*unit, block_d, whole), dtype=CODE_DTYPES[kind], device=device)
    key_scale = torch.empty((*unit, whole), dtype=torch.float32, device=device)
    value_scale = torch.empty((*unit, blocks, block_d), dtype=torch.float32, device=device)
    value_sum = torch.empty((*unit, blocks, block_d) if kind == "int8" else (1,), dtype=torch.int32, device=device)
    written = (as_written(key_codes, encoding), key_scale, as_written(value_codes, encoding), value_scale, value_sum)
    quantize_keys_kernel[(blocks, heads, batch)](
        key,
        value,
        key_mean,
        value_mean,
        mask,
        *written,
        keys,
        width,
        *key.stride()[:3],
        *value.stride()[:3],
        ENCODING=encoding,
        BLOCK_D=block_d,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return written


def _mean(tensor: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Return float32 [batch, heads, head_dim], the mean over the kept tokens of [batch, tokens, heads, head_dim]."""
    if key_mask is None:
        return tensor.mean(dim=1, dtype=torch.float32)
    keep = key_mask[:, :, None, None]
    count = keep.sum(dim=1).clamp(min=1)
    return tensor.where(keep, 0.0).sum(dim=1, dtype=torch.float32) / count
