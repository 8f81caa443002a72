"""Layers of every format that kernels for few rows multiply."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lowbit.ops import int8, w4a16, w8a16
from lowbit.ops.cpu import gguf_native, int8_weight_only
from lowbit.ops.cpu import w4a16 as cpu_w4a16
from lowbit.ops.cpu import w8a16 as cpu_w8a16
from lowbit.ops.gguf import gguf_dequantize
from lowbit.ops.gguf_types import BLOCK_TYPES
from tests.support import calls
from tests.support.four_bits import Layer
from tests.support.gguf import NATIVE_TYPES, random_weight

Linear = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


UNIT = 128  # activations with one scale


MOST_INTEGER_ROWS = {"AVX-512": 4, "AVX512-BF16": 4, "AMX": 2}  # of bfloat16


GGUF_TYPES = [name for name in NATIVE_TYPES if BLOCK_TYPES[name].elements > 1]


GROUPS = [f"{kind} {size}" for size in (32, 64, 128, 0) for kind in ("symmetric", "asymmetric")]


def make(kind: str, features: int, columns: int) -> tuple[Linear, torch.Tensor]:
    """Return a layer of a random weight [features, columns] and what the weight stands for, float64."""
    weight = torch.randn(features, columns) / 8
    if kind in GGUF_TYPES:
        block = BLOCK_TYPES[kind]
        blocks = random_weight(kind, features, columns).view(features, -1, block.bytes)
        decoded = gguf_dequantize(blocks.flatten(1), kind).view(features, -1, block.elements)
        blocks[~(decoded.abs() < 10).all(dim=2)] = 0
        raw = blocks.flatten(1)
        return lambda x, bias: calls.linear(gguf_native, x, raw, kind, bias), gguf_dequantize(raw, kind).double()
    if kind == "int8":
        codes, scale = int8.quantize_int8_per_token(weight)
        return lambda x, bias: int8_weight_only.int8_weight_only_mm(x, codes, scale, bias), (codes * scale).double()
    if kind.startswith("int8 "):
        codes = torch.randint(-128, 128, (features, columns), dtype=torch.int8)
        scale = torch.rand(features, columns // 128 if "128" in kind else 1) / 100
        zero = torch.randint(-128, 129, scale.shape, dtype=torch.int16) if "asymmetric" in kind else None
        decoded = w8a16.dequantize_int8_groups(codes, scale, zero).double()
        return lambda x, bias: cpu_w8a16.w8a16_mm(x, codes, scale, bias, zero), decoded
    if kind in GROUPS:
        name, size = kind.split()
        tensors = w4a16.quantize_int4_per_group(weight, int(size) or columns, name == "symmetric", torch.bfloat16)
        decoded = w4a16.dequantize_int4(*tensors).double()
        return lambda x, bias: cpu_w4a16.w4a16_mm(x, tensors[0], tensors[1], bias, tensors[2]), decoded
    layer = Layer(kind, features, columns)
    return layer.linear, layer.weight().double()
