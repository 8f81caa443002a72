"""Writing safetensors files tensor by tensor: only one is in memory at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.containers.atomic import replace_when_written

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int8: "I8",
}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor of a file to be.

    Attributes:
        name: in the file.
        dtype: of the file.
        shape: its extents.
        make: returns it; called when it is written.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


def write_safetensors(
    path: str | Path,
    metadata: Mapping[str, str],
    tensors: Sequence[TensorToWrite],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a file under a temporary name and rename it, so that no half of it is ever found at ``path``.

    Args:
        path: to write.
        metadata: text by key.
        tensors: in the order they are to have.
        progress: called with (tensors done, tensors to do).
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    with replace_when_written(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for done, tensor in enumerate(tensors, start=1):
            made = tensor.make().to(tensor.dtype).contiguous()
            assert tuple(made.shape) == tensor.shape, tensor.name
            file.write(made.reshape(-1).view(torch.uint8).numpy().data)
            if progress is not None:
                progress(done, len(tensors))
