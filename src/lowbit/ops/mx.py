"""Microscaling (MX) formats, of the OCP Microscaling Formats specification 1.0: 32 values share a power of two.

The reference here defines the numbers. Elements are e4m3 (``mxfp8``) or e2m1 (``mxfp4``, two in a byte, the even one in
the low nibble); the scale of a group is E8M0, ``2 ** (code - 127)``, and code 255 is NaN::

    scale = the power of two that ROUNDINGS picks for the group's largest magnitude
    q     = element(clamp(x / scale))             round to nearest, ties to even

A group that holds NaN or infinity has the scale NaN. Products are made from ``q * scale`` on both sides, accumulated in
float32.

``mxfp4_dualscale`` divides groups of 512 by ``absmax / 6`` (float32) before, so that the largest value of each is
exactly the largest of e2m1 (``npu_dynamic_dual_level_mx_quant`` of Ascend's CANN).

The shapes, for a matrix [rows, K]; the last group is shorter where its size does not divide K:

===========  ====================  =======================  ===========================
format       elements              scale                    dual scale
===========  ====================  =======================  ===========================
mxfp8        e4m3 [rows, K]        uint8 [rows, ceil(K/32)]
mxfp4        uint8 [rows, K / 2]   uint8 [rows, ceil(K/32)]
dualscale    uint8 [rows, K / 2]   uint8 [rows, ceil(K/32)]  float32 [rows, ceil(K/512)]
===========  ====================  =======================  ===========================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lowbit.ops.canonical import can_run, prepare, restore
from lowbit.ops.dispatch import ANY_DEVICE, Implementation
from lowbit.ops.e2m1 import E2M1_MAX, decode_e2m1_pairs, encode_e2m1, pack_nibbles
from lowbit.ops.fp8 import E4M3, E4M3_MAX, SMALLEST_ABSMAX, to_e4m3
from lowbit.ops.library import define_operator
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]

GROUP_SIZE = 32
DUAL_GROUP_SIZE = 512
NAN_CODE = 255
LARGEST_CODE = 254
ROUNDINGS = ("floor", "ceil", "even")
SEARCHED = (-1, 0, 1)  # scale codes that "mse" tries, from that of "floor" on
"""How a group's scale is chosen: ``floor`` is the specification's (the exponent of the largest magnitude; up to a
quarter of the range above the largest element is clamped), ``ceil`` the smallest scale that clamps nothing (ModelOpt),
``even`` the exponent after rounding the largest magnitude to the element's precision. Weights also have ``mse``: the
scale with the smallest squared error."""


@dataclass(frozen=True)
class Element:
    """An element format.

    Attributes:
        largest: value.
        exponent: of the largest value.
        offsets: rounding -> what to add to the float32 bits of a group's largest magnitude before its exponent is
            taken.
    """

    largest: float
    exponent: int
    offsets: Mapping[str, int] = field(default_factory=dict)


def _element(largest: float, exponent: int, mantissa_bits: int) -> Element:
    mantissa = int((largest / 2.0**exponent - 1) * 2**23)
    return Element(largest, exponent, {"floor": 0, "ceil": 2**23 - 1 - mantissa, "even": 1 << (22 - mantissa_bits)})


ELEMENTS: Mapping[str, Element] = {"mxfp8": _element(E4M3_MAX, 8, 3), "mxfp4": _element(E2M1_MAX, 2, 1)}

# What activations are rounded with; measured on the embedded model (docs/mxfp8.md, docs/mxfp4.md).
ACTIVATION_ROUNDING: Mapping[str, str] = {"mxfp8": "ceil", "mxfp4": "even"}

_WEIGHT_ONLY = "no MX matrix product here: weights are stored in MX, products made in the activations' precision"

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("triton", "lowbit.ops.triton.mx", frozenset({"cuda", "xpu"})),
    Implementation(
        "triton_weight_only",
        "lowbit.ops.triton.mx_weight_only",
        frozenset({"cuda", "xpu"}),
        slow=_WEIGHT_ONLY,
        is_weight_only=True,
    ),
    Implementation("weight_only", "lowbit.ops.cpu.mx", frozenset({"cpu"}), slow=_WEIGHT_ONLY, is_weight_only=True),
    Implementation("weight_only", "lowbit.ops.mx_weight_only", ANY_DEVICE, slow=_WEIGHT_ONLY, is_weight_only=True),
    Implementation("triton_emulated", "lowbit.ops.triton.mx_emulated", frozenset({"cuda", "xpu"}), automatic=False),
    Implementation("reference", "lowbit.ops.mx", ANY_DEVICE, automatic=False),
)


def decode_e8m0(codes: torch.Tensor) -> torch.Tensor:
    """Return ``2 ** (code - 127)`` in float32 for E8M0 codes (uint8, any shape); NaN for 255."""
    wide = codes.to(torch.int32)
    bits = torch.where(wide == 0, 0x00400000, wide << 23)  # 2**-127 is below float32's normal numbers
    return torch.where(wide == NAN_CODE, 0x7FC00000, bits).view(torch.float32)


def scale_codes(absmax: torch.Tensor, element: str, rounding: str) -> torch.Tensor:
    """Return the E8M0 codes (uint8) of the scales of groups.

    Args:
        absmax: float32, the largest magnitude of each group.
        element: ``"mxfp8"`` or ``"mxfp4"``.
        rounding: of ``ROUNDINGS``.

    Returns:
        Same shape; 255 where ``absmax`` is NaN or infinite.
    """
    kind = ELEMENTS[element]
    bits = absmax.view(torch.int32)
    exponent = (bits + kind.offsets[rounding]) >> 23
    codes = (exponent - kind.exponent).clamp(0, LARGEST_CODE)
    return torch.where(torch.isfinite(absmax), codes, NAN_CODE).to(torch.uint8)


def in_groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return x [..., K] as float32 [..., ceil(K / size), size], the last group filled up with zeros."""
    padding = -x.shape[-1] % size
    groups: torch.Tensor = torch.nn.functional.pad(x.float(), (0, padding)).unflatten(-1, (-1, size))
    return groups


def expand_groups(scale: torch.Tensor, size: int, columns: int) -> torch.Tensor:
    """Repeat each element of ``scale`` [..., groups] ``size`` times: [..., columns]."""
    return scale.repeat_interleave(size, dim=-1)[..., :columns]


def _elements(groups: torch.Tensor, codes: torch.Tensor, element: str) -> torch.Tensor:
    """Return ``groups`` [..., 32] over their scales in the element format: e4m3, or e2m1 codes in uint8."""
    quotient = groups / decode_e8m0(codes).unsqueeze(-1)
    return to_e4m3(quotient) if element == "mxfp8" else encode_e2m1(quotient)


def _values(elements: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of elements as ``_elements`` gives them."""
    if elements.dtype == E4M3:
        return elements.float()
    return decode_e2m1_pairs(elements)[..., 0]


def search_scales(groups: torch.Tensor, element: str) -> torch.Tensor:
    """Return the E8M0 codes that give groups [..., 32] (float32) the smallest squared error."""
    floor = scale_codes(groups.abs().amax(dim=-1), element, "floor")
    best, least = floor, torch.full(floor.shape, torch.inf, device=groups.device)
    for step in SEARCHED:
        codes = torch.where(floor == NAN_CODE, NAN_CODE, (floor.int() + step).clamp(0, LARGEST_CODE)).to(torch.uint8)
        restored = _values(_elements(groups, codes, element)) * decode_e8m0(codes).unsqueeze(-1)
        error = (restored - groups).square().sum(dim=-1)
        best = torch.where(error < least, codes, best)
        least = torch.minimum(error, least)
    return best


def _quantize(x: torch.Tensor, element: str, rounding: str) -> tuple[torch.Tensor, torch.Tensor]:
    groups = in_groups(x, GROUP_SIZE)
    if rounding == "mse":
        codes = search_scales(groups, element)
    else:
        codes = scale_codes(groups.abs().amax(dim=-1), element, rounding)
    return _elements(groups, codes, element).flatten(-2)[..., : x.shape[-1]].contiguous(), codes


def quantize_mxfp8(x: torch.Tensor, rounding: str = "ceil") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [..., K] (any floating dtype) to mxfp8.

    Args:
        x: [..., K].
        rounding: of ``ROUNDINGS``, or ``"mse"``.

    Returns:
        e4m3 [..., K] and E8M0 scales uint8 [..., ceil(K / 32)].
    """
    return _quantize(x, "mxfp8", rounding)


def quantize_mxfp4(x: torch.Tensor, rounding: str = "even") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [..., K] (any floating dtype, K even) to mxfp4.

    Args:
        x: [..., K].
        rounding: of ``ROUNDINGS``, or ``"mse"``.

    Returns:
        e2m1 uint8 [..., K / 2] and E8M0 scales uint8 [..., ceil(K / 32)].
    """
    codes, scale = _quantize(x, "mxfp4", rounding)
    return pack_nibbles(codes), scale


def quantize_mxfp4_dualscale(
    x: torch.Tensor, rounding: str = "even"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize x [..., K] (any floating dtype, K even) to mxfp4 with a second scale per 512.

    Args:
        x: [..., K].
        rounding: of ``ROUNDINGS``, or ``"mse"``.

    Returns:
        e2m1 uint8 [..., K / 2], E8M0 scales uint8 [..., ceil(K / 32)], float32 scales [..., ceil(K / 512)].
    """
    groups = in_groups(x, DUAL_GROUP_SIZE)
    dual_scale = groups.abs().amax(dim=-1).clamp(min=SMALLEST_ABSMAX) / E2M1_MAX
    reduced = (groups / dual_scale.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]
    packed, scale = quantize_mxfp4(reduced, rounding)
    return packed, scale, dual_scale


def dequantize_mx(
    elements: torch.Tensor,
    scale: torch.Tensor,
    dual_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the values of a tensor in any of the formats.

    Args:
        elements: e4m3 [..., K] or e2m1 uint8 [..., K / 2].
        scale: E8M0 uint8 [..., ceil(K / 32)].
        dual_scale: float32 [..., ceil(K / 512)] or ``None``.
        dtype: of the result; the product of element and scales is rounded to it once.

    Returns:
        [..., K].
    """
    values = elements.float() if elements.dtype == E4M3 else decode_e2m1_pairs(elements).flatten(-2)
    columns = values.shape[-1]
    values = values * expand_groups(decode_e8m0(scale), GROUP_SIZE, columns)
    if dual_scale is not None:
        values = values * expand_groups(dual_scale, DUAL_GROUP_SIZE, columns)
    return values.to(dtype)


def mx_scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    x_dual_scale: torch.Tensor | None = None,
    weight_dual_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply two MX matrices, x [M, K] and weight [N, K], of the same element format.

    Args:
        x: e4m3 [M, K] or e2m1 uint8 [M, K / 2].
        x_scale: E8M0 uint8 [M, ceil(K / 32)].
        weight: e4m3 [N, K] or e2m1 uint8 [N, K / 2].
        weight_scale: E8M0 uint8 [N, ceil(K / 32)].
        bias: [N] or ``None``.
        out_dtype: of the result.
        x_dual_scale: float32 [M, ceil(K / 512)] or ``None``.
        weight_dual_scale: float32 [N, ceil(K / 512)] or ``None``.

    Returns:
        [M, N] in ``out_dtype``, accumulated in float32.
    """
    result = dequantize_mx(x, x_scale, x_dual_scale) @ dequantize_mx(weight, weight_scale, weight_dual_scale).t()
    if bias is not None:
        result = result + bias.float()
    return result.to(out_dtype)


def _fake_scale(x: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], -(-x.shape[-1] // size)), dtype=dtype)


def _fake_mxfp8(x: torch.Tensor, rounding: str) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=E4M3), _fake_scale(x, GROUP_SIZE, torch.uint8)


def _fake_mxfp4(x: torch.Tensor, rounding: str) -> tuple[torch.Tensor, torch.Tensor]:
    packed = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    return packed, _fake_scale(x, GROUP_SIZE, torch.uint8)


def _fake_dualscale(x: torch.Tensor, rounding: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_fake_mxfp4(x, rounding), _fake_scale(x, DUAL_GROUP_SIZE, torch.float32)


def _fake_scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    x_dual_scale: torch.Tensor | None = None,
    weight_dual_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


quantize_mxfp8_operator = define_operator(
    "quantize_mxfp8(Tensor x, str rounding) -> (Tensor, Tensor)", quantize_mxfp8, _fake_mxfp8
)
quantize_mxfp4_operator = define_operator(
    "quantize_mxfp4(Tensor x, str rounding) -> (Tensor, Tensor)", quantize_mxfp4, _fake_mxfp4
)
quantize_mxfp4_dualscale_operator = define_operator(
    "quantize_mxfp4_dualscale(Tensor x, str rounding) -> (Tensor, Tensor, Tensor)",
    quantize_mxfp4_dualscale,
    _fake_dualscale,
)
scaled_mm_operator = define_operator(
    "mx_scaled_mm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType out_dtype,"
    " Tensor? x_dual_scale=None, Tensor? weight_dual_scale=None) -> Tensor",
    mx_scaled_mm,
    _fake_scaled_mm,
)


def quantize_activation(
    x: torch.Tensor, weight: torch.Tensor, dual_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize activations x [M, K] to the format of a weight, with ``ACTIVATION_ROUNDING``.

    As operators in eager mode, as plain torch when compiling, so that it fuses with what precedes it.

    Args:
        x: [M, K] floating.
        weight: the weight's elements: their dtype tells the format.
        dual_scale: the weight's, if it has any: then x gets one too.

    Returns:
        Elements, scale, and dual scale or ``None``.
    """
    plain = torch.compiler.is_compiling()
    if weight.dtype == E4M3:
        mxfp8 = quantize_mxfp8 if plain else quantize_mxfp8_operator
        elements, scale = mxfp8(x, ACTIVATION_ROUNDING["mxfp8"])
        return elements, scale, None
    rounding = ACTIVATION_ROUNDING["mxfp4"]
    if dual_scale is None:
        elements, scale = (quantize_mxfp4 if plain else quantize_mxfp4_operator)(x, rounding)
        return elements, scale, None
    dualscale = quantize_mxfp4_dualscale if plain else quantize_mxfp4_dualscale_operator
    elements, scale, x_dual_scale = dualscale(x, rounding)
    return elements, scale, x_dual_scale


# The reference as an implementation of the family: both operands quantized, as an accelerator would, on any device.


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear layer whose activations are quantized to the format of its weight.

    Args:
        x: [..., K] floating.
        prepared: ``weight`` e4m3 [N, K] or e2m1 uint8 [N, K / 2]; ``scale`` E8M0 uint8 [N, ceil(K / 32)];
            ``outer_scale`` float32 [N, ceil(K / 512)] or ``None``.
        bias: [N] or ``None``.

    Returns:
        [..., N] in ``x.dtype``.
    """
    packed, weight_scale, dual_scale = prepared.weight, prepared.scales, prepared.outer_scale
    elements, scale, x_dual_scale = quantize_activation(x.reshape(-1, x.shape[-1]), packed, dual_scale)
    result = mx_scaled_mm(elements, scale, packed, weight_scale, bias, x.dtype, x_dual_scale, dual_scale)
    return result.reshape(*x.shape[:-1], packed.shape[0])
