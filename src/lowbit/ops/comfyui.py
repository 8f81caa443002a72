"""ComfyUI's weights as its files have them (comfy-kitchen's ``tensor`` and ``backends/eager/quantization.py``).

===================  ===================================  ==============================================================
format               weight                               scales
===================  ===================================  ==============================================================
``float8_e4m3fn``    e4m3 [N, K]                          ``weight_scale`` float32 [], [N] or [N, 1]
``int8_tensorwise``  int8 [N, K]; with "convrot" rotated  ``weight_scale`` float32 [], [N] or [N, 1]
``nvfp4``            uint8 [N, K / 2], even column high   ``weight_scale`` e4m3, blocked; ``weight_scale_2`` float32 []
``mxfp8``            e4m3 [N, K]                          ``weight_scale`` E8M0 uint8, blocked
===================  ===================================  ==============================================================

N and K of nvfp4 are padded to multiples of 16, of mxfp8 to those of 32. Blocked scales are in the order that cuBLAS
reads, tiles of 128 rows and 4 groups: 32 lines of 16 bytes, line i holding rows i, i + 32, i + 64 and i + 96 of 4
groups each (https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout). Rows are padded to a
multiple of 128, groups to one of 4.
"""

from __future__ import annotations

import torch

from lowbit.ops.fp8 import E4M3
from lowbit.ops.mx import GROUP_SIZE as MX_GROUP_SIZE
from lowbit.ops.mx import dequantize_mx
from lowbit.ops.nvfp4 import GROUP_SIZE as NVFP4_GROUP_SIZE
from lowbit.ops.nvfp4 import dequantize_nvfp4
from lowbit.ops.rotation import hadamard, rotate

ROWS, GROUPS = 128, 4


def blocked_shape(rows: int, groups: int) -> tuple[int, int]:
    """Return the shape of blocked scales for [rows, groups]."""
    return -(-rows // ROWS) * ROWS, -(-groups // GROUPS) * GROUPS


def to_blocked(scales: torch.Tensor) -> torch.Tensor:
    """Return scales [rows, groups] of 8 bits in that order, padded with zeros: shape ``blocked_shape``."""
    shape = blocked_shape(*scales.shape)
    padded = scales.new_zeros(shape, dtype=torch.uint8)
    padded[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
    tiles = padded.reshape(shape[0] // ROWS, 4, 32, shape[1] // GROUPS, GROUPS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(shape).view(scales.dtype)


def from_blocked(blocked: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """Return the scales [rows, groups] of blocked ones of 8 bits, of any shape with ``blocked_shape``'s elements.

    Raises:
        ValueError: they have another number of elements.
    """
    shape = blocked_shape(rows, groups)
    if blocked.numel() != shape[0] * shape[1]:
        raise ValueError(f"blocked scales of {rows} rows and {groups} groups are {list(shape)}, not {blocked.numel()}")
    tiles = blocked.view(torch.uint8).reshape(shape[0] // ROWS, shape[1] // GROUPS, 32, 4, GROUPS)
    scales = tiles.permute(0, 3, 2, 1, 4).reshape(shape)[:rows, :groups].contiguous()
    return scales.view(blocked.dtype)


def swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return bytes (uint8) with their halves exchanged: codes whose first is in the upper half, and back."""
    return (packed << 4) | (packed >> 4)


def comfyui_dequantize(
    weight_format: str,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor | None = None,
    rotation: int | None = None,
) -> torch.Tensor:
    """Return the float32 weight [N, K], padding included, of tensors as the table above has them.

    Args:
        weight_format: of the table.
        weight: as stored.
        weight_scale: as stored.
        weight_scale_2: of nvfp4.
        rotation: size of the groups that "convrot" rotated; the result is not rotated.

    Raises:
        ValueError: shapes that don't fit, or an unknown format.
    """
    rows = weight.shape[0]
    if weight_format == "nvfp4" and weight_scale_2 is not None:
        scale = from_blocked(weight_scale, rows, -(-2 * weight.shape[1] // NVFP4_GROUP_SIZE))
        return dequantize_nvfp4(swap_nibbles(weight), scale.view(E4M3), weight_scale_2.float().reshape(()))
    if weight_format == "mxfp8":
        scale = from_blocked(weight_scale, rows, -(-weight.shape[1] // MX_GROUP_SIZE))
        return dequantize_mx(weight, scale.view(torch.uint8))
    if weight_format not in ("float8_e4m3fn", "int8_tensorwise"):
        raise ValueError(f"no weight format {weight_format!r}")
    values = weight.float() * weight_scale.float().reshape(-1, 1)
    return values if rotation is None else rotate(values, hadamard(rotation, device=weight.device))
