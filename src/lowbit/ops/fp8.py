"""FP8 W8A8 in e4m3 (the OCP 8-bit floating point specification's E4M3: finite, largest value 448, no infinity).

The reference here defines the numbers. With ``absmax`` taken over a token, a group of columns or a block::

    scale = max(absmax, 1e-30) / 448             float32
    q     = e4m3(clamp(x / scale, -448, 448))    round to nearest, ties to even

and the product is made from ``q * scale`` on both sides, accumulated in float32. NaN and infinity in a row give NaN in
that row of the result.

The shapes of scales:

===========  ======================  ===================================
what         activations [M, K]      weights [N, K]
===========  ======================  ===================================
per tensor   []                      []
per row      [M, 1] (token)          [N, 1] (output channel)
per block    [M, ceil(K / columns)]  [ceil(N / rows), ceil(K / columns)]
===========  ======================  ===================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowbit.ops.canonical import can_run, prepare, restore
from lowbit.ops.dispatch import ANY_DEVICE, Implementation
from lowbit.ops.library import define_operator, register_kernel_lazily
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_ABSMAX = 1e-30

_WEIGHT_ONLY = "no FP8 matrix product here: weights are stored in FP8, products made in the activations' precision"

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("triton", "lowbit.ops.triton.fp8", frozenset({"cuda", "xpu"}), capabilities=frozenset({"joint"})),
    Implementation("weight_only", "lowbit.ops.cpu.fp8", frozenset({"cpu"}), slow=_WEIGHT_ONLY, is_weight_only=True),
    Implementation(
        "weight_only",
        "lowbit.ops.triton.fp8_weight_only",
        frozenset({"cuda", "xpu"}),
        slow=_WEIGHT_ONLY,
        is_weight_only=True,
    ),
    Implementation("weight_only", "lowbit.ops.fp8_weight_only", ANY_DEVICE, slow=_WEIGHT_ONLY, is_weight_only=True),
    Implementation("reference", "lowbit.ops.fp8", ANY_DEVICE, automatic=False),
)


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Convert float32 to e4m3: saturating for finite values, NaN for NaN and infinity (same shape)."""
    saturated = values.clamp(-E4M3_MAX, E4M3_MAX)
    return torch.where(torch.isfinite(values), saturated, torch.nan).to(E4M3)


def quantize_fp8_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x``.

    Args:
        x: [..., K], any floating dtype.

    Returns:
        e4m3 [..., K] and float32 scales [..., 1].
    """
    values = x.float()
    scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_ABSMAX) / E4M3_MAX
    return to_e4m3(values / scale), scale


def quantize_fp8_per_group(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x`` in groups of columns.

    Args:
        x: [..., K], any floating dtype. The last group is shorter where ``group_size`` does not divide K.
        group_size: columns per scale.

    Returns:
        e4m3 [..., K] and float32 scales [..., ceil(K / group_size)].
    """
    columns = x.shape[-1]
    padding = -columns % group_size
    groups = torch.nn.functional.pad(x.float(), (0, padding)).unflatten(-1, (-1, group_size))
    quantized, scale = quantize_fp8_per_token(groups)
    return quantized.flatten(-2)[..., :columns].contiguous(), scale.squeeze(-1)


def quantize_fp8_per_tensor(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantize ``x`` [...] with a known scale (float32 []) to e4m3 [...]; values beyond the scale saturate."""
    return to_e4m3(x.float() / scale)


def quantize_fp8_per_block(weight: torch.Tensor, block_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix in blocks.

    Args:
        weight: [N, K], any floating dtype.
        block_size: (rows, columns) of a block; blocks at the edges are smaller.

    Returns:
        e4m3 [N, K] and float32 scales [ceil(N / rows), ceil(K / columns)].
    """
    values = weight.float()
    rows, columns = block_size
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % columns, 0, -values.shape[0] % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [Nb, rows, Kb, columns]
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=SMALLEST_ABSMAX) / E4M3_MAX
    return to_e4m3(values / expand_scale(scale, values.shape, block_size)), scale


def expand_scale(scale: torch.Tensor, shape: torch.Size, block_size: Sequence[int] | None = None) -> torch.Tensor:
    """Bring a scale to a shape that broadcasts against a matrix.

    Args:
        scale: float32, per tensor (one element), per row [rows, 1], or per block
            [ceil(rows / block rows), ceil(columns / block columns)].
        shape: (rows, columns) of the matrix.
        block_size: (rows, columns) of a block; ``None`` for the other two kinds.

    Returns:
        float32 [1, 1], [rows, 1] or [rows, columns].
    """
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if block_size is None:
        return scale
    rows, columns = shape
    full = scale.repeat_interleave(block_size[0], dim=0).repeat_interleave(block_size[1], dim=1)
    return full[:rows, :columns]


def dequantize_fp8(
    values: torch.Tensor,
    scale: torch.Tensor,
    block_size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return ``values`` (e4m3 [rows, columns]) times ``scale`` (see ``expand_scale``), in ``dtype``."""
    return (values.float() * expand_scale(scale, values.shape, block_size)).to(dtype)


def fp8_scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    weight_block_size: list[int] | None = None,
) -> torch.Tensor:
    """Multiply two e4m3 matrices and scale the result.

    Args:
        x: e4m3 [M, K].
        x_scale: float32, per tensor or per token; with block-wise weights per group of their columns.
        weight: e4m3 [N, K].
        weight_scale: float32, per tensor or per output channel; per block with ``weight_block_size``.
        bias: [N] or ``None``.
        out_dtype: of the result.
        weight_block_size: [rows, columns] of a weight block.

    Returns:
        [M, N] in ``out_dtype``, accumulated in float32.
    """
    block = None if weight_block_size is None else (weight_block_size[0], weight_block_size[1])
    left = dequantize_fp8(x, x_scale, None if block is None else (1, block[1]))
    right = dequantize_fp8(weight, weight_scale, block)
    result = left @ right.t()
    if bias is not None:
        result = result + bias.float()
    return result.to(out_dtype)


def _fake_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(x, dtype=E4M3, memory_format=torch.contiguous_format),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


def _fake_per_group(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(x, dtype=E4M3, memory_format=torch.contiguous_format),
        x.new_empty((*x.shape[:-1], -(-x.shape[-1] // group_size)), dtype=torch.float32),
    )


def _fake_per_tensor(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=E4M3, memory_format=torch.contiguous_format)


def _fake_per_block(weight: torch.Tensor, block_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    grid = [-(-length // size) for length, size in zip(weight.shape, block_size, strict=True)]
    return weight.new_empty(weight.shape, dtype=E4M3), weight.new_empty(grid, dtype=torch.float32)


def _fake_scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    weight_block_size: list[int] | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


quantize_per_token_operator = define_operator(
    "quantize_fp8_per_token(Tensor x) -> (Tensor, Tensor)", quantize_fp8_per_token, _fake_per_token
)
quantize_per_group_operator = define_operator(
    "quantize_fp8_per_group(Tensor x, int group_size) -> (Tensor, Tensor)", quantize_fp8_per_group, _fake_per_group
)
quantize_per_tensor_operator = define_operator(
    "quantize_fp8_per_tensor(Tensor x, Tensor scale) -> Tensor", quantize_fp8_per_tensor, _fake_per_tensor
)
quantize_per_block_operator = define_operator(
    "quantize_fp8_per_block(Tensor weight, int[] block_size) -> (Tensor, Tensor)",
    quantize_fp8_per_block,
    _fake_per_block,
)
scaled_mm_operator = define_operator(
    "fp8_scaled_mm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType out_dtype,"
    " int[]? weight_block_size=None) -> Tensor",
    fp8_scaled_mm,
    _fake_scaled_mm,
)
for _name in ("quantize_fp8_per_token", "quantize_fp8_per_group", "quantize_fp8_per_block"):
    register_kernel_lazily(_name, "CPU", "lowbit.ops.cpu.quantize")


def quantize_activation(
    x: torch.Tensor, input_scale: torch.Tensor | None, weight_block_size: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations x [M, K] the way the scales ask for.

    By ``input_scale`` (float32 []) if there is one, in groups of the columns of ``weight_block_size``, else per token.
    As operators in eager mode, as plain torch when compiling, so that it fuses with what precedes it.

    Returns:
        e4m3 [M, K] and float32 scales [], [M, ceil(K / columns)] or [M, 1].
    """
    plain = torch.compiler.is_compiling()
    if input_scale is not None:
        return (quantize_fp8_per_tensor if plain else quantize_per_tensor_operator)(x, input_scale), input_scale
    if weight_block_size is not None:
        per_group = quantize_fp8_per_group if plain else quantize_per_group_operator
        quantized, scale = per_group(x, weight_block_size[1])
    else:
        quantized, scale = (quantize_fp8_per_token if plain else quantize_per_token_operator)(x)
    return quantized, scale


# The reference as an implementation of the family: W8A8 as a GPU would compute it, on any device.


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a W8A8 linear layer.

    Args:
        x: [..., K] floating.
        prepared: ``weight`` e4m3 [N, K]; ``scale`` float32 [N, 1] or [], or one per block of ``format.block``;
            ``input_scale`` float32 [] for static activations, ``None`` for dynamic ones.
        bias: [N] or ``None``.

    Returns:
        [..., N] in ``x.dtype``.
    """
    packed, weight_scale, input_scale = prepared.weight, prepared.scales, prepared.input_scale
    weight_block_size = prepared.format.block
    rows = x.reshape(-1, x.shape[-1])
    quantized, scale = quantize_activation(rows, input_scale, weight_block_size)
    block = None if weight_block_size is None else list(weight_block_size)
    result = fp8_scaled_mm(quantized, scale, packed, weight_scale, bias, x.dtype, block)
    return result.reshape(*x.shape[:-1], packed.shape[0])
