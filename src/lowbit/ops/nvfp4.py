"""NVFP4: e2m1 in groups of 16, each with a scale in e4m3, and a float32 scale above them (NVIDIA's layout, ModelOpt's).

The reference here defines the numbers. ``absmax`` is a group's largest magnitude and ``global_scale`` usually that of
everything under it, over ``6 * 448``::

    scale = e4m3(clamp(absmax / (6 * global_scale), 2**-9, 448))         1 for a group of zeros
    q     = e2m1(clamp(x / (scale * global_scale)))                      round to nearest, ties to even

and products are made from ``q * scale * global_scale`` on both sides, accumulated in float32. A group that holds NaN or
infinity has the scale NaN.

The shapes, for a matrix [rows, K]; the last group is shorter where 16 does not divide K:

========  =========================  =============================  ==================================
what      elements                   scale                          global scale
========  =========================  =============================  ==================================
weight    uint8 [N, K / 2]           e4m3 [N, ceil(K / 16)]         float32 []
x         uint8 [M, K / 2]           e4m3 [M, ceil(K / 16)]         float32 [M, 1] (dynamic), [] (static)
========  =========================  =============================  ==================================
"""

from __future__ import annotations

import torch

from lowbit.ops.canonical import can_run, prepare, restore
from lowbit.ops.dispatch import ANY_DEVICE, LOW_RANK, Implementation
from lowbit.ops.e2m1 import E2M1_MAX, decode_e2m1_pairs, encode_e2m1, pack_nibbles
from lowbit.ops.fp8 import E4M3, E4M3_MAX, SMALLEST_ABSMAX
from lowbit.ops.library import define_operator
from lowbit.ops.mx import expand_groups, in_groups
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]

GROUP_SIZE = 16
SMALLEST_SCALE = 2.0**-9  # of e4m3, subnormal
GLOBAL_MAX = E2M1_MAX * E4M3_MAX

# What a search for a group's scale multiplies absmax / 6 with: from a sixth clamped to four as the largest code.
SEARCHED = (0.75, 0.8125, 0.875, 0.9375, 1.0, 1.0625, 1.125, 1.1875, 1.25, 1.375, 1.5)
# The e4m3 value of the largest scale when scales are searched: room for one and a half times as much.
SEARCHED_SCALE_MAX = 256.0

_WEIGHT_ONLY = "no FP4 matrix product here: weights are stored in FP4, products made in the activations' precision"

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("triton", "lowbit.ops.triton.nvfp4", frozenset({"cuda", "xpu"})),
    Implementation(
        "triton_weight_only",
        "lowbit.ops.triton.nvfp4_weight_only",
        frozenset({"cuda", "xpu"}),
        slow=_WEIGHT_ONLY,
        is_weight_only=True,
    ),
    Implementation(
        "weight_only",
        "lowbit.ops.cpu.nvfp4",
        frozenset({"cpu"}),
        slow=_WEIGHT_ONLY,
        is_weight_only=True,
        capabilities=LOW_RANK,
    ),
    Implementation(
        "weight_only",
        "lowbit.ops.nvfp4_weight_only",
        ANY_DEVICE,
        slow=_WEIGHT_ONLY,
        is_weight_only=True,
        capabilities=LOW_RANK,
    ),
    Implementation("triton_emulated", "lowbit.ops.triton.nvfp4_emulated", frozenset({"cuda", "xpu"}), automatic=False),
    Implementation("reference", "lowbit.ops.nvfp4", ANY_DEVICE, automatic=False),
)


def global_scale_of(absmax: torch.Tensor, scale_max: float = E4M3_MAX) -> torch.Tensor:
    """Return the float32 global scale for a largest magnitude: ``max(absmax, 1e-30) / (6 * scale_max)``.

    Args:
        absmax: any shape.
        scale_max: the e4m3 scale that the group with this magnitude will have.
    """
    return absmax.float().clamp(min=SMALLEST_ABSMAX) / (E2M1_MAX * scale_max)


def group_scales(absmax: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Return the e4m3 scales of groups with these largest magnitudes (float32, any shape), 1 for those of zeros."""
    exact = absmax / (E2M1_MAX * global_scale)
    rounded = torch.where(absmax == 0, 1.0, exact.clamp(SMALLEST_SCALE, E4M3_MAX))
    return torch.where(torch.isfinite(absmax), rounded, torch.nan).to(E4M3)


def _elements(groups: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Return the e2m1 codes (uint8) of groups [..., 16] with e4m3 scales [...]."""
    return encode_e2m1(groups / (scale.float() * global_scale).unsqueeze(-1))


def search_scales(groups: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Return the e4m3 scales, of those that ``SEARCHED`` leads to, that give groups [..., 16] the smallest error."""
    absmax = groups.abs().amax(dim=-1)
    best = group_scales(absmax, global_scale)
    least = torch.full(absmax.shape, torch.inf, device=groups.device)
    for factor in SEARCHED:
        scale = group_scales(absmax * factor, global_scale)
        values = decode_e2m1_pairs(_elements(groups, scale, global_scale))[..., 0]
        error = (values * (scale.float() * global_scale).unsqueeze(-1) - groups).square().sum(dim=-1)
        best = torch.where(error < least, scale.float(), best.float()).to(E4M3)
        least = torch.minimum(error, least)
    return best


def quantize_nvfp4(
    x: torch.Tensor, global_scale: torch.Tensor, search: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [..., K] (any floating dtype, K even) under a known global scale.

    Args:
        x: [..., K].
        global_scale: float32, of one element or [..., 1].
        search: take the group scales with the smallest squared error in place of those of ``absmax``.

    Returns:
        e2m1 uint8 [..., K / 2] and e4m3 scales [..., ceil(K / 16)].
    """
    groups = in_groups(x, GROUP_SIZE)
    absmax = groups.abs().amax(dim=-1)
    scale = search_scales(groups, global_scale) if search else group_scales(absmax, global_scale)
    codes = _elements(groups, scale, global_scale).flatten(-2)[..., : x.shape[-1]]
    return pack_nibbles(codes), scale


def quantize_nvfp4_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize x [..., K] (any floating dtype, K even), with a global scale per row.

    Returns:
        e2m1 uint8 [..., K / 2], e4m3 scales [..., ceil(K / 16)] and float32 global scales [..., 1].
    """
    global_scale = global_scale_of(x.float().abs().amax(dim=-1, keepdim=True))
    # A row with NaN or infinity has NaN scales in the groups concerned; the global one must not spread it by chance.
    global_scale = torch.where(torch.isfinite(global_scale), global_scale, torch.nan)
    packed, scale = quantize_nvfp4(x, global_scale)
    return packed, scale, global_scale


def dequantize_nvfp4(
    packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the values [..., K] of a tensor in NVFP4.

    Args:
        packed: e2m1 uint8 [..., K / 2].
        scale: e4m3 [..., ceil(K / 16)].
        global_scale: float32, of one element or [..., 1]; multiplied with ``scale`` first, in float32.
        dtype: of the result.
    """
    values = decode_e2m1_pairs(packed).flatten(-2)
    return (values * expand_groups(scale.float() * global_scale, GROUP_SIZE, values.shape[-1])).to(dtype)


def nvfp4_scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_global_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply two matrices in NVFP4.

    Args:
        x: e2m1 uint8 [M, K / 2].
        x_scale: e4m3 [M, ceil(K / 16)].
        x_global_scale: float32 [M, 1] or [].
        weight: e2m1 uint8 [N, K / 2].
        weight_scale: e4m3 [N, ceil(K / 16)].
        weight_global_scale: float32 [].
        bias: [N] or ``None``.
        out_dtype: of the result.

    Returns:
        [M, N] in ``out_dtype``, accumulated in float32.
    """
    left = dequantize_nvfp4(x, x_scale, x_global_scale)
    result = left @ dequantize_nvfp4(weight, weight_scale, weight_global_scale).t()
    if bias is not None:
        result = result + bias.float()
    return result.to(out_dtype)


def _fake_quantize(
    x: torch.Tensor, global_scale: torch.Tensor, search: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    *rows, columns = x.shape
    packed = x.new_empty((*rows, columns // 2), dtype=torch.uint8)
    return packed, x.new_empty((*rows, -(-columns // GROUP_SIZE)), dtype=E4M3)


def _fake_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    global_scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return *_fake_quantize(x, global_scale), global_scale


def _fake_scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_global_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


quantize_operator = define_operator(
    "quantize_nvfp4(Tensor x, Tensor global_scale, bool search=False) -> (Tensor, Tensor)",
    quantize_nvfp4,
    _fake_quantize,
)
quantize_per_token_operator = define_operator(
    "quantize_nvfp4_per_token(Tensor x) -> (Tensor, Tensor, Tensor)", quantize_nvfp4_per_token, _fake_per_token
)
scaled_mm_operator = define_operator(
    "nvfp4_scaled_mm(Tensor x, Tensor x_scale, Tensor x_global_scale, Tensor weight, Tensor weight_scale,"
    " Tensor weight_global_scale, Tensor? bias, ScalarType out_dtype) -> Tensor",
    nvfp4_scaled_mm,
    _fake_scaled_mm,
)


def quantize_activation(
    x: torch.Tensor, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize activations x [M, K]: under ``input_scale`` (float32 []) if there is one, else with one per token.

    As operators in eager mode, as plain torch when compiling, so that it fuses with what precedes it.

    Returns:
        e2m1 uint8 [M, K / 2], e4m3 scales [M, ceil(K / 16)] and the float32 global scales [M, 1] or [].
    """
    plain = torch.compiler.is_compiling()
    if input_scale is None:
        packed, scale, global_scale = (quantize_nvfp4_per_token if plain else quantize_per_token_operator)(x)
        return packed, scale, global_scale
    packed, scale = (quantize_nvfp4 if plain else quantize_operator)(x, input_scale)
    return packed, scale, input_scale


# The reference as an implementation of the family: both operands quantized, as an accelerator would, on any device;
# with activations that are not to be quantized (W4A16), the weight alone.


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear layer with an NVFP4 weight.

    Args:
        x: [..., K] floating.
        prepared: ``weight`` e2m1 uint8 [N, K / 2]; ``scale`` e4m3 [N, ceil(K / 16)]; ``outer_scale`` float32 [], the
            weight's global scale; ``input_scale`` float32 [], that of the activations, ``None`` for one per token. With
            ``format.activation`` ``None`` activations are not quantized (W4A16).
        bias: [N] or ``None``.

    Returns:
        [..., N] in ``x.dtype``.
    """
    packed, weight_scale, global_scale = prepared.weight, prepared.scales, prepared.outer_scale
    assert global_scale is not None
    rows = x.reshape(-1, x.shape[-1])
    if prepared.format.activation is None:
        weight = dequantize_nvfp4(packed, weight_scale, global_scale)
        result = torch.nn.functional.linear(rows.float(), weight, None if bias is None else bias.float()).to(x.dtype)
    else:
        elements, scale, x_global = quantize_activation(rows, prepared.input_scale)
        result = nvfp4_scaled_mm(elements, scale, x_global, packed, weight_scale, global_scale, bias, x.dtype)
    return result.reshape(*x.shape[:-1], packed.shape[0])
