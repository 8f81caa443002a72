"""Quantizers to GGUF's block types in plain torch.

Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 give the bytes that ggml's reference and the ``gguf`` package give. The K-quants search
the scales that make the weighted squared error small, as ggml does (``make_qkx2_quants``, ``make_qx_quants`` in
``ggml-quants.c``: large weights count more), and then fit the float16 scales of a block to the codes that were chosen.

Each takes float32 blocks [blocks, elements of a block] and returns uint8 [blocks, bytes of a block]. A block with NaN
or infinity decodes to values that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# A group whose largest magnitude is smaller is taken for zero (ggml's GROUP_MAX_EPS).
SMALLEST_GROUP = 1e-15
# How far the largest code may be from the group's largest element, nearest first: a tie keeps the plain scale.
MINIMUM_STEPS = sorted((step / 10 for step in range(-10, 11)), key=abs)
SYMMETRIC_STEPS = sorted((step / 10 for step in range(-9, 10)), key=abs)


def _reciprocal(values: Tensor) -> Tensor:
    return torch.where(values == 0, 0.0, 1.0 / values)


def _float16_bytes(values: Tensor) -> Tensor:
    """Return values [blocks, n] as float16, as bytes [blocks, 2 n]."""
    return values.half().contiguous().view(torch.uint8)


def _as_written(values: Tensor) -> Tensor:
    """Return values as they are after being written in float16."""
    return values.half().float()


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Return codes [blocks, 32], below 16, as bytes [blocks, 16]: the first half in the low nibbles."""
    return codes[:, :16] | (codes[:, 16:] << 4)


def _pack_fields(codes: Tensor, bits: int) -> Tensor:
    """Return codes [..., 8 / bits, n] of ``bits`` bits each as bytes [..., n], the first in the lowest bits."""
    packed = codes[..., 0, :].clone()
    for index in range(1, 8 // bits):
        packed |= codes[..., index, :] << (bits * index)
    return packed


def _pack_bits(bits: Tensor) -> Tensor:
    """Return 32 bits [blocks, 32] as 4 bytes [blocks, 4], the first in the lowest bit."""
    return _pack_fields(bits.unflatten(1, (4, 8)).transpose(1, 2), 1)


def _largest(blocks: Tensor) -> Tensor:
    """Return the element of the largest magnitude of each block [blocks, 1], the first of several; NaN if one is."""
    magnitude = blocks.abs()
    largest = magnitude.amax(dim=1, keepdim=True)
    positions = torch.arange(blocks.shape[1], device=blocks.device)
    first = torch.where(magnitude == largest, positions, blocks.shape[1] - 1).amin(dim=1, keepdim=True)
    return torch.where(largest.isnan(), largest, blocks.gather(1, first))


def encode_q8_0(blocks: Tensor) -> Tensor:
    """Signed bytes scaled by the largest magnitude, rounded half away from zero."""
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * _reciprocal(scale)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    codes = scaled.sign() * (whole + (2 * (magnitude - whole)).floor())
    return torch.cat([_float16_bytes(scale), codes.to(torch.int8).view(torch.uint8)], dim=1)


def _symmetric_codes(blocks: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Return codes 0 .. 2 ``largest`` - 1 around ``largest`` and scales; the extreme element is code 0."""
    scale = _largest(blocks) / -largest
    codes = (blocks * _reciprocal(scale) + (largest + 0.5)).trunc().clamp(0, 2 * largest - 1)
    return codes.to(torch.uint8), scale


def encode_q4_0(blocks: Tensor) -> Tensor:
    """Four bits around 8."""
    codes, scale = _symmetric_codes(blocks, 8)
    return torch.cat([_float16_bytes(scale), _pack_nibbles(codes)], dim=1)


def encode_q5_0(blocks: Tensor) -> Tensor:
    """Five bits around 16."""
    codes, scale = _symmetric_codes(blocks, 16)
    return torch.cat([_float16_bytes(scale), _pack_bits(codes >> 4), _pack_nibbles(codes & 15)], dim=1)


def _asymmetric_codes(blocks: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes 0 .. ``largest``, scales and minimums."""
    minimum = blocks.amin(dim=1, keepdim=True)
    scale = (blocks.amax(dim=1, keepdim=True) - minimum) / largest
    codes = ((blocks - minimum) * _reciprocal(scale) + 0.5).trunc().clamp(0, largest)
    return codes.to(torch.uint8), scale, minimum


def encode_q4_1(blocks: Tensor) -> Tensor:
    """Four bits above the minimum."""
    codes, scale, minimum = _asymmetric_codes(blocks, 15)
    return torch.cat([_float16_bytes(scale), _float16_bytes(minimum), _pack_nibbles(codes)], dim=1)


def encode_q5_1(blocks: Tensor) -> Tensor:
    """Five bits above the minimum."""
    codes, scale, minimum = _asymmetric_codes(blocks, 31)
    parts = [_float16_bytes(scale), _float16_bytes(minimum), _pack_bits(codes >> 4), _pack_nibbles(codes & 15)]
    return torch.cat(parts, dim=1)


def _search_scale_and_minimum(groups: Tensor, weights: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Find for each group the scale and minimum of the smallest weighted squared error.

    A grid of scales gives codes; for given codes the best scale and minimum are those of a linear regression. Each
    minimum that is better than the ones before is where the next codes start.

    Args:
        groups: float32 [..., n].
        weights: of the elements, alike.
        largest: code.

    Returns:
        scale >= 0 and minimum >= 0, to be subtracted: each [..., 1].
    """
    minimum = groups.amin(dim=-1, keepdim=True).clamp(max=0.0)
    largest_value = groups.amax(dim=-1, keepdim=True)
    scale = (largest_value - minimum) / largest
    sum_w = weights.sum(dim=-1, keepdim=True)
    weighted = weights * groups
    sum_x = weighted.sum(dim=-1, keepdim=True)
    best = torch.full_like(minimum, -torch.inf)
    for step in MINIMUM_STEPS:
        inverse = (largest + step) * _reciprocal(largest_value - minimum)
        codes = (groups - minimum).mul_(inverse).round_().clamp_(0, largest)
        weighted_codes = weights * codes
        sum_l = weighted_codes.sum(dim=-1, keepdim=True)
        sum_l2 = (weighted_codes * codes).sum(dim=-1, keepdim=True)
        sum_xl = (weighted * codes).sum(dim=-1, keepdim=True)
        fit, offset = _regression(sum_w, sum_x, sum_l, sum_l2, sum_xl)
        # What the fit takes off the squared error of an all-zero group.
        gain = 2 * (fit * sum_xl + offset * sum_x) - (
            fit * fit * sum_l2 + 2 * fit * offset * sum_l + offset * offset * sum_w
        )
        better = (gain > best) & (fit > 0)
        best = torch.where(better, gain, best)
        scale = torch.where(better, fit, scale)
        minimum = torch.where(better, offset, minimum)
    return scale, -minimum


def _regression(sum_w: Tensor, sum_x: Tensor, sum_l: Tensor, sum_l2: Tensor, sum_xl: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slope and the offset <= 0 of the weighted regression of values x on codes l; NaN if there is none."""
    determinant = sum_w * sum_l2 - sum_l * sum_l
    determinant = torch.where(determinant > 0, determinant, torch.nan)
    offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    slope = torch.where(offset > 0, sum_xl / sum_l2, (sum_w * sum_xl - sum_x * sum_l) / determinant)
    return slope, offset.clamp(max=0.0)


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize values >= 0 [blocks, 8, 1] to 0 .. 63 with a scale per block [blocks, 1, 1], as written in float16."""
    scale = _as_written(values.amax(dim=1, keepdim=True) / 63)
    return (values * _reciprocal(scale)).round().clamp(0, 63), scale


def _nearest_codes(groups: Tensor, scale: Tensor, minimum: Tensor, largest: int) -> Tensor:
    return ((groups + minimum) * _reciprocal(scale)).round().clamp(0, largest)


def _fit_block(groups: Tensor, steps: Tensor, offsets: Tensor, start: Tensor) -> Tensor:
    """Return d and dmin [2, blocks, 1, 1] of the smallest squared error of ``d * steps - dmin * offsets``.

    ``start`` where the two can't be told apart, or where the fit leaves what is allowed.
    """

    def total(values: Tensor) -> Tensor:
        return values.sum(dim=(1, 2), keepdim=True)

    offsets = offsets.expand_as(steps)
    a, b, c = total(steps * steps), total(steps * offsets), total(offsets * offsets)
    x, y = total(steps * groups), total(offsets * groups)
    determinant = a * c - b * b
    fit = torch.stack([(c * x - b * y) / determinant, (b * x - a * y) / determinant])
    usable = (determinant > 1e-6 * a * c) & (fit > 0).all(dim=0) & fit.isfinite().all(dim=0)
    alone = torch.stack([x / a, torch.zeros_like(x)])
    fit = torch.where((c == 0) & (a > 0) & (x > 0), alone, torch.where(usable, fit, start))
    return _as_written(fit)


def _codes_with_minimum(blocks: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize blocks [blocks, 256] to codes [blocks, 8, 32], six-bit scales and minimums [blocks, 8], d and dmin."""
    groups = blocks.unflatten(1, (8, 32))
    weights = groups.square().mean(dim=-1, keepdim=True).sqrt() + groups.abs()
    found = _search_scale_and_minimum(groups, weights, largest)
    (scales, d), (minimums, dmin) = _six_bits(found[0]), _six_bits(found[1])
    best = torch.full((len(blocks), 1, 1), torch.inf, device=blocks.device)
    result = torch.zeros_like(groups), torch.stack([d, dmin])
    settings = torch.stack([d, dmin])
    for _ in range(3):  # codes for the scales, then scales for the codes
        codes = _nearest_codes(groups, settings[0] * scales, settings[1] * minimums, largest)
        error = settings[0] * scales * codes - settings[1] * minimums - groups
        error = (error * error).sum(dim=(1, 2), keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        result = torch.where(better, codes, result[0]), torch.where(better, settings, result[1])
        settings = _fit_block(groups, scales * codes, minimums, settings)
    return result[0].to(torch.uint8), scales.to(torch.uint8), minimums.to(torch.uint8), result[1]


def _pack_scales_and_minimums(scales: Tensor, minimums: Tensor) -> Tensor:
    """Pack six-bit scales and minimums, each [blocks, 8], to the twelve bytes of Q4_K and Q5_K."""
    high_scales, high_minimums = scales[:, 4:], minimums[:, 4:]
    return torch.cat(
        [
            scales[:, :4] | ((high_scales >> 4) << 6),
            minimums[:, :4] | ((high_minimums >> 4) << 6),
            (high_scales & 15) | ((high_minimums & 15) << 4),
        ],
        dim=1,
    )


def _finite(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks with zeros for those that are not all finite, and which those are [blocks, 1]."""
    bad = ~blocks.isfinite().all(dim=1, keepdim=True)
    return torch.where(bad, 0.0, blocks), bad


def _head(d: Tensor, bad: Tensor) -> Tensor:
    return _float16_bytes(torch.where(bad, torch.nan, d.flatten(1)))


def encode_q4_k(blocks: Tensor) -> Tensor:
    """Four bits in 8 groups of 32 with six-bit scales and minimums."""
    blocks, bad = _finite(blocks)
    codes, scales, minimums, (d, dmin) = _codes_with_minimum(blocks, 15)
    packed = _pack_scales_and_minimums(scales.flatten(1), minimums.flatten(1))
    nibbles = _pack_fields(codes.unflatten(1, (4, 2)), 4).flatten(1)
    return torch.cat([_head(d, bad), _head(dmin, bad), packed, nibbles], dim=1)


def encode_q5_k(blocks: Tensor) -> Tensor:
    """Five bits in 8 groups of 32 with six-bit scales and minimums."""
    blocks, bad = _finite(blocks)
    codes, scales, minimums, (d, dmin) = _codes_with_minimum(blocks, 31)
    packed = _pack_scales_and_minimums(scales.flatten(1), minimums.flatten(1))
    nibbles = _pack_fields((codes & 15).unflatten(1, (4, 2)), 4).flatten(1)
    return torch.cat([_head(d, bad), _head(dmin, bad), packed, _pack_fields(codes >> 4, 1), nibbles], dim=1)


def _search_scale(groups: Tensor, largest: int) -> Tensor:
    """Find for each group [..., n] the scale [..., 1] of the smallest error weighted by the elements' squares.

    Codes are -``largest`` .. ``largest`` - 1.
    """
    weights = groups * groups
    extreme = _largest(groups.flatten(0, -2)).unflatten(0, groups.shape[:-1])
    inverse = torch.where(extreme.abs() < SMALLEST_GROUP, 0.0, 1.0 / extreme)
    unit = groups * inverse
    weighted = weights * groups
    best, best_scale = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for step in SYMMETRIC_STEPS:
        codes = (unit * -(largest + step)).round_().clamp_(-largest, largest - 1)
        sum_xl = (weighted * codes).sum(dim=-1, keepdim=True)
        sum_l2 = (weights * codes * codes).sum(dim=-1, keepdim=True)
        scale = torch.where(sum_l2 > 0, sum_xl / sum_l2, 0.0)
        gain = scale * sum_xl
        better = gain > best
        best, best_scale = torch.where(better, gain, best), torch.where(better, scale, best_scale)
    # Weights so small that their squares underflow.
    return torch.where(best_scale == 0, extreme / -largest, best_scale)


def encode_q6_k(blocks: Tensor) -> Tensor:
    """Six bits in 16 groups of 16 with signed eight-bit scales."""
    blocks, bad = _finite(blocks)
    groups = blocks.unflatten(1, (16, 16))
    found = _search_scale(groups, 32).flatten(1)
    d = _as_written(_largest(found) / -128)
    scales = (found * _reciprocal(d)).round().clamp(-128, 127)
    step = (d * scales).unsqueeze(-1)
    codes = (groups * _reciprocal(step)).round().clamp(-32, 31).to(torch.int16).flatten(1) + 32
    codes = codes.to(torch.uint8)
    low = _pack_fields((codes & 15).unflatten(1, (2, 2, 64)), 4).flatten(1)
    high = _pack_fields((codes >> 4).unflatten(1, (2, 4, 32)), 2).flatten(1)
    return torch.cat([low, high, scales.to(torch.int8).view(torch.uint8), _head(d, bad)], dim=1)


def encode_f32(blocks: Tensor) -> Tensor:
    """Float32 as it is."""
    return blocks.contiguous().view(torch.uint8)


def encode_f16(blocks: Tensor) -> Tensor:
    """Float16, rounded to nearest even."""
    return blocks.half().contiguous().view(torch.uint8)


def encode_bf16(blocks: Tensor) -> Tensor:
    """Bfloat16, rounded to nearest even."""
    return blocks.bfloat16().contiguous().view(torch.uint8)


ENCODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "F32": encode_f32,
    "F16": encode_f16,
    "BF16": encode_bf16,
    "Q8_0": encode_q8_0,
    "Q4_0": encode_q4_0,
    "Q4_1": encode_q4_1,
    "Q5_0": encode_q5_0,
    "Q5_1": encode_q5_1,
    "Q4_K": encode_q4_k,
    "Q5_K": encode_q5_k,
    "Q6_K": encode_q6_k,
}
