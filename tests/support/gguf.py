"""Random weights in GGUF's block types."""

from __future__ import annotations

import torch

from lowbit.ops.gguf import BLOCK_TYPES, gguf_dequantize
from lowbit.ops.gguf_decode_small import SMALL_DECODERS


def random_blocks(kind: str, blocks: int = 3000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(BLOCK_TYPES[kind].number)
    return torch.randint(0, 256, (blocks // 4, 4 * BLOCK_TYPES[kind].bytes), dtype=torch.uint8, generator=generator)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    view = {4: torch.int32, 2: torch.int16}[left.dtype.itemsize]
    same = (left.view(view) == right.view(view)) | (left.isnan() & right.isnan())
    return left.shape == right.shape and bool(same.all())


NATIVE_TYPES = [kind for kind in BLOCK_TYPES if kind not in SMALL_DECODERS]


def random_weight(kind: str, features: int, columns: int) -> torch.Tensor:
    """Return blocks of random bytes: NaN and infinity in every seventh row only, no sum out of float32's range."""
    block = BLOCK_TYPES[kind]
    raw = torch.randint(0, 256, (features, columns // block.elements, block.bytes), dtype=torch.uint8)
    decoded = gguf_dequantize(raw.flatten(1), kind).view(features, -1, block.elements)
    finite = decoded.isfinite().all(dim=2)
    finite[::7] = True
    raw[~finite | (decoded.abs() > 1e30).logical_and(decoded.isfinite()).any(dim=2)] = 0
    return raw.flatten(1)
