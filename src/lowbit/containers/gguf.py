"""Reading GGUF files (versions 2 and 3, little-endian). Only the header is read on opening.

A file is untrusted: every length, count and offset is checked against the size of the file before it is used, so that
a damaged or hostile file ends in a ``CheckpointError`` that names file, tensor and fault, in time and memory bounded by
the header. The tensors of an open file are a private mapping of it, as those of safetensors files are: memory is taken
and the disk read when a value is wanted. A file that another program cuts short meanwhile ends the process, on systems
that answer so; one that is replaced does no harm.

The layout (ggml's ``docs/gguf.md``): magic, version, tensor count, metadata count; metadata as (key, type, value);
tensors as (name, dimensions, type, offset), the fastest dimension first; then the data, aligned.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lowbit.errors import CheckpointError, expected_one_of
from lowbit.ops.gguf_types import BY_NUMBER, OTHER_TYPES, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
LARGEST_ALIGNMENT = 1 << 20
LONGEST_NAME = 1 << 10
LONGEST_STRING = 1 << 24
LARGEST_DIMENSIONS = 8
# Elements of an array that are kept as values; of a longer one only the length is. Files of language models hold
# vocabularies, which nothing here needs.
LONGEST_KEPT_ARRAY = 1 << 12
MOST_STRINGS = 1 << 22  # of one array: each has to be walked over

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
_SMALLEST_ENTRY = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class LongArray:
    """Stands for an array of metadata that was not kept.

    Attributes:
        length: of its elements.
    """

    length: int


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the file has it.

    Attributes:
        name: in the file.
        type: of its elements.
        shape: in torch's order, the fastest dimension last.
        offset: of its first byte in the file.
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    offset: int

    @property
    def rows(self) -> int:
        """Rows, with all dimensions but the last taken together."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.type.row_bytes(self.shape[-1])

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class GgufFile:
    """An opened file, or the parts of a split one: what their headers say.

    Attributes:
        path: of the file, or of the first part.
        metadata: key -> value: int, float, bool, str, a list of these, or ``LongArray``.
        tensors: by name, in the file's order.
    """

    path: Path
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, GgufTensor] = field(repr=False)
    _data: Mapping[str, torch.Tensor] = field(repr=False, compare=False)

    def rows(self, tensor: GgufTensor, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return rows ``first`` to ``last`` (by default all) of a tensor: uint8 [rows, bytes per row], mapped."""
        count = (tensor.rows if last is None else last) - first
        start = tensor.offset + first * tensor.row_bytes
        return self._data[tensor.name][start : start + count * tensor.row_bytes].view(count, tensor.row_bytes)


def open_gguf(path: str | Path) -> GgufFile:
    """Read the header of a GGUF file and map the rest.

    Raises:
        CheckpointError: it is missing, no GGUF file, damaged, or holds types lowbit does not read (these are listed).
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _Header(path, file).read()
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error})") from error


def open_parts(paths: Sequence[str | Path]) -> GgufFile:
    """Open all parts of a split file, in order, as one (llama.cpp's ``gguf-split``).

    Raises:
        CheckpointError: as ``open_gguf``, or the parts are not those of one file.
    """
    files = [open_gguf(path) for path in paths]
    tensors: dict[str, GgufTensor] = {}
    data: dict[str, torch.Tensor] = {}
    for index, file in enumerate(files):
        said = file.metadata.get("split.no", index), file.metadata.get("split.count", len(files))
        if said != (index, len(files)):
            raise CheckpointError(
                f"{file.path}: it says that it is part {said[0]} of {said[1]} (counted from 0), and its name part"
                f" {index} of {len(files)}"
            )
        twice = sorted(tensors.keys() & file.tensors.keys())
        if twice:
            raise CheckpointError(f"{file.path}: {twice[0]} is in an earlier part, too")
        tensors.update(file.tensors)
        data.update(file._data)
    expected = files[0].metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(f"{files[0].path}: its parts have {len(tensors)} tensors, and it says {expected}")
    return GgufFile(files[0].path, files[0].metadata, tensors, data)


class _Header:
    """Reads a header from the front; what is asked for is checked against what is left of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0
        self.subject = "header"

    def read(self) -> GgufFile:
        magic = self._bytes(4) if self.size >= 4 else b""
        if magic != MAGIC:
            raise self._fault(f"is no GGUF file (it begins with {magic!r})")
        version = self._scalar("<I")
        if version not in VERSIONS:
            swapped = version >> 16 and not version & 0xFFFF
            what = "a big-endian file" if swapped else f"version {version}"
            raise self._fault(f"{what} is not supported; versions 2 and 3 in little-endian order are")
        tensor_count = self._count("tensors", _SMALLEST_TENSOR)
        metadata = self._metadata(self._count("metadata entries", _SMALLEST_ENTRY))
        tensors = self._tensors(tensor_count)
        start = _aligned(self.position, self._alignment(metadata))
        placed = self._placed(tensors, start, self._alignment(metadata))
        try:
            mapped = mmap.mmap(self.file.fileno(), self.size, access=mmap.ACCESS_COPY)
        except ValueError as error:  # it has become shorter
            raise self._fault(f"can't be mapped ({error})") from error
        data = torch.frombuffer(mapped, dtype=torch.uint8)
        return GgufFile(self.path, metadata, placed, dict.fromkeys(placed, data))

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            self.subject = f"metadata entry {index}"
            key = self._string(LONGEST_NAME)
            self.subject = f"metadata {key!r}"
            if key in metadata:
                raise self._fault("is there twice")
            metadata[key] = self._value(self._scalar("<I"))
        return metadata

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == STRING:
            return self._string(LONGEST_STRING)
        if kind != ARRAY:
            raise self._fault(f"unknown type {kind}")
        kind = self._scalar("<I")
        if kind == STRING:
            return self._strings(self._count("strings", 8))
        if kind not in _SCALARS:
            raise self._fault(f"arrays of type {kind} are not supported")
        size = struct.calcsize(_SCALARS[kind])
        count = self._count("elements", size)
        if count > LONGEST_KEPT_ARRAY:
            self._skip(count * size)
            return LongArray(count)
        return [self._scalar(_SCALARS[kind]) for _ in range(count)]

    def _strings(self, count: int) -> list[str] | LongArray:
        if count > MOST_STRINGS:
            raise self._fault(f"{count} strings in one array; at most {MOST_STRINGS} are read")
        if count <= LONGEST_KEPT_ARRAY:
            return [self._string(LONGEST_STRING) for _ in range(count)]
        for _ in range(count):
            self._skip(self._scalar("<Q"))
        return LongArray(count)

    def _tensors(self, count: int) -> list[tuple[str, BlockType, tuple[int, ...], int]]:
        found = []
        unknown = []
        for index in range(count):
            self.subject = f"tensor {index}"
            name = self._string(LONGEST_NAME)
            self.subject = f"tensor {name!r}"
            dimensions = self._scalar("<I")
            if not 1 <= dimensions <= LARGEST_DIMENSIONS:
                raise self._fault(f"{dimensions} dimensions; 1 to {LARGEST_DIMENSIONS} are supported")
            shape = tuple(reversed([self._scalar("<Q") for _ in range(dimensions)]))
            number, offset = self._scalar("<I"), self._scalar("<Q")
            if number not in BY_NUMBER:
                unknown.append(f"{name} ({OTHER_TYPES.get(number, f'number {number}')})")
                continue
            found.append((name, BY_NUMBER[number], shape, offset))
        if unknown:
            shown = ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else "")
            known = expected_one_of(kind.name for kind in BY_NUMBER.values())
            raise CheckpointError(f"{self.path}: {len(unknown)} tensors have types that are not read: {shown}. {known}")
        return found

    def _placed(
        self, tensors: list[tuple[str, BlockType, tuple[int, ...], int]], start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        placed: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in tensors:
            self.subject = f"tensor {name!r}"
            if name in placed:
                raise self._fault("is there twice")
            if 0 in shape:
                raise self._fault(f"shape {list(shape)} has no elements")
            if shape[-1] % kind.elements:
                raise self._fault(f"rows of {shape[-1]} elements are not whole blocks of {kind.name} ({kind.elements})")
            if offset % alignment:
                raise self._fault(f"offset {offset} is not aligned to {alignment}")
            tensor = GgufTensor(name, kind, shape, start + offset)
            if tensor.offset + tensor.bytes > self.size:
                raise self._fault(
                    f"{kind.name} {list(shape)} needs {tensor.bytes:,} bytes from {tensor.offset:,} on, and the file"
                    f" has {self.size:,}: is it cut short?"
                )
            placed[name] = tensor
        ordered = sorted(placed.values(), key=lambda tensor: tensor.offset)
        for before, after in itertools.pairwise(ordered):
            self.subject = f"tensor {after.name!r}"
            if before.offset + before.bytes > after.offset:
                raise self._fault(f"overlaps {before.name!r}")
        return placed

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or not 1 <= value <= LARGEST_ALIGNMENT or value & (value - 1):
            self.subject = "metadata 'general.alignment'"
            raise self._fault(f"must be a power of two up to {LARGEST_ALIGNMENT}, not {value!r}")
        return value

    def _count(self, what: str, smallest: int) -> int:
        count: int = self._scalar("<Q")
        if count * smallest > self.size - self.position:
            raise self._fault(f"claims {count} {what}, more than fit into the file")
        return count

    def _string(self, longest: int) -> str:
        length = self._scalar("<Q")
        if length > longest:
            raise self._fault(f"a string of {length} bytes; at most {longest} are read")
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fault("a string is not UTF-8") from error

    def _scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]

    def _bytes(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise self._fault(f"needs {count} bytes at {self.position:,}, and the file has {self.size:,}")
        found = self.file.read(count)
        if len(found) != count:
            raise self._fault("the file became shorter while it was read")
        self.position += count
        return found

    def _skip(self, count: int) -> None:
        if count > self.size - self.position:
            raise self._fault(f"needs {count} bytes at {self.position:,}, and the file has {self.size:,}")
        self.position += count
        self.file.seek(self.position)

    def _fault(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.subject}: {problem}")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
