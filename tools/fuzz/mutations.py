"""How inputs are changed: values in JSON, tensors in a file, bytes; and what a refusal must be."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LONGEST_MESSAGE = 20_000
"""One error names all tensors that are missing."""

# What takes the place of a value in a configuration.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 16, 2**31, 2**64, 1e308, float("nan"), "", "int8", "NVFP4", "FP8", "*", "re:(",
    "\u0000", "x" * 5000, [], [0], [128, 128], ["Linear"], [[[]]], {}, {"": None}, {"num_bits": 4, "type": "float"},
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Something that reads files.

    Attributes:
        prepare: makes what is needed in an empty folder and returns inputs to begin with.
        run: gives one input to the reader; the folder is the prepared one.
    """

    prepare: Callable[[Path], list[bytes]]
    run: Callable[[Path, bytes], None]


def refused(error: Exception, name: str) -> None:
    """Check the message of an input that was refused."""
    message = str(error)
    assert name in message, f"does not name {name}: {message[:200]}"
    assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters: {message[:200]}..."


def edit(parent: Any, key: Any, numbers: list[int]) -> None:
    """Change something at or below ``parent[key]``; ``numbers`` decide what, and are used up."""
    child = parent[key]
    inside = list(child) if isinstance(child, dict) else list(range(len(child))) if isinstance(child, list) else []
    choice = numbers.pop() if numbers else 0
    if inside and choice % 4:
        edit(child, inside[(numbers.pop() if numbers else 0) % len(inside)], numbers)
    elif isinstance(child, dict) and choice % 8 == 4:
        child[f"unknown_{choice}"] = deepcopy(VALUES[choice % len(VALUES)])
    elif isinstance(parent, dict) and choice % 8 == 0 and key != "quantization_config":
        del parent[key]
    else:
        parent[key] = deepcopy(VALUES[(numbers.pop() if numbers else choice) % len(VALUES)])


def take(numbers: list[int]) -> int:
    """Return the next number, 0 when they are used up."""
    return numbers.pop() if numbers else 0


_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
)  # fmt: skip


def _filled(tensor: torch.Tensor, byte: int) -> torch.Tensor:
    """Return a tensor all of whose bytes are ``byte``: not a number, negative, infinite, out of range."""
    size = math.prod(tensor.shape) * tensor.dtype.itemsize
    return torch.full((size,), byte, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)


# What becomes of a tensor, by a number.
_CHANGES: tuple[Callable[[torch.Tensor, int], torch.Tensor], ...] = (
    lambda tensor, number: torch.zeros(tensor.shape).to(tensor.dtype),
    _filled,
    lambda tensor, number: tensor.reshape(-1),
    lambda tensor, number: tensor.transpose(0, -1).contiguous() if tensor.ndim else tensor,
    lambda tensor, number: tensor.unsqueeze(number % (tensor.ndim + 1)),
    lambda tensor, number: torch.stack([tensor, tensor]),
    lambda tensor, number: tensor[: number % (len(tensor) + 1)].contiguous() if tensor.ndim else tensor,
    lambda tensor, number: tensor[..., : number % (tensor.shape[-1] + 1)].contiguous() if tensor.ndim else tensor,
    lambda tensor, number: tensor.float().to(_DTYPES[number % len(_DTYPES)]),
    lambda tensor, number: tensor.reshape(-1).view(torch.uint8),
    lambda tensor, number: torch.empty([0, 7, 3][: number % 4], dtype=tensor.dtype),
    lambda tensor, number: torch.tensor(float(number) - 128).to(tensor.dtype),
)


def change_tensor(tensors: dict[str, torch.Tensor], numbers: list[int]) -> None:
    """Drop, rename, exchange or change one of a file's tensors; ``numbers`` decide, and are used up."""
    names = sorted(tensors)
    # Of quantized layers there are few tensors among many.
    special = [
        name for name in names if not name.endswith((".bias", "norm.weight")) and tensors[name].dtype.itemsize < 4
    ]
    chosen = special if special and take(numbers) % 4 else names
    name = chosen[(256 * take(numbers) + take(numbers)) % len(chosen)]
    action, tensor = take(numbers), tensors.pop(name)
    if action % 16 == 0:
        return
    if action % 16 == 1:
        layer, _, parameter = names[take(numbers) % len(names)].rpartition(".")
        tensors[f"{layer}.{name.rpartition('.')[2]}" if take(numbers) % 2 else f"{layer}.{parameter}"] = tensor
    elif action % 16 == 2:
        other = chosen[take(numbers) % len(chosen)]
        tensors[name] = tensors.get(other, tensor).clone()
    else:
        tensors[name] = _CHANGES[action % len(_CHANGES)](tensor, take(numbers))


def write_changed(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], numbers: list[int]
) -> None:
    """Write a safetensors file; of one in eight, bytes of the header are changed too."""
    save_file(dict(tensors), path, dict(metadata))
    if take(numbers) % 8 == 7:
        content = bytearray(path.read_bytes())
        size = struct.unpack("<Q", content[:8])[0]
        for _ in range(1 + take(numbers) % 3):
            place = (65536 * take(numbers) + 256 * take(numbers) + take(numbers)) % (8 + size)
            content[place] = take(numbers)
        path.write_bytes(content)
