"""Linear layers whose weight is decoded a few output channels at a time.

The decoded block stays in the cache between being written and being multiplied, so memory is read at the size of the
quantized weight, and no decoded copy of a whole layer exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lowbit.ops.cpu import helper, native
from lowbit.ops.cpu.workspace import scratch

# Bytes of a decoded block. With few rows it should stay in the second-level cache; with many, reading the activations
# once per block costs more: of 1 ... 16 MiB on 3840x3840 layers, 4 is the fastest with 64 rows and 16 with 1,088.
DECODED_BYTES = 4 << 20
DECODED_BYTES_MANY_ROWS = 16 << 20
MANY_ROWS = 512
PRODUCT_BYTES = 4 << 20  # of a block of float32 results

Decode = Callable[[int, torch.Tensor], None]
"""Writes the rows of the weight from the first argument on to the second, dense [channels, K]."""


def channel_blocks(x: torch.Tensor, features: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) output channels of the blocks of a weight for x [M, K], in multiples of 64."""
    size = DECODED_BYTES_MANY_ROWS if x.shape[0] >= MANY_ROWS else DECODED_BYTES
    step = max(size // (x.shape[1] * x.dtype.itemsize) // 64 * 64, 64)
    for first in range(0, features, step):
        yield first, min(first + step, features)


def multiply_float32(
    x: torch.Tensor,
    features: int,
    decode: Decode,
    output: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Write ``x @ weight.T * row_scale * column_scale.T + bias`` to ``output``, computed in float32 and rounded once.

    Args:
        x: float32 [M, K].
        features: N.
        decode: writes float32 rows of the weight [N, K].
        output: [M, N] floating.
        row_scale: float32 [M, 1], or ``None`` together with ``column_scale``.
        column_scale: float32 [N, 1].
        bias: float32 [N] or ``None``.
    """
    columns = x.shape[1]
    for first, last in channel_blocks(x, features):
        weight = scratch("weight", (last - first, columns), torch.float32)
        decode(first, weight)
        height = max(PRODUCT_BYTES // (4 * (last - first)), 1)
        scale = None if column_scale is None else column_scale[first:last]
        part_bias = None if bias is None else bias[first:last]
        for top in range(0, x.shape[0], height):
            rows = slice(top, top + height)
            product = scratch("product", (min(height, x.shape[0] - top), last - first), torch.float32)
            torch.mm(x[rows], weight.t(), out=product)
            part_scale = None if row_scale is None else row_scale[rows]
            finish(product, part_scale, scale, part_bias, output[rows, first:last])


def finish(
    product: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Write the scaled ``product`` plus ``bias`` to ``output`` as ``native.scale_product`` does; overwrites it."""
    if helper.available():
        native.scale_product(product, row_scale, column_scale, bias, output)
        return
    if row_scale is not None and column_scale is not None:
        product.mul_(row_scale).mul_(column_scale.t())
    if bias is not None:
        product.add_(bias)
    output.copy_(product)


def multiply(x: torch.Tensor, features: int, decode: Decode, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N], computed by torch in the dtype of ``x`` [M, K].

    ``decode`` writes rows of the weight in that dtype.
    """
    output = torch.empty((x.shape[0], features), dtype=x.dtype)
    for first, last in channel_blocks(x, features):
        weight = scratch("weight", (last - first, x.shape[1]), x.dtype)
        decode(first, weight)
        part_bias = None if bias is None else bias[first:last]
        output[:, first:last] = torch.nn.functional.linear(x, weight, part_bias)
    return output
