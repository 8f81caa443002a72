"""Int8 W8A8 on CPUs with AVX512-VNNI or AMX by the native helper: rows are quantized, multiplied and scaled.

The weight is read in the checkpoint's own layout, so that a mapped file is multiplied with as it is and loading moves
no byte. The layer is one operator, compiled too: quantizing in the compiler's code, fused with what precedes it, took
longer than the helper's own pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowbit.ops.canonical import prepare, restore
from lowbit.ops.cpu import helper, native
from lowbit.ops.cpu.elementwise import gate
from lowbit.ops.dispatch import Problem
from lowbit.ops.library import define_operator
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "gated_linear", "linear", "linears", "prepare", "restore"]

ZERO_POINT = 128
LARGEST_IN_FEATURES = 1 << 17


def can_run(problem: Problem) -> str | None:
    """Return why ``problem`` can't be run, ``None`` when it can."""
    if not helper.available():
        return f"native helper {helper.refusal()}"
    if not helper.multiplies_int8():
        return "the CPU has no AVX512-VNNI"
    if problem.out_features % native.PANEL or problem.in_features % 4:
        return f"needs output features in multiples of {native.PANEL} and input features in multiples of 4"
    if problem.in_features > LARGEST_IN_FEATURES:
        return f"int32 sums may overflow with more than {LARGEST_IN_FEATURES} input features"
    return native.dtype_refusal(problem.dtype)


@torch.no_grad()
def scale_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply quantized activations by a packed weight and scale the result.

    Args:
        x: uint8 [M, K], int8 values + 128.
        x_scale: float32 [M, 1].
        packed: from ``pack_weight``.
        weight_scale: float32 [N, 1].
        bias: [N] or ``None``.
        out_dtype: of the result.

    Returns:
        [M, N] in ``out_dtype``, with the numbers of ``lowbit.ops.int8.int8_scaled_mm``.
    """
    output = torch.empty((x.shape[0], weight_scale.shape[0]), dtype=out_dtype)
    bias = None if bias is None else bias.float()
    native.int8_product(x.contiguous(), x_scale.contiguous(), packed, weight_scale, bias, output)
    return output


def _fake_scale_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight_scale.shape[0]), dtype=out_dtype)


product_operator = define_operator(
    "int8_native_scaled_mm(Tensor x, Tensor x_scale, Tensor packed, Tensor weight_scale, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor",
    scale_product,
    _fake_scale_product,
)


@torch.no_grad()
def _multiply(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    are_gated: bool,
) -> list[torch.Tensor]:
    if are_gated and not helper.has_amx():
        return [gate(*_multiply(x, packed, weight_scale, bias, False))]
    x = x if x.stride(1) == 1 else x.contiguous()
    outputs = _fake_multiply(x, packed, weight_scale, bias, are_gated)
    entries = zip(packed, weight_scale, bias, strict=True)
    weights = [native.Int8Weight(weight, scale, None if b is None else b.float()) for weight, scale, b in entries]
    native.int8_linears(x, weights, outputs, are_gated=are_gated)
    return outputs


def _fake_multiply(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    are_gated: bool,
) -> list[torch.Tensor]:
    return [x.new_empty((x.shape[0], scale.shape[0])) for scale in weight_scale[: 1 if are_gated else None]]


multiply_operator = define_operator(
    "int8_native_linears(Tensor x, Tensor[] packed, Tensor[] weight_scale, Tensor?[] bias, bool are_gated) -> Tensor[]",
    _multiply,
    _fake_multiply,
)


def _multiply_layers(
    x: torch.Tensor, layers: Sequence[Prepared], bias: Sequence[torch.Tensor | None], are_gated: bool
) -> list[torch.Tensor]:
    weights, scales = [layer.weight for layer in layers], [layer.scales for layer in layers]
    results: list[torch.Tensor] = multiply_operator(x.reshape(-1, x.shape[-1]), weights, scales, bias, are_gated)
    return results


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a W8A8 linear layer: ``lowbit.ops.int8.linear`` with ``packed`` from ``pack_weight``."""
    (result,) = linears(x, [prepared], [bias])
    return result


def linears(x: torch.Tensor, layers: Sequence[Prepared], bias: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Apply several layers as ``linear`` does, with one input that is quantized once."""
    results = _multiply_layers(x, layers, bias, False)
    return [result.reshape(*x.shape[:-1], result.shape[1]) for result in results]


def gated_linear(x: torch.Tensor, layers: Sequence[Prepared], bias: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Apply two layers of equal output features: silu of the first one's result times the second's.

    With AMX in the pass that scales the products, so that neither result is rounded or written.
    """
    results = _multiply_layers(x, layers, bias, True)
    result = results[0]
    return result.reshape(*x.shape[:-1], result.shape[1])
