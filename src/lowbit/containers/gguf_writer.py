"""Writing GGUF files (version 3), tensor by tensor: only one is in memory at a time."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from lowbit.containers.atomic import replace_when_written
from lowbit.containers.gguf import ARRAY, DEFAULT_ALIGNMENT, LARGEST_DIMENSIONS, MAGIC, STRING
from lowbit.errors import UnsupportedError
from lowbit.ops.gguf_types import block_type

VERSION = 3
LONGEST_NAME = 127  # what the field's readers take (ggml's own limit is 63)
_UINT32, _INT32 = 4, 5

Value = str | int | Sequence[int]


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor of a file to be.

    Attributes:
        name: in the file.
        weight_type: a name of ``lowbit.ops.gguf.BLOCK_TYPES``.
        shape: in torch's order.
        make: returns its rows, uint8 [rows, bytes per row]; called when it is written.
    """

    name: str
    weight_type: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        rows = 1
        for extent in self.shape[:-1]:
            rows *= extent
        return rows * block_type(self.weight_type).row_bytes(self.shape[-1])


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorToWrite],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a file under a temporary name and rename it, so that no half of it is ever found at ``path``.

    Args:
        path: to write.
        metadata: key -> string, unsigned 32-bit integer, or list of signed 32-bit integers.
        tensors: in the order they are to have.
        progress: called with (tensors done, tensors to do).

    Raises:
        UnsupportedError: a name or a shape that the format does not hold.
    """
    for tensor in tensors:
        if len(tensor.name.encode()) > LONGEST_NAME or not 1 <= len(tensor.shape) <= LARGEST_DIMENSIONS:
            raise UnsupportedError(f"{tensor.name} {list(tensor.shape)}: a name or a shape that GGUF does not hold")
    with replace_when_written(path) as file:
        _write_header(file, metadata, tensors)
        for done, tensor in enumerate(tensors, start=1):
            _pad(file)
            raw = tensor.make()
            assert raw.numel() == tensor.bytes, tensor.name
            file.write(raw.contiguous().view(-1).numpy().data)
            if progress is not None:
                progress(done, len(tensors))
        _pad(file)


def _write_header(file: BinaryIO, metadata: Mapping[str, Value], tensors: Sequence[TensorToWrite]) -> None:
    file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        file.write(_string(key) + _value(value))
    offset = 0
    for tensor in tensors:
        file.write(_string(tensor.name) + struct.pack("<I", len(tensor.shape)))
        file.write(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
        file.write(struct.pack("<IQ", block_type(tensor.weight_type).number, offset))
        offset += -(-tensor.bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    return struct.pack(f"<IIQ{len(value)}i", ARRAY, _INT32, len(value), *value)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))
