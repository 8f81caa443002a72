"""NVFP4 in Triton: quantization of activations and products of two quantized operands.

Quantized elements and scales are the reference's, bit for bit. Products run on the tensor cores' own scaled units where
there are (SM 10.x), else on operands decoded in registers (``triton_emulated``).
"""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from lowbit.ops import nvfp4 as reference
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.dispatch import Problem
from lowbit.ops.fp8 import E4M3
from lowbit.ops.library import register_kernel
from lowbit.ops.nvfp4 import GROUP_SIZE, SMALLEST_SCALE, quantize_activation, scaled_mm_operator
from lowbit.ops.triton.launch import device_refusal, expect_shape, on_device_of, row_major, target_of
from lowbit.ops.triton.microscaling import E2M1, E2M1_MAX, encode_e2m1, multiplies_scaled, multiply
from lowbit.ops.triton.rounding import E4M3_MAX, INFINITY_BITS, decode_e4m3, encode_e4m3, magnitude_bits
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]

LEAST_SCALE = tl.constexpr(SMALLEST_SCALE)
KINDS: Mapping[str, Any] = {"KIND": E2M1.value, "SCALE_E4M3": True, "GROUP": GROUP_SIZE, "DUAL": 0}
# Groups a program of the quantization handles: 512 columns. Not measured.
BLOCK_GROUPS = 32


@triton.jit
def quantize_kernel(
    x: tl.tensor,
    elements: tl.tensor,
    scale: tl.tensor,
    global_scale: tl.tensor,
    columns: tl.tensor,
    groups: tl.tensor,
    row_stride: tl.tensor,
    global_row: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Quantize BLOCK groups of one row a program.

    x: [rows, columns] floating, rows ``row_stride`` apart; elements: bytes [rows, columns / 2]; scale: bytes
    [rows, groups]; global_scale: float32, rows ``global_row`` apart.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.arange(0, GROUP // 2)
    place = group[:, None] * GROUP + 2 * pair[None, :]
    even = tl.load(x + row * row_stride + place, mask=place < columns, other=0.0).to(tl.float32)
    odd = tl.load(x + row * row_stride + place + 1, mask=place + 1 < columns, other=0.0).to(tl.float32)
    outer = tl.load(global_scale + row * global_row)
    bits = tl.max(tl.maximum(magnitude_bits(even), magnitude_bits(odd)), axis=1)
    exact = tl.math.div_rn(bits.to(tl.float32, bitcast=True), tl.zeros_like(bits).to(tl.float32) + E2M1_MAX * outer)
    # As the reference: NaN stays NaN in the comparison's other branch, groups of zeros have the scale 1.
    bounded = tl.where(exact < LEAST_SCALE, LEAST_SCALE, tl.where(exact > E4M3_MAX, E4M3_MAX, exact))
    rounded = tl.where(bits == 0, 1.0, bounded)
    byte = encode_e4m3(tl.where(bits < INFINITY_BITS, rounded, float("nan")), False)
    tl.store(scale + row * groups + group, byte, mask=group < groups)
    divisor = (decode_e4m3(byte).to(tl.float32) * outer)[:, None]
    code = encode_e2m1(tl.math.div_rn(even, divisor)) | (encode_e2m1(tl.math.div_rn(odd, divisor)) << 4)
    tl.store(elements + row * (columns // 2) + place // 2, code.to(tl.uint8), mask=place < columns)


def quantize_nvfp4(
    x: torch.Tensor, global_scale: torch.Tensor, search: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize under a known global scale; arguments and results as in ``lowbit.ops.nvfp4``."""
    if search:
        return reference.quantize_nvfp4(x, global_scale, search)
    columns = x.shape[-1]
    groups = -(-columns // GROUP_SIZE)
    elements = torch.empty((*x.shape[:-1], columns // 2), dtype=torch.uint8, device=x.device)
    scale = torch.empty((*x.shape[:-1], groups), dtype=torch.uint8, device=x.device)
    if scale.numel() > 0:
        rows = row_major(x.reshape(-1, columns))
        with on_device_of(x):
            quantize_kernel[(rows.shape[0], -(-groups // BLOCK_GROUPS))](
                rows,
                elements,
                scale,
                global_scale.contiguous(),
                columns,
                groups,
                rows.stride(0),
                0 if global_scale.numel() == 1 else 1,
                GROUP=GROUP_SIZE,
                BLOCK=BLOCK_GROUPS,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return elements, scale.view(E4M3)


def quantize_nvfp4_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize with a global scale per row; arguments and results as in ``lowbit.ops.nvfp4``."""
    global_scale = reference.global_scale_of(x.abs().amax(dim=-1, keepdim=True))
    global_scale = torch.where(torch.isfinite(global_scale), global_scale, torch.nan)
    return *quantize_nvfp4(x, global_scale), global_scale


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
    """Multiply two matrices in NVFP4; arguments and result as in ``lowbit.ops.nvfp4``."""
    expect_shape("weight", weight, weight.shape[0], x.shape[1])
    expect_shape("x_scale", x_scale, x.shape[0], weight_scale.shape[1])
    outer = x_global_scale.reshape(-1, 1).contiguous(), weight_global_scale.reshape(1, 1)
    left, right = (x.contiguous(), x_scale.contiguous()), (weight.contiguous(), weight_scale.contiguous())
    return multiply(*left, outer[0], *right, outer[1], bias, out_dtype, {**KINDS, "X_KIND": E2M1.value})


for _key in ("CUDA", "XPU"):
    register_kernel("quantize_nvfp4", _key, quantize_nvfp4)
    register_kernel("quantize_nvfp4_per_token", _key, quantize_nvfp4_per_token)
    register_kernel("nvfp4_scaled_mm", _key, nvfp4_scaled_mm)


def only_weights(problem: Problem) -> str | None:
    """Refuse layers whose activations are not to be quantized (W4A16)."""
    return "quantizes activations; the format is weight-only" if problem.format.activation is None else None


def can_run(problem: Problem) -> str | None:
    """Return why the kernels here can't run ``problem``, or ``None``."""
    refusal = device_refusal(problem.device, problem.dtype) or only_weights(problem)
    if refusal is not None:
        return refusal
    target = target_of(problem.device)
    return None if multiplies_scaled(target, True) else f"{target} does not multiply NVFP4 elements"


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a W4A4 linear layer; arguments and result as in ``lowbit.ops.nvfp4.linear``, never ``weight_only``."""
    assert prepared.format.activation is not None
    packed, weight_scale, global_scale = prepared.weight, prepared.scales, prepared.outer_scale
    assert global_scale is not None
    elements, scale, x_global = quantize_activation(x.reshape(-1, x.shape[-1]), prepared.input_scale)
    result: torch.Tensor = scaled_mm_operator(
        elements, scale, x_global, packed, weight_scale, global_scale, bias, x.dtype
    )
    return result.reshape(*x.shape[:-1], packed.shape[0])
