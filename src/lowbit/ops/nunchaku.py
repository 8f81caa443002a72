"""nunchaku's order of weights in memory, and its inverse: tensors of its checkpoints to row-major ones.

nunchaku stores what each lane of a warp loads together, for tiles of 128 output and 64 input channels
(``NunchakuWeightPacker`` in ``nunchaku/lora/flux/packer.py`` and in deepcompressor's ``backend/nunchaku/utils.py``;
the layers of 16-bit activations: ``pack_w4`` in deepcompressor's ``backend/tinychat/utils.py``). The shapes of the
packed tensors are those of the row-major ones, their elements in another order; sizes are padded to whole tiles.
"""

from __future__ import annotations

import torch

TILE_ROWS = 128
TILE_COLUMNS = 64
LOW_RANK_TILE = 16
AWQ_GROUP_SIZE = 64
# What nunchaku's int4 kernels add to the output of GELU, so that it can be rounded to unsigned numbers.
GELU_SHIFT = 0.171875


def unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    """Return ``qweight`` int8 [N, K / 2] row-major: column 2 * i in the lower, 2 * i + 1 in the upper half of byte i.

    Args:
        packed: int8 [N, K / 2] as stored; 128 divides N and K.

    Raises:
        ValueError: the shape is not whole tiles.
    """
    rows, half = packed.shape
    if rows % TILE_ROWS or half % TILE_COLUMNS:
        raise ValueError(f"qweight {list(packed.shape)} is not whole tiles of {TILE_ROWS} x {TILE_COLUMNS} bytes")
    # tile row, tile column, pack of 16 rows, row of 8, lane of 4 columns, half of the 16 rows, half of the 64 columns,
    # byte of a lane's 8 columns
    lanes = packed.reshape(rows // TILE_ROWS, half // (TILE_COLUMNS // 2), 8, 8, 4, 2, 2, 4)
    return lanes.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(rows, half)


def unpack_scales(packed: torch.Tensor) -> torch.Tensor:
    """Return 16-bit ``wscales`` [G, N] as stored as [G, N] row-major; 128 divides N. Of vectors [N]: G = 1.

    Raises:
        ValueError: N is not whole tiles.
    """
    rows = _whole(packed.shape[-1], TILE_ROWS, "rows of scales")
    groups = packed.numel() // rows
    # tile, group, pack of 16 rows, one of 4 lanes, half of the 16 rows, one of 2 rows
    lanes = packed.reshape(rows // TILE_ROWS, groups, 8, 4, 2, 2)
    return lanes.permute(1, 0, 2, 4, 3, 5).reshape(packed.shape)


def unpack_micro_scales(packed: torch.Tensor) -> torch.Tensor:
    """Return 8-bit ``wscales`` [K / 16, N] as stored as [K / 16, N] row-major; 128 divides N, 64 divides K.

    Raises:
        ValueError: the shape is not whole tiles.
    """
    groups, rows = packed.shape
    _whole(rows, TILE_ROWS, "rows of scales")
    tiles = _whole(groups, 4, "groups") // 4
    # tile row, tile column, one of 8 rows, one of 4 such, one of 4 of those, group of 4
    lanes = packed.view(torch.uint8).reshape(rows // TILE_ROWS, tiles, 8, 4, 4, 4)
    return lanes.permute(1, 5, 0, 4, 3, 2).reshape(groups, rows).view(packed.dtype)


def unpack_low_rank(packed: torch.Tensor, down: bool) -> torch.Tensor:
    """Return ``proj_down`` [K, r] or ``proj_up`` [N, r] as stored, row-major; 16 divides both extents.

    Args:
        packed: as stored, 16-bit.
        down: it is ``proj_down``.

    Raises:
        ValueError: the shape is not whole tiles.
    """
    channels, rank = packed.shape
    _whole(channels, LOW_RANK_TILE, "channels of the low-rank factors")
    _whole(rank, LOW_RANK_TILE, "rank")
    # tile of channels, tile of ranks, row of 8, lane of 4, half of the rows, half of the columns, one of 2 columns
    lanes = packed.reshape(channels // LOW_RANK_TILE, rank // LOW_RANK_TILE, 8, 4, 2, 2, 2)
    # The rows of a tile are ranks in proj_down, channels in proj_up.
    tiles = lanes.permute(0, 1, 4, 2, 5, 3, 6).reshape(*lanes.shape[:2], LOW_RANK_TILE, LOW_RANK_TILE)
    return tiles.permute((0, 3, 1, 2) if down else (0, 2, 1, 3)).reshape(channels, rank)


def awq_dequantize(qweight: torch.Tensor, wscales: torch.Tensor, wzeros: torch.Tensor) -> torch.Tensor:
    """Return the float32 weight [N, K] of a layer with 16-bit activations: ``code * wscales + wzeros``.

    Args:
        qweight: int32 [N / 4, K / 2] as stored: words of 16 bits hold codes 8 columns apart, lowest first; the words
            of 4 rows alternate every 64 columns. 64 divides K.
        wscales: [G, N] with G >= K / 64; those beyond are padding.
        wzeros: as ``wscales``.

    Raises:
        ValueError: the shapes don't fit.
    """
    rows, columns = 4 * qweight.shape[0], 2 * qweight.shape[1]
    groups = _whole(columns, AWQ_GROUP_SIZE, "columns") // AWQ_GROUP_SIZE
    for scales in (wscales, wzeros):
        if scales.ndim != 2 or scales.shape[0] < groups or scales.shape[1] != rows:
            raise ValueError(f"scales {list(scales.shape)} don't fit a weight [{rows}, {columns}]")
    words = qweight.view(torch.int16).reshape(rows // 4, columns // 64, 4, 2, 8).permute(0, 2, 1, 3, 4)
    codes = (words.to(torch.int32).unsqueeze(-2) >> torch.tensor([[0], [4], [8], [12]])) & 15
    values = codes.reshape(rows, groups, AWQ_GROUP_SIZE).float()
    scale, zero = (scales[:groups].t().float().unsqueeze(-1) for scales in (wscales, wzeros))
    weight: torch.Tensor = (values * scale + zero).flatten(1)
    return weight


def split_modulation(
    weight: torch.Tensor, bias: torch.Tensor | None, parts: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a modulation layer's weight [N, K] and bias [N] in the order of the original: part after part.

    nunchaku interleaves the rows of the parts (shift, scale, gate; once or twice) and adds one to the bias of the
    scales (``convert_to_nunchaku_w4x16_linear_weight`` with ``adanorm_splits``).

    Args:
        weight: as nunchaku has it.
        bias: likewise, or ``None``.
        parts: 3 or 6.
    """
    rows = _whole(weight.shape[0], parts, "rows of a modulation layer")
    weight = weight.reshape(rows // parts, parts, -1).transpose(0, 1).reshape(weight.shape)
    if bias is None:
        return weight, None
    added = torch.zeros(parts)
    added[1] = added[-2] = 1
    return weight, (bias.float().reshape(-1, parts) - added).t().flatten()


def _whole(extent: int, multiple: int, what: str) -> int:
    if extent % multiple or extent == 0:
        raise ValueError(f"{extent} {what}: not a multiple of {multiple}")
    return extent
