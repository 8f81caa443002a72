"""GGUF weights on CPUs: decoded a block of output channels at a time and multiplied by torch.

Products are made in the precision this CPU is fastest in: in the activations' own where it has instructions for it,
else in float32.
"""

from __future__ import annotations

import torch

from lowbit.ops import gguf
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.cpu import helper, native
from lowbit.ops.cpu.blocked import Decode, finish, multiply, multiply_float32
from lowbit.ops.cpu.features import fast_matmul_dtype
from lowbit.ops.cpu.weight_only import can_run
from lowbit.ops.cpu.workspace import scratch
from lowbit.ops.gguf_decode_small import SMALL_DECODERS
from lowbit.ops.gguf_types import block_type
from lowbit.ops.library import define_operator
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]

# From so many rows on the decoded weight is read so often that keeping it in the cache gains nothing.
MANY_ROWS = 128
DECODED_BYTES = 64 << 20


def helper_decodes(weight_type: str) -> bool:
    """Tell whether the native helper decodes the type; plain torch decodes FP4 and what is below four bits."""
    return weight_type not in SMALL_DECODERS and helper.available()


def gguf_dequantize(raw: torch.Tensor, weight_type: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode rows of blocks; arguments and result as in ``lowbit.ops.gguf``."""
    kind = block_type(weight_type)
    if not helper_decodes(kind.name) or dtype not in native.ELEMENT_TYPES or raw.dtype != torch.uint8 or raw.ndim != 2:
        return gguf.gguf_dequantize(raw, weight_type, dtype)
    result = torch.empty((raw.shape[0], kind.columns(raw.shape[1])), dtype=dtype)
    native.gguf_decode(raw.contiguous(), kind.number, result)
    return result


def decode_rows(packed: torch.Tensor, weight_type: str, first: int, output: torch.Tensor) -> None:
    """Write rows of ``packed``, from ``first`` on, to ``output``, dense [rows, K] float32, bfloat16 or float16."""
    rows = packed[first : first + output.shape[0]]
    if helper_decodes(weight_type):
        native.gguf_decode(rows, block_type(weight_type).number, output)
    else:
        output.copy_(gguf.gguf_dequantize(rows, weight_type, output.dtype))


@torch.no_grad()
def multiply_blocked(
    x: torch.Tensor, packed: torch.Tensor, weight_type: str, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N] in the dtype of ``x`` [M, K]."""

    def decode(first: int, weight: torch.Tensor) -> None:
        decode_rows(packed, weight_type, first, weight)

    features = packed.shape[0]
    if fast_matmul_dtype(x.dtype) == x.dtype != torch.float32:
        return multiply(x, features, decode, None if bias is None else bias.to(x.dtype))
    output = torch.empty((x.shape[0], features), dtype=x.dtype)
    bias = None if bias is None else bias.float().contiguous()
    if x.shape[0] < MANY_ROWS:
        multiply_float32(x.float(), features, decode, output, None, None, bias)
    else:
        _multiply_many_rows(x.float(), features, decode, output, bias)
    return output


def _multiply_many_rows(
    x: torch.Tensor, features: int, decode: Decode, output: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Write ``x @ weight.T + bias`` to ``output``: few large products, which other work on the cores disturbs less."""
    step = max(DECODED_BYTES // (4 * x.shape[1]) // 64 * 64, 64)
    for first in range(0, features, step):
        last = min(first + step, features)
        weight = scratch("weight", (last - first, x.shape[1]), torch.float32)
        decode(first, weight)
        product = scratch("product", (x.shape[0], last - first), torch.float32)
        torch.mm(x, weight.t(), out=product)
        finish(product, None, None, None if bias is None else bias[first:last], output[:, first:last])


def _fake_mm(x: torch.Tensor, packed: torch.Tensor, weight_type: str, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


blocked_operator = define_operator(
    "gguf_blocked_mm(Tensor x, Tensor packed, str weight_type, Tensor? bias=None) -> Tensor",
    multiply_blocked,
    _fake_mm,
)


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear layer; arguments and result as in ``lowbit.ops.gguf.linear``."""
    packed, weight_type = prepared.weight, prepared.format.name
    rows = x.reshape(-1, x.shape[-1])
    product = blocked_operator if torch.compiler.is_compiling() else multiply_blocked
    result: torch.Tensor = product(rows, packed, weight_type, bias)
    return result.reshape(*x.shape[:-1], packed.shape[0])
