"""One safetensors file with its metadata, whose tensors are read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lowbit.checkpoints.checks import TensorHeader, read_headers, refuse_pickles
from lowbit.errors import CheckpointError


@dataclass(frozen=True)
class SafetensorsFile:
    """An open file.

    Attributes:
        path: of the file.
        headers: every tensor's.
        metadata: text by key.
    """

    path: Path
    headers: Mapping[str, TensorHeader]
    metadata: Mapping[str, str]
    _opened: Any

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor.

        Raises:
            CheckpointError: it can't be read.
        """
        return self._try(name, lambda: self._opened.get_tensor(name))

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return the rows ``first`` to ``last`` (not included) of a tensor.

        Raises:
            CheckpointError: they can't be read.
        """
        return self._try(name, lambda: self._opened.get_slice(name)[first:last])

    def _try(self, name: str, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        try:
            return read()
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {name} can't be read: {error}") from error

    def json(self, key: str) -> dict[str, Any] | None:
        """Return the JSON object in the metadata under ``key``, ``None`` if there is none.

        Raises:
            CheckpointError: it is not a JSON object.
        """
        text = self.metadata.get(key)
        return None if text is None else parse_object(text, f"{self.path}: metadata {key!r}")


def open_safetensors(path: Path) -> SafetensorsFile:
    """Open a file; only its header is read.

    Raises:
        CheckpointError: it is not a whole safetensors file.
    """
    refuse_pickles([path])
    headers = read_headers([path])
    opened: Any = safe_open(str(path), framework="pt")
    return SafetensorsFile(path, headers, dict(opened.metadata() or {}), opened)


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """Return the JSON object that ``text`` is; ``what`` names it in messages.

    Raises:
        CheckpointError: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return value
