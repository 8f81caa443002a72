"""GGUF files as the weights of a component: finding the file, and giving its tensors the model's names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lowbit.checkpoints.external import ForeignWeights
from lowbit.checkpoints.hub import download, first_line
from lowbit.checkpoints.single_file import Rows, find_recipe, strip_prefix
from lowbit.containers.gguf import GgufFile, GgufTensor, open_gguf
from lowbit.errors import CheckpointError, ConfigError, UnsupportedError, located
from lowbit.ops.gguf import dequantize_operator
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.methods.gguf import GgufConfig

# general.architecture -> beginnings of the names of the classes it is for. Another architecture is not checked: some
# writers put placeholders there.
ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "flux": ("Flux", "Chroma"),
    "flux2": ("Flux2",),
    "wan": ("Wan", "SkyReelsV2", "ChronoEdit"),
    "hyvid": ("HunyuanVideo", "HunyuanImage"),
    "qwen_image": ("QwenImage",),
    "lumina2": ("ZImage", "Lumina2"),
    "sd3": ("SD3",),
    "aura": ("AuraFlow",),
    "hidream": ("HiDream",),
    "cosmos": ("Cosmos",),
    "ltxv": ("LTX",),
}
TEXT_ARCHITECTURES = ("t5", "t5encoder", "llama", "qwen2vl", "qwen3", "qwen3vl", "gemma2", "gemma3")
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

_OPTION = "gguf_model"
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/(.+\.gguf)")
_HUB_TYPE = re.compile(r"([\w.-]+/[\w.-]+):([\w.-]+)")


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file with the shape its model knows it by."""

    tensor: GgufTensor
    shape: tuple[int, ...]

    @property
    def is_reshaped(self) -> bool:
        """Whether the file's rows are not the model's."""
        return self.shape != self.tensor.shape or len(self.shape) < 2


@dataclass(frozen=True)
class GgufWeight:
    """A tensor of the model: rows of tensors of the file, which have one type.

    Attributes:
        file: that holds it.
        parts: tensor and rows along dimension 0.
    """

    file: GgufFile
    parts: Sequence[tuple[FileTensor, int, int]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its values."""
        height = sum(last - first for _, first, last in self.parts)
        return (height, *self.parts[0][0].shape[1:])

    @property
    def encoding(self) -> str:
        """The type, or types."""
        return "+".join(dict.fromkeys(source.tensor.type.name for source, _, _ in self.parts))

    @property
    def is_in_blocks(self) -> bool:
        """Whether its rows can be used as they are stored."""
        return all(not source.is_reshaped for source, _, _ in self.parts) and "+" not in self.encoding

    def quantized(self) -> torch.Tensor:
        """Return the blocks, uint8 [rows, bytes per row]."""
        rows = [self._rows(*part) for part in self.parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def decoded(self) -> torch.Tensor:
        """Return the values, float32."""
        values = [self._values(*part) for part in self.parts]
        return values[0] if len(values) == 1 else torch.cat(values)

    def _rows(self, source: FileTensor, first: int, last: int) -> torch.Tensor:
        inner = math.prod(source.shape[1:-1])
        return self.file.rows(source.tensor, first * inner, last * inner)

    def _values(self, source: FileTensor, first: int, last: int) -> torch.Tensor:
        kind = source.tensor.type.name
        if source.is_reshaped:
            values: torch.Tensor = dequantize_operator(self.file.rows(source.tensor), kind, torch.float32)
            return values.reshape(source.shape)[first:last]
        values = dequantize_operator(self._rows(source, first, last), kind, torch.float32)
        return values.reshape(last - first, *source.shape[1:])


def open_weights(config: QuantizationConfig, model: nn.Module) -> ForeignWeights:
    """Open the file that ``config.gguf_model`` names and find the tensors of ``model`` in it.

    Raises:
        ConfigError: there is no such file.
        CheckpointError: the file is damaged, or of another architecture.
        UnsupportedError: types or names that lowbit does not read.
    """
    assert isinstance(config, GgufConfig)
    assert config.gguf_model is not None
    file = open_gguf(resolve_gguf_model(config.gguf_model))
    _check_architecture(file, model)
    names = strip_prefix(file.tensors)
    tensors = {short: _with_shape(file, file.tensors[name]) for short, name in names.items()}
    with located(str(file.path)):
        recipe, missing = find_recipe(model, {name: tensor.shape[0] for name, tensor in tensors.items()})
    found = {name: _weight(file, tensors, parts) for name, parts in recipe.items()}
    linear = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    types = {
        name: weight.encoding if weight.is_in_blocks else "F32"
        for name in linear
        if (weight := found.get(f"{name}.weight")) is not None
    }
    return ForeignWeights(str(file.path), config.with_layer_types(types), found, missing)


def _check_architecture(file: GgufFile, model: nn.Module) -> None:
    architecture = file.metadata.get("general.architecture")
    if architecture in TEXT_ARCHITECTURES:
        raise UnsupportedError(
            f"{file.path}: a text encoder ({architecture}); gguf_model takes files of diffusion transformers"
        )
    classes = ARCHITECTURES.get(str(architecture))
    if classes is not None and not type(model).__name__.startswith(classes):
        raise CheckpointError(
            f"{file.path}: its architecture is {architecture!r}, and the base model's transformer is a"
            f" {type(model).__name__}: give the base model that the file was made from"
        )


def _with_shape(file: GgufFile, tensor: GgufTensor) -> FileTensor:
    """Return the tensor with the shape that the metadata gives it, for tensors whose own is not GGUF's."""
    original = file.metadata.get(ORIGINAL_SHAPE + tensor.name)
    if original is None:
        return FileTensor(tensor, tensor.shape)
    if (
        not isinstance(original, list)
        or not original
        or not all(type(extent) is int and extent > 0 for extent in original)
        or math.prod(original) != math.prod(tensor.shape)
    ):
        raise CheckpointError(
            f"{file.path}: {tensor.name}: {ORIGINAL_SHAPE[:-1]} {original!r} has not the elements of"
            f" {list(tensor.shape)}"
        )
    return FileTensor(tensor, tuple(original))


def _weight(file: GgufFile, tensors: Mapping[str, FileTensor], parts: Sequence[Rows]) -> GgufWeight:
    return GgufWeight(file, [(tensors[part.source], part.first, part.last) for part in parts])


def resolve_gguf_model(name: str) -> Path:
    """Return the local file for what a user writes, downloaded from the Hub if need be.

    Args:
        name: a file, ``owner/repo/file.gguf``, or ``owner/repo:TYPE`` for the one file of that type.

    Raises:
        ConfigError: there is no such file, or several of that type.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    by_file, by_type = _HUB_FILE.fullmatch(name), _HUB_TYPE.fullmatch(name)
    if by_file is None and by_type is None:
        raise ConfigError(
            f"gguf_model: there is no file {name}, and it has not the form owner/repo/file.gguf or owner/repo:Q4_K_M"
        )
    if by_file is not None:
        return download(_OPTION, *by_file.groups())
    assert by_type is not None
    repository, kind = by_type.groups()
    return download(_OPTION, repository, choose_file(list_files(repository), repository, kind))


def choose_file(files: Sequence[str], repository: str, kind: str) -> str:
    """Return the one file of a type.

    Raises:
        ConfigError: there is none, or several; lists what there is.
    """
    candidates = [file for file in files if file.endswith(".gguf")]
    pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(kind)}(?![A-Za-z0-9_])", re.IGNORECASE)
    found = [file for file in candidates if pattern.search(Path(file).stem)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(found or candidates) or "none"
    problem = f"{len(found)} files" if found else "no file"
    raise ConfigError(
        f"gguf_model: {repository} has {problem} of type {kind}; name one as {repository}/FILE. GGUF files: {listed}"
    )


def list_files(repository: str) -> list[str]:
    """Return the files of a repository on the Hub.

    Raises:
        ConfigError: it can't be listed.
    """
    from huggingface_hub import HfApi

    try:
        return list(HfApi().list_repo_files(repository))
    except Exception as error:  # of the network or of the Hub: many kinds, all with a message
        raise ConfigError(f"{_OPTION}: can't list {repository}: {first_line(error)}") from error
