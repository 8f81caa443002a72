"""MXFP8, MXFP4 and MXFP4 with a second scale in Triton: quantization and products.

Quantized elements and scales are the reference's, bit for bit. Products run on the chip's own scaled matrix units where
it has them (SM 10.x, gfx950), else on operands decoded in registers: ``triton_emulated``, which has to be asked for by
name, because the weight-only kernel does less there and rounds nothing.
"""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lowbit.ops import mx as reference
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.dispatch import Problem
from lowbit.ops.fp8 import E4M3
from lowbit.ops.library import register_kernel
from lowbit.ops.mx import DUAL_GROUP_SIZE, ELEMENTS, GROUP_SIZE, quantize_activation, scaled_mm_operator
from lowbit.ops.triton import microscaling
from lowbit.ops.triton.launch import device_refusal, expect_shape, on_device_of, row_major, target_of
from lowbit.ops.triton.microscaling import E2M1, E2M1_MAX, decode_e8m0, encode_e2m1, multiplies_scaled, multiply
from lowbit.ops.triton.rounding import INFINITY_BITS, encode_e4m3, magnitude_bits, scale_of
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]

# Groups a program of the quantization handles: one dual group.
BLOCK_GROUPS = DUAL_GROUP_SIZE // GROUP_SIZE


@triton.jit
def quantize_kernel(
    x: tl.tensor,
    elements: tl.tensor,
    scale: tl.tensor,
    dual_scale: tl.tensor,
    columns: tl.tensor,
    groups: tl.tensor,
    row_stride: tl.tensor,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    EXPONENT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Quantize BLOCK groups of one row a program; with ``dual_scale`` (not None) they are one dual group.

    x: [rows, columns] floating, rows ``row_stride`` apart; elements: bytes; scale: uint8 [rows, groups]; dual_scale:
    float32 [rows, programs of a row]. OFFSET and EXPONENT: see ``lowbit.ops.mx.scale_codes``.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.arange(0, GROUP // 2)
    place = group[:, None] * GROUP + 2 * pair[None, :]
    even = tl.load(x + row * row_stride + place, mask=place < columns, other=0.0).to(tl.float32)
    odd = tl.load(x + row * row_stride + place + 1, mask=place + 1 < columns, other=0.0).to(tl.float32)
    if dual_scale is not None:
        largest = tl.max(tl.maximum(magnitude_bits(even), magnitude_bits(odd)))
        dual = scale_of(largest, E2M1_MAX)
        even = tl.math.div_rn(even, dual)
        odd = tl.math.div_rn(odd, dual)
        tl.store(dual_scale + row * tl.num_programs(1) + tl.program_id(1), dual)
    absmax = tl.max(tl.maximum(magnitude_bits(even), magnitude_bits(odd)), axis=1)
    code = tl.minimum(tl.maximum(((absmax + OFFSET) >> 23) - EXPONENT, 0), 254)
    code = tl.where(absmax < INFINITY_BITS, code, 255).to(tl.uint8)
    tl.store(scale + row * groups + group, code, mask=group < groups)
    divisor = decode_e8m0(code)[:, None]
    even = tl.math.div_rn(even, divisor)
    odd = tl.math.div_rn(odd, divisor)
    if KIND == E2M1:
        byte = encode_e2m1(even) | (encode_e2m1(odd) << 4)
        tl.store(elements + row * (columns // 2) + place // 2, byte.to(tl.uint8), mask=place < columns)
    else:
        tl.store(elements + row * columns + place, encode_e4m3(even, False), mask=place < columns)
        tl.store(elements + row * columns + place + 1, encode_e4m3(odd, False), mask=place + 1 < columns)


def _quantize(
    x: torch.Tensor, element: str, rounding: str, dual: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    columns = x.shape[-1]
    groups = -(-columns // GROUP_SIZE)
    lead = x.shape[:-1]
    is_fp8 = element == "mxfp8"
    elements = torch.empty((*lead, columns if is_fp8 else columns // 2), dtype=torch.uint8, device=x.device)
    scale = torch.empty((*lead, groups), dtype=torch.uint8, device=x.device)
    programs = -(-groups // BLOCK_GROUPS)
    dual_scale = torch.empty((*lead, programs), dtype=torch.float32, device=x.device) if dual else None
    if scale.numel() > 0:
        rows = row_major(x.reshape(-1, columns))
        kind = ELEMENTS[element]
        with on_device_of(x):
            quantize_kernel[(rows.shape[0], programs)](
                rows,
                elements,
                scale,
                dual_scale,
                columns,
                groups,
                rows.stride(0),
                KIND=(microscaling.E4M3 if is_fp8 else E2M1).value,
                OFFSET=kind.offsets[rounding],
                EXPONENT=kind.exponent,
                GROUP=GROUP_SIZE,
                BLOCK=BLOCK_GROUPS,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return (elements.view(E4M3) if is_fp8 else elements), scale, dual_scale


def quantize_mxfp8(x: torch.Tensor, rounding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to mxfp8; arguments and results as in ``lowbit.ops.mx``."""
    if rounding == "mse":
        return reference.quantize_mxfp8(x, rounding)
    return _quantize(x, "mxfp8", rounding)[:2]


def quantize_mxfp4(x: torch.Tensor, rounding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to mxfp4; arguments and results as in ``lowbit.ops.mx``."""
    if rounding == "mse":
        return reference.quantize_mxfp4(x, rounding)
    return _quantize(x, "mxfp4", rounding)[:2]


def quantize_mxfp4_dualscale(x: torch.Tensor, rounding: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize to mxfp4 with a second scale; arguments and results as in ``lowbit.ops.mx``."""
    if rounding == "mse":
        return reference.quantize_mxfp4_dualscale(x, rounding)
    packed, scale, dual_scale = _quantize(x, "mxfp4", rounding, dual=True)
    assert dual_scale is not None
    return packed, scale, dual_scale


def kinds(weight: torch.Tensor, dual_scale: torch.Tensor | None) -> dict[str, int | bool]:
    """Return the product's compile-time arguments for a weight."""
    return {
        "KIND": (E2M1 if weight.dtype == torch.uint8 else microscaling.E4M3).value,
        "SCALE_E4M3": False,
        "GROUP": GROUP_SIZE,
        "DUAL": 0 if dual_scale is None else DUAL_GROUP_SIZE,
    }


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
    """Multiply two MX matrices; arguments and result as in ``lowbit.ops.mx``."""
    expect_shape("weight", weight, weight.shape[0], x.shape[1])
    expect_shape("x_scale", x_scale, x.shape[0], weight_scale.shape[1])
    constants = kinds(weight, weight_dual_scale)
    return multiply(
        x.contiguous(),
        x_scale.contiguous(),
        None if x_dual_scale is None else x_dual_scale.contiguous(),
        weight.contiguous(),
        weight_scale.contiguous(),
        None if weight_dual_scale is None else weight_dual_scale.contiguous(),
        bias,
        out_dtype,
        {**constants, "X_KIND": constants["KIND"]},
    )


for _key in ("CUDA", "XPU"):
    register_kernel("quantize_mxfp8", _key, quantize_mxfp8)
    register_kernel("quantize_mxfp4", _key, quantize_mxfp4)
    register_kernel("quantize_mxfp4_dualscale", _key, quantize_mxfp4_dualscale)
    register_kernel("mx_scaled_mm", _key, mx_scaled_mm)


def can_run(problem: Problem) -> str | None:
    """Return why the kernels here can't run ``problem``, or ``None``."""
    refusal = device_refusal(problem.device, problem.dtype)
    if refusal is not None:
        return refusal
    target = target_of(problem.device)
    return None if multiplies_scaled(target, False) else f"{target} does not multiply MX elements"


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear layer; arguments and result as in ``lowbit.ops.mx.linear``."""
    packed, weight_scale, dual_scale = prepared.weight, prepared.scales, prepared.outer_scale
    elements, scale, x_dual_scale = quantize_activation(x.reshape(-1, x.shape[-1]), packed, dual_scale)
    result: torch.Tensor = scaled_mm_operator(
        elements, scale, packed, weight_scale, bias, x.dtype, x_dual_scale, dual_scale
    )
    return result.reshape(*x.shape[:-1], packed.shape[0])
