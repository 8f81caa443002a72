"""nunchaku's packing of weights, written from its definition: for every element of a packed tensor, where it is from.

The definition is ``NunchakuWeightPacker`` (``nunchaku/lora/flux/packer.py``; bits=4, warp_n=128) with the conversions
in deepcompressor (``deepcompressor/backend/nunchaku/utils.py`` and ``backend/tinychat/utils.py``). Here it is done by
index arithmetic, element by element, where those permute views.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch


def padded(values: torch.Tensor, multiples: tuple[int, ...], fill: float = 0) -> torch.Tensor:
    shape = [-(-extent // multiple) * multiple for extent, multiple in zip(values.shape, multiples, strict=True)]
    result = torch.full(shape, fill, dtype=values.dtype)
    result[tuple(slice(0, extent) for extent in values.shape)] = values
    return result


@cache
def weight_order() -> np.ndarray:
    """Row and column of every nibble of a tile of 128 x 64, [1024 words, 8, 2].

    Pack of 16 rows, 8 rows, 4 lanes, half of the pack's rows, half of the columns; a 32-bit word holds 8 columns.
    """
    return np.array(
        [
            [(16 * pack + 8 * row_half + row, 32 * column_half + 8 * lane + i) for i in range(8)]
            for pack, row, lane, row_half, column_half in itertools.product(
                range(8), range(8), range(4), range(2), range(2)
            )
        ]
    )


def pack_weight(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 15 (of int4: two's complement), [N, K], to int8 [N', K' / 2]: tile after tile, row of tiles by row."""
    codes = padded(codes.to(torch.int64), (128, 128))
    rows, columns = codes.shape
    source, order = codes.numpy() & 15, weight_order()
    words = [
        (source[128 * n + order[..., 0], 64 * k + order[..., 1]] << np.arange(0, 32, 4)).sum(axis=1)
        for n, k in itertools.product(range(rows // 128), range(columns // 64))
    ]
    packed = np.concatenate(words).astype("<u4").view(np.int8)
    return torch.from_numpy(packed.copy()).reshape(rows, columns // 2)


def scale_order() -> Iterator[int]:
    """Rows of a tile of 128 in the order 0 1 8 9, 2 3 10 11, ..., 16 17 24 25, ... of the comment in pack_scale."""
    for lane in range(32):
        base = 16 * (lane // 4) + 2 * (lane % 4)
        yield from (base, base + 1, base + 8, base + 9)


def pack_scale(scale: torch.Tensor, fill: float = 1) -> torch.Tensor:
    """16-bit scales [N, G] to [G', N'], vectors [N] to [N']; G padded to a multiple of 2."""
    is_vector = scale.ndim == 1
    scale = padded(scale.unsqueeze(1), (128, 1), fill) if is_vector else padded(scale, (128, 2), fill)
    rows, groups = scale.shape
    order = torch.tensor(list(scale_order()))
    flat = [scale[128 * n + order, g] for n in range(rows // 128) for g in range(groups)]
    packed = torch.cat(flat)
    return packed if is_vector else packed.reshape(groups, rows)


def pack_micro_scale(scale: torch.Tensor) -> torch.Tensor:
    """e4m3 scales [N, K / 16] to [K' / 16, N']: lane by lane 0 32 64 96, 8 40 72 104, ..., 4 groups at a time."""
    values = padded(scale.view(torch.uint8), (128, 4), fill=56)  # 1.0
    rows, groups = values.shape
    order = torch.tensor(
        [32 * s + 8 * quarter + eighth for eighth in range(8) for quarter in range(4) for s in range(4)]
    )
    flat = [
        values[128 * n + order, 4 * k : 4 * k + 4].flatten()
        for n, k in itertools.product(range(rows // 128), range(groups // 4))
    ]
    return torch.cat(flat).reshape(groups, rows).view(torch.float8_e4m3fn)


def pack_low_rank(factor: torch.Tensor, down: bool) -> torch.Tensor:
    """proj_down [r, K] to [K', r], proj_up [N, r] to [N', r]: fragments of 16 x 16."""
    factor = padded(factor, (16, 128) if down else (128, 16))
    rows, columns = factor.shape
    channels, rank = (columns, rows) if down else (rows, columns)
    order = [
        (8 * row_half + row, 8 * column_half + 2 * lane + pair)
        for row, lane, row_half, column_half, pair in itertools.product(
            range(8), range(4), range(2), range(2), range(2)
        )
    ]
    i, j = torch.tensor(order).t()
    flat = [
        factor[16 * r + i, 16 * c + j] if down else factor[16 * c + i, 16 * r + j]
        for c, r in itertools.product(range(channels // 16), range(rank // 16))
    ]
    return torch.cat(flat).reshape(channels, rank)


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 15, [N, K], to int32 [N / 4, K / 2] (pack_w4)."""
    rows, columns = codes.shape
    source = codes.numpy().astype(np.int64)
    words = np.zeros((rows // 4, columns), dtype=np.int64)
    # Blocks of 64 columns of 4 rows lie one after the other; a 16-bit word b of 32 columns holds columns b, b + 8,
    # b + 16 and b + 24.
    for block, column in itertools.product(range(rows // 4), range(columns)):
        row = 4 * block + column // 16 % 4
        start = 64 * (column // 64) + 32 * (column % 16 // 8) + column % 8
        words[block, column] = sum(int(source[row, start + 8 * i]) << (4 * i) for i in range(4))
    return torch.from_numpy(words.astype("<u2").view("<i4").copy())


def interleave(values: torch.Tensor, parts: int) -> torch.Tensor:
    """Row i of part p to row i * parts + p (adanorm_splits)."""
    height = values.shape[0] // parts
    return torch.stack([values[p * height + i] for i in range(height) for p in range(parts)])
