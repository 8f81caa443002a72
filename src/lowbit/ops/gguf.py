"""Weights in the block types of GGUF files; activations are left as they are.

``gguf_dequantize`` here defines the numbers: a weight is what ggml's ``dequantize_row_*`` gives in float32, bit for
bit; a product is made of these values, accumulated in float32 and rounded once. The layouts are described where they
are decoded (``lowbit.ops.gguf_decode``), the search for scales where it is done (``lowbit.ops.gguf_encode``).
"""

from __future__ import annotations

import torch

from lowbit.errors import UnsupportedError
from lowbit.ops.canonical import can_run, prepare, restore
from lowbit.ops.dispatch import ANY_DEVICE, Implementation
from lowbit.ops.gguf_decode import DECODERS
from lowbit.ops.gguf_encode import ENCODERS
from lowbit.ops.gguf_types import BLOCK_TYPES, BlockType, block_type
from lowbit.ops.library import define_operator, register_kernel_lazily
from lowbit.ops.weight_format import Prepared

__all__ = [
    "BLOCK_TYPES",
    "IMPLEMENTATIONS",
    "QUANTIZABLE_TYPES",
    "BlockType",
    "can_run",
    "gguf_dequantize",
    "gguf_quantize",
    "linear",
    "prepare",
    "restore",
]

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("triton", "lowbit.ops.triton.gguf", frozenset({"cuda", "xpu"}), is_weight_only=True),
    Implementation("native", "lowbit.ops.cpu.gguf_native", frozenset({"cpu"}), is_weight_only=True),
    Implementation(
        "blocked",
        "lowbit.ops.cpu.gguf",
        frozenset({"cpu"}),
        slow="decoded by plain torch at every call",
        is_weight_only=True,
    ),
    Implementation(
        "reference",
        "lowbit.ops.gguf",
        ANY_DEVICE,
        slow="decodes the whole weight by plain torch at every call",
        is_weight_only=True,
    ),
)

QUANTIZABLE_TYPES: tuple[str, ...] = tuple(ENCODERS)
"""Types that ``gguf_quantize`` writes."""

# Elements decoded or quantized at once: what is made on the way stays in the cache, and memory bounded.
ELEMENTS_AT_ONCE = 1 << 20


def gguf_dequantize(raw: torch.Tensor, weight_type: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode rows of blocks.

    Args:
        raw: uint8 [rows, bytes per row].
        weight_type: a name of ``BLOCK_TYPES``, such as ``"Q4_K"``.
        dtype: of the result; the float32 values are rounded to it once.

    Returns:
        [rows, columns].

    Raises:
        UnsupportedError: a type that is not read, bytes per row that are not whole blocks, or ``raw`` of another dtype.
    """
    kind, columns = _check(raw, weight_type)
    result = torch.empty((raw.shape[0], columns), dtype=dtype, device=raw.device)
    step = max(ELEMENTS_AT_ONCE // max(columns, 1), 1)
    for first in range(0, raw.shape[0], step):
        part = raw[first : first + step]
        blocks = part.reshape(-1, kind.bytes)
        result[first : first + step] = DECODERS[kind.name](blocks).view(len(part), columns)
    return result


def gguf_quantize(weight: torch.Tensor, weight_type: str) -> torch.Tensor:
    """Quantize rows to blocks.

    Args:
        weight: [rows, columns], any floating dtype.
        weight_type: a name of ``QUANTIZABLE_TYPES``.

    Returns:
        uint8 [rows, bytes per row]. A block with NaN or infinity decodes to values that are not finite.

    Raises:
        UnsupportedError: a type that is not written, or columns that are not whole blocks.
    """
    kind = block_type(weight_type)
    if kind.name not in ENCODERS:
        raise UnsupportedError(f"{kind.name} is read and not written. Types that are: {', '.join(QUANTIZABLE_TYPES)}")
    rows, columns = weight.shape
    result = torch.empty((rows, kind.row_bytes(columns)), dtype=torch.uint8, device=weight.device)
    step = max(ELEMENTS_AT_ONCE // max(columns, 1), 1)
    for first in range(0, rows, step):
        part = weight[first : first + step].float()
        result[first : first + step] = ENCODERS[kind.name](part.reshape(-1, kind.elements)).view(len(part), -1)
    return result


def gguf_mm(x: torch.Tensor, packed: torch.Tensor, weight_type: str, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N] in the dtype of ``x`` [M, K], for raw blocks [N, bytes per row]."""
    result = x.float() @ gguf_dequantize(packed, weight_type).t()
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype)


def _check(raw: torch.Tensor, weight_type: str) -> tuple[BlockType, int]:
    kind = block_type(weight_type)
    if raw.dtype != torch.uint8 or raw.ndim != 2:
        raise UnsupportedError(f"GGUF blocks are uint8 [rows, bytes per row], not {raw.dtype} {list(raw.shape)}")
    return kind, kind.columns(raw.shape[1])


def _fake_dequantize(raw: torch.Tensor, weight_type: str, dtype: torch.dtype) -> torch.Tensor:
    return raw.new_empty((raw.shape[0], _check(raw, weight_type)[1]), dtype=dtype)


def _fake_quantize(weight: torch.Tensor, weight_type: str) -> torch.Tensor:
    size = block_type(weight_type).row_bytes(weight.shape[1])
    return weight.new_empty((weight.shape[0], size), dtype=torch.uint8)


def _fake_mm(x: torch.Tensor, packed: torch.Tensor, weight_type: str, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


dequantize_operator = define_operator(
    "gguf_dequantize(Tensor raw, str weight_type, ScalarType dtype) -> Tensor", gguf_dequantize, _fake_dequantize
)
quantize_operator = define_operator(
    "gguf_quantize(Tensor weight, str weight_type) -> Tensor", gguf_quantize, _fake_quantize
)
mm_operator = define_operator(
    "gguf_mm(Tensor x, Tensor packed, str weight_type, Tensor? bias=None) -> Tensor", gguf_mm, _fake_mm
)
register_kernel_lazily("gguf_dequantize", "CPU", "lowbit.ops.cpu.gguf")


# The reference as an implementation of the family.


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear layer.

    Args:
        x: [..., K] floating.
        prepared: ``weight`` uint8 [N, bytes per row], of the type ``format.name``.
        bias: [N] or ``None``.

    Returns:
        [..., N] in ``x.dtype``.
    """
    packed, weight_type = prepared.weight, prepared.format.name
    result: torch.Tensor = mm_operator(x.reshape(-1, x.shape[-1]), packed, weight_type, bias)
    return result.reshape(*x.shape[:-1], packed.shape[0])
