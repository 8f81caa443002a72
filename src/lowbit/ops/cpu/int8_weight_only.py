"""Int8 weights with activations left as they are, on CPUs; see ``lowbit.ops.cpu.weight_only`` for how."""

from __future__ import annotations

import torch

from lowbit.ops import int8_weight_only
from lowbit.ops.cpu import native
from lowbit.ops.cpu.weight_only import has_few_rows, multiply_decoded, multiply_few_rows, supports

__all__ = ["int8_weight_only_mm", "linear", "pack_weight", "supports", "unpack_weight"]


def pack_weight(weight: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
    """Return ``weight`` int8 [N, K], dense."""
    return weight.contiguous()


def unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    """Return ``packed``: see ``pack_weight``."""
    return packed


@torch.no_grad()
def int8_weight_only_mm(
    x: torch.Tensor, packed: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply as ``lowbit.ops.int8_weight_only.int8_weight_only_mm`` does, with sums in float32."""
    packed, weight_scale = packed.contiguous(), weight_scale.contiguous()
    if has_few_rows(x):
        return multiply_few_rows(x, packed, weight_scale, bias, (1, packed.shape[1]))

    def decode(first: int, weight: torch.Tensor) -> None:
        last = first + weight.shape[0]
        if native.available():
            native.dequantize(packed[first:last], weight_scale[first:last], weight)
        else:
            weight.copy_(packed[first:last].float().mul_(weight_scale[first:last]))

    return multiply_decoded(x, packed.shape[0], decode, bias)


def linear(
    x: torch.Tensor, packed: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Apply a linear layer: ``lowbit.ops.int8_weight_only.linear``."""
    rows = x.reshape(-1, x.shape[-1])
    product = int8_weight_only.product_operator if torch.compiler.is_compiling() else int8_weight_only_mm
    result: torch.Tensor = product(rows, packed, weight_scale, bias)
    return result.reshape(*x.shape[:-1], packed.shape[0])
