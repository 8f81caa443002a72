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
from lowbit.checkpoints.single_file import Rows, find_recipe, strip_prefix, take_markers
from lowbit.containers.gguf import GgufFile, GgufTensor, open_parts
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
# Of llama.cpp's gguf-split: name, number from 1 on, count.
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MOST_PARTS = 1000
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
    file = open_parts(resolve_gguf_model(config.gguf_model))
    _check_architecture(file, model)
    names = strip_prefix(file.tensors)
    tensors = {short: _with_shape(file, short, file.tensors[name]) for short, name in names.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    markers, settings = take_markers(str(file.path), shapes, model.state_dict().keys())
    tensors = {name: tensor for name, tensor in tensors.items() if name not in markers}
    with located(str(file.path)):
        recipe, missing = find_recipe(model, {name: tensor.shape[0] for name, tensor in tensors.items()})
    found = {name: _weight(file, tensors, parts) for name, parts in recipe.items()}
    linear = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    types = {
        name: weight.encoding if weight.is_in_blocks else "F32"
        for name in linear
        if (weight := found.get(f"{name}.weight")) is not None
    }
    return ForeignWeights(str(file.path), config.with_layer_types(types), found, missing, settings=settings)


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


def _with_shape(file: GgufFile, short: str, tensor: GgufTensor) -> FileTensor:
    """Return the tensor with the shape that the metadata gives it, for tensors whose own is not GGUF's.

    The metadata names it as the file does, or, by some writers, without its prefix.
    """
    original = file.metadata.get(ORIGINAL_SHAPE + tensor.name, file.metadata.get(ORIGINAL_SHAPE + short))
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


def resolve_gguf_model(name: str) -> list[Path]:
    """Return the local file for what a user writes, or the parts of a split one, downloaded from the Hub if need be.

    Args:
        name: a file or any part of one, a folder with one file, ``owner/repo/file.gguf``, or ``owner/repo:TYPE`` for
            the one file of that type.

    Raises:
        ConfigError: there is no such file, several of that type, or a part is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        files = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*.gguf"))]
        return [path / part for part in _parts(choose_file(files, str(path)), files, str(path))]
    if path.is_file():
        files = [file.name for file in path.parent.iterdir()]
        return [path.parent / part for part in _parts(path.name, files, str(path.parent))]
    by_file, by_type = _HUB_FILE.fullmatch(name), _HUB_TYPE.fullmatch(name)
    if by_file is None and by_type is None:
        raise ConfigError(
            f"gguf_model: there is no file {name}, and it has not the form owner/repo/file.gguf or owner/repo:Q4_K_M"
        )
    if by_file is not None:
        repository, file = by_file.groups()
        files = list_files(repository) if _PART.fullmatch(file) else [file]
    else:
        assert by_type is not None
        repository, kind = by_type.groups()
        files = list_files(repository)
        file = choose_file(files, repository, kind)
    return [download(_OPTION, repository, part) for part in _parts(file, files, repository)]


def _parts(file: str, files: Sequence[str], where: str) -> list[str]:
    """Return the parts of the split file that ``file`` is one of, in order, or ``file`` alone.

    Raises:
        ConfigError: some are not among ``files``.
    """
    split = _PART.fullmatch(file)
    if split is None:
        return [file]
    stem, _, count = split.groups()
    if not 0 < int(count) <= _MOST_PARTS:
        raise ConfigError(f"gguf_model: {file} can't be one of {count} parts; {_MOST_PARTS} is the most")
    parts = [f"{stem}-{number:05d}-of-{count}.gguf" for number in range(1, int(count) + 1)]
    missing = [part for part in parts if part not in files]
    if missing:
        raise ConfigError(f"gguf_model: {where} lacks {len(missing)} of {len(parts)} parts: {', '.join(missing)}")
    return parts


def choose_file(files: Sequence[str], where: str, kind: str | None = None) -> str:
    """Return the one GGUF file of a type, of a split one the first part; vision projectors (``mmproj``) aside.

    A type names files of that type alone before those of dynamic ones ("UD-Q4_K_M" for Q4_K_M), which can be named.

    Raises:
        ConfigError: there is none, or several; lists what there is.
    """
    candidates = [file for file in files if file.endswith(".gguf") and "mmproj" not in Path(file).name.lower()]
    firsts = [file for file in candidates if (part := _PART.fullmatch(file)) is None or int(part[2]) == 1]
    found = firsts
    if kind is not None:
        pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(kind)}(?![A-Za-z0-9_])", re.IGNORECASE)
        matching = [file for file in firsts if pattern.search(Path(file).stem)]
        dynamic = re.compile(rf"(?<![A-Za-z0-9])UD-{re.escape(kind)}", re.IGNORECASE)
        found = [file for file in matching if not dynamic.search(Path(file).stem)] or matching
    if len(found) == 1:
        return found[0]
    listed = ", ".join(found or candidates) or "none"
    of_type = "" if kind is None else f" of type {kind}"
    problem = f"{len(found)} files" if found else "no file"
    raise ConfigError(f"gguf_model: {where} has {problem}{of_type}; name one as {where}/FILE. GGUF files: {listed}")


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
