"""ComfyUI's single files as the weights of a component: which layer is in which format, and its tensors.

A layer's format is named in the header's metadata (``_quantization_metadata``: ``{"format_version": ..., "layers":
{layer: {"format": ...}}}``) or in a tensor ``<layer>.comfy_quant``, the bytes of such a JSON object (ComfyUI's
``QUANTIZATION.md`` and ``comfy/ops.py``); what the formats hold is in ``lowbit.ops.comfyui``. Earlier files have a
tensor ``scaled_fp8`` and call the scales ``scale_weight`` and ``scale_input``. Where nothing names a format, the
tensors tell: e4m3 weights, with a scale or without; and Black Forest Labs' NVFP4, whose even column is in the low
nibble and whose scales are in rows (diffusers' ``quantizers/bfl``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lowbit.checkpoints import codes
from lowbit.checkpoints.checks import TensorHeader
from lowbit.checkpoints.external import ForeignTensor, ForeignWeights
from lowbit.checkpoints.hub import resolve_safetensors
from lowbit.checkpoints.safetensors_file import SafetensorsFile, open_safetensors, parse_object
from lowbit.checkpoints.single_file import PREFIXES, Rows, find_recipe, strip_prefix, take_markers
from lowbit.compat.parts.modules import float32_modules
from lowbit.errors import CheckpointError, ConfigError, UnsupportedError, located
from lowbit.ops import mx, nvfp4
from lowbit.ops.comfyui import blocked_shape, comfyui_dequantize, from_blocked, swap_nibbles
from lowbit.ops.fp8 import E4M3, dequantize_fp8
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.methods.comfyui import DECODED, ComfyUiConfig, LayerFormat

logger = logging.getLogger(__name__)

METADATA = "_quantization_metadata"
# Names of earlier files and of other tools. That of DeepSeek's is multiplied with, too, whatever it is called.
_ALIASES = {"scale_weight": "weight_scale", "weight_scale_inv": "weight_scale", "scale_input": "input_scale"}
# Likewise beside codes only: ``scale`` alone is also what norms are multiplied with.
_CODES_ALIASES = {"scale": "weight_scale", "scale_inv": "weight_scale"}
_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
_MARKER = "comfy_quant"
_LONGEST_MARKER = 1 << 16
_FLOATS = ("F32", "F16", "BF16")
# Tensors of weights -> dtypes that a format has on disk; e4m3 may be held as bytes.
_DTYPES: Mapping[str, tuple[str, ...]] = {
    "float8_e4m3fn": ("F8_E4M3", "U8"),
    "int8_tensorwise": ("I8",),
    "nvfp4": ("U8",),
    "mxfp8": ("F8_E4M3", "U8"),
    "float8_e5m2": ("F8_E5M2",),
    "values": _FLOATS,
}
# Edges of blocks that share a scale; for a weight smaller than an edge all of them mean the same.
_EDGES = (128, 64, 32, 16, 1, 256)
_LOST_SCALE = "The file lost the scales of these tensors: get a whole one"
_GROUP_SIZES = {"nvfp4": nvfp4.GROUP_SIZE, "mxfp8": mx.GROUP_SIZE}
# What rows and columns are padded to.
_PADDING = {"nvfp4": 16, "mxfp8": 32}


@dataclass(frozen=True)
class StoredLayer:
    """A layer of the file.

    Attributes:
        name: in the file, without its prefix.
        format: how it is stored.
        is_blocked: nvfp4 and mxfp8 have ComfyUI's order, not that of Black Forest Labs.
        headers: of its tensors, by their names of today.
        names: of its tensors in the file, likewise.
    """

    name: str
    format: LayerFormat
    is_blocked: bool
    headers: Mapping[str, TensorHeader]
    names: Mapping[str, str]

    @property
    def rows(self) -> int:
        """Of the weight, with padding."""
        return self.headers["weight"].shape[0]

    @property
    def columns(self) -> int:
        """Of the weight's values, with padding."""
        return self.headers["weight"].shape[1] * (2 if self.format.format == "nvfp4" else 1)

    @property
    def groups(self) -> int:
        """Of a row."""
        return -(-self.columns // _GROUP_SIZES[self.format.format])

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with its tensors."""
        kind, weight = self.format.format, self.headers["weight"]
        if weight.dtype not in _DTYPES[kind] or len(weight.shape) != 2 or 0 in weight.shape:
            yield f"{self.name}.weight: found {weight}, {kind} needs {' or '.join(_DTYPES[kind])} [rows, columns]"
            return
        if self.format.rotation is not None and self.columns % self.format.rotation:
            yield f"{self.name}: {self.columns} columns can't have been rotated in groups of {self.format.rotation}"
        for name, (size, dtypes, is_needed) in self._needed().items():
            header = self.headers.get(name)
            if header is None and is_needed:
                yield f"{self.name}.{name} is missing, which {kind} needs"
            elif header is not None and (math.prod(header.shape) != size or header.dtype not in dtypes):
                yield f"{self.name}.{name}: found {header}, {kind} needs {size} values of {' or '.join(dtypes)}"

    def _needed(self) -> Mapping[str, tuple[int, tuple[str, ...], bool]]:
        """Return scale -> its elements, its dtypes, and whether it must be there."""
        kind = self.format.format
        needed = {"input_scale": (1, _FLOATS, False), "pre_quant_scale": (self.columns, _FLOATS, False)}
        if kind not in _GROUP_SIZES:
            # Plain weights have no scale.
            must = kind == "int8_tensorwise" or (kind != "values" and self.is_blocked)
            return {**needed, "weight_scale": (self._scales(), _FLOATS, must)}
        shape = blocked_shape(self.rows, self.groups) if self.is_blocked else (self.rows, self.groups)
        dtypes = ("F8_E4M3", "U8") if kind == "nvfp4" else ("U8", "F8_E8M0")
        if kind == "nvfp4":
            needed["weight_scale_2"] = (1, _FLOATS, True)
        return {**needed, "weight_scale": (math.prod(shape), dtypes, True)}

    def _scales(self) -> int:
        """Return how many scales the weight needs: one, one a row, or one a block."""
        if self.format.block is not None:
            return math.prod(
                -(-extent // edge) for extent, edge in zip(self.headers["weight"].shape, self.format.block, strict=True)
            )
        scale = self.headers.get("weight_scale")
        return 1 if scale is not None and math.prod(scale.shape) == 1 else self.rows


@dataclass(frozen=True)
class ComfyWeight:
    """A tensor of the model, made when it is asked for."""

    shape: tuple[int, ...]
    encoding: str
    make: Callable[[], torch.Tensor]
    decode: Callable[[], torch.Tensor]

    def quantized(self) -> torch.Tensor:
        """Return it as the layer's method has it."""
        return self.make()

    def decoded(self) -> torch.Tensor:
        """Return its values."""
        return self.decode()


def open_weights(config: QuantizationConfig, model: nn.Module) -> ForeignWeights:
    """Open the file that ``config.comfyui_model`` names and find the tensors of ``model`` in it.

    Raises:
        ConfigError: there is no such file.
        CheckpointError: the file is damaged, or its tensors are not what their formats have: all in one message.
        UnsupportedError: formats or names that lowbit does not read.
    """
    assert isinstance(config, ComfyUiConfig)
    assert config.comfyui_model is not None
    file = open_safetensors(resolve_safetensors("comfyui_model", config.comfyui_model))
    layers, plain = read_layers(file)
    shapes = {name: file.headers[stored].shape for name, stored in plain.items()}
    markers, settings = take_markers(str(file.path), shapes, model.state_dict().keys())
    plain = {name: stored for name, stored in plain.items() if name not in markers}
    heights = {name: _height(file.headers[stored]) for name, stored in plain.items()}
    heights.update({f"{name}.weight": layer.rows for name, layer in layers.items()})
    with located(str(file.path)):
        recipe, missing = find_recipe(model, heights)
    reader = _Reader(file, layers, plain, config, model)
    reader.refuse_codes(recipe)
    tensors: dict[str, ForeignTensor] = {}
    formats: dict[str, dict[str, Any]] = {}
    for name, parts in recipe.items():
        layer = reader.layer_format(name, parts)
        if layer is not None:
            formats[name.removesuffix(".weight")] = asdict(layer)
        tensors.update(reader.tensors(name, parts, layer))
    _announce_decoded(file, layers)
    return ForeignWeights(str(file.path), replace(config, layer_formats=formats), tensors, missing, settings=settings)


def _announce_decoded(file: SafetensorsFile, layers: Mapping[str, StoredLayer]) -> None:
    """Say which codes take a value's memory, as no kernel computes them."""
    found = [layer for layer in layers.values() if layer.format.format in DECODED and layer.format.format != "values"]
    if found:
        logger.warning(
            "%s: %d weights in %s are decoded to the model's dtype, which takes twice their memory: no kernel computes"
            " them. %s is one",
            file.path,
            len(found),
            found[0].format.format,
            found[0].name,
        )


def _height(header: TensorHeader) -> int:
    return header.shape[0] if header.shape else 1


def read_layers(file: SafetensorsFile) -> tuple[dict[str, StoredLayer], dict[str, str]]:
    """Return the layers that are in a format of ComfyUI's, and the names of other tensors, both without prefixes.

    Raises:
        CheckpointError: metadata or tensors that make no sense; all layers in one message.
        UnsupportedError: a format that is not read; names those that are.
    """
    names = strip_prefix(file.headers)
    grouped: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for short, stored in names.items():
        prefix, tensor = _owner(short, names, file)
        before = grouped.setdefault(prefix, {}).setdefault(tensor, stored)
        if before != stored:
            problems.append(f"{stored} and {before} are both a {tensor} of {prefix}")
    declared = _declared(file, grouped)
    layers: dict[str, StoredLayer] = {}
    for name, tensors in grouped.items():
        try:
            layer = _layer(file, name, tensors, declared.get(name))
        except ConfigError as error:
            raise UnsupportedError(f"{file.path}: {name}: {error}") from error
        if layer is not None:
            layers[name] = layer
            problems += layer.problems()
    problems += [f"{METADATA} names {name}, which the file lacks" for name in declared.keys() - layers.keys()]
    if problems:
        raise CheckpointError("\n  ".join([f"{file.path}: {len(problems)} problems", *sorted(problems)]))
    taken = {stored for found in layers.values() for stored in found.names.values()}
    plain = {short: stored for short, stored in names.items() if stored not in taken}
    _refuse_lost_scales(file, layers, plain)
    return layers, plain


def _owner(short: str, names: Mapping[str, str], file: SafetensorsFile) -> tuple[str, str]:
    """Return the layer that a tensor belongs to, and the tensor's name of today."""
    prefix, _, tensor = short.rpartition(".")
    if tensor in _CODES_ALIASES:
        layer = prefix.removesuffix(".weight")
        weight = names.get(f"{layer}.weight")
        if weight is not None and codes.is_codes(file.headers[weight]):
            return layer, _CODES_ALIASES[tensor]
    return prefix, _ALIASES.get(tensor, tensor)


def _refuse_lost_scales(file: SafetensorsFile, layers: Mapping[str, StoredLayer], plain: Mapping[str, str]) -> None:
    """Raise ``CheckpointError`` for float8 codes without a scale that are no values: a layer that lost its own."""
    unscaled = [layer.names["weight"] for layer in layers.values() if "weight_scale" not in layer.headers]
    cast = {name: file.headers[name] for name in [*unscaled, *plain.values()] if file.headers[name].dtype in codes.CAST}
    others_have_scales = len(unscaled) < len(layers)
    codes.refuse(str(file.path), codes.cast_problems(cast, others_have_scales, file.read), _LOST_SCALE)


def _declared(file: SafetensorsFile, grouped: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """Return layer -> what the metadata and the markers say of it."""
    found: dict[str, dict[str, Any]] = {}
    metadata = file.json(METADATA) or {}
    layers = metadata.get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(values, dict) for values in layers.values()):
        raise CheckpointError(f"{file.path}: {METADATA}: layers is no object of objects")
    for name, values in layers.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        found[name.removeprefix(prefix)] = values
    for name, tensors in grouped.items():
        stored = tensors.get(_MARKER)
        if stored is not None:
            values = _marker(file, stored)
            if found.get(name, values).get("format") != values.get("format"):
                raise CheckpointError(f"{file.path}: {METADATA} and {stored} name different formats")
            found[name] = values
    return found


def _marker(file: SafetensorsFile, stored: str) -> dict[str, Any]:
    header = file.headers[stored]
    if header.dtype != "U8" or len(header.shape) != 1 or header.shape[0] > _LONGEST_MARKER:
        raise CheckpointError(f"{file.path}: {stored}: found {header}, needs the bytes of a JSON object")
    return parse_object(bytes(file.read(stored).tolist()), f"{file.path}: {stored}")


def _layer(
    file: SafetensorsFile, name: str, tensors: Mapping[str, str], declared: Mapping[str, Any] | None
) -> StoredLayer | None:
    """Return a layer of the file; ``None`` if it is not quantized.

    Raises:
        ConfigError: a format that is not read.
    """
    weight = tensors.get("weight")
    if weight is None:
        return None
    stored = {tensor: tensors[tensor] for tensor in ("weight", *_SCALES, _MARKER) if tensor in tensors}
    headers = {tensor: file.headers[stored_name] for tensor, stored_name in stored.items()}
    kind = declared.get("format") if declared is not None else _told_by_tensors(headers)
    if kind is None and declared is None:
        return None
    rotation = _rotation(declared or {}) if kind == "int8_tensorwise" else None
    block = _block(headers) if kind == "float8_e4m3fn" else None
    has_input_scale = "input_scale" in stored and _uses(kind) and block is None
    layer_format = LayerFormat(str(kind), rotation, has_input_scale, "pre_quant_scale" in stored, block)
    return StoredLayer(name, layer_format, declared is not None, headers, stored)


def _block(headers: Mapping[str, TensorHeader]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, told by how many scales there are; ``None`` for whole rows.

    Raises:
        ConfigError: no usual block gives that many.
    """
    scale, shape = headers.get("weight_scale"), headers["weight"].shape
    if len(shape) != 2 or 0 in shape:
        return None  # refused with the tensors
    rows, columns = shape
    extents = [] if scale is None else [extent for extent in scale.shape if extent != 1]
    if scale is None or len(scale.shape) < 2 or (math.prod(scale.shape) in (1, rows) and scale.shape[0] in (1, rows)):
        return None
    found = [
        (first, second)
        for first in _EDGES
        for second in _EDGES
        if [extent for extent in (-(-rows // first), -(-columns // second)) if extent != 1] == extents
    ]
    if not found:
        raise ConfigError(f"{scale} is no scale of blocks of a weight {headers['weight']}")
    return found[0]


def _uses(kind: object) -> bool:
    """Tell whether a format's layers round activations by ``input_scale``."""
    return kind in ("float8_e4m3fn", "nvfp4")


def _rotation(declared: Mapping[str, Any]) -> int | None:
    # Some writers nest the options.
    nested = declared.get("params")
    options = {**(nested if isinstance(nested, dict) else {}), **declared}
    if not options.get("convrot"):
        return None
    size = options.get("convrot_groupsize", 256)
    if type(size) is not int:
        raise ConfigError(f"convrot_groupsize must be a whole number, not {size!r}")
    return size


def _told_by_tensors(headers: Mapping[str, TensorHeader]) -> str | None:
    """Return the format of a layer that nothing names, ``None`` for plain numbers.

    Raises:
        ConfigError: it can't be told.
    """
    dtype, scale = headers["weight"].dtype, headers.get("weight_scale")
    if dtype in codes.CAST and len(headers["weight"].shape) != 2 and scale is None:
        return None  # a norm or a convolution of a file that was cast whole
    if dtype == "F8_E5M2":
        return "float8_e5m2"
    if dtype in _FLOATS:
        return "values" if scale is not None else None
    if dtype == "F8_E4M3":
        if scale is not None and scale.dtype in ("U8", "F8_E8M0"):
            raise ConfigError("e4m3 with E8M0 scales of an unknown order: nothing in the file names its format")
        return "float8_e4m3fn"
    if dtype == "U8" and "weight_scale_2" in headers:
        return "nvfp4"
    if dtype in ("I8", "U8"):
        raise ConfigError(f"a weight of {headers['weight']} whose format nothing in the file names")
    return None


@dataclass(frozen=True)
class _Reader:
    file: SafetensorsFile
    layers: Mapping[str, StoredLayer]
    plain: Mapping[str, str]
    config: ComfyUiConfig
    model: nn.Module

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        return dict(self.model.named_modules())

    @cached_property
    def expected(self) -> Mapping[str, torch.Tensor]:
        return self.model.state_dict()

    def refuse_codes(self, recipe: Mapping[str, Sequence[Rows]]) -> None:
        """Raise ``CheckpointError`` for integers that would be taken for values, such as a bias in int8."""
        wanted = {
            self.plain[part.source]: name
            for name, parts in recipe.items()
            for part in parts
            if part.source in self.plain
        }
        found = {
            stored: f"{self.file.headers[stored]}, as {name}"
            for stored, name in wanted.items()
            if codes.is_codes(self.file.headers[stored])
            and self.file.headers[stored].dtype not in codes.CAST
            and (name not in self.expected or self.expected[name].is_floating_point())
        }
        codes.refuse(
            str(self.file.path), found, "No format that the file names says how to read them: get a whole file"
        )

    def layer_format(self, name: str, parts: Sequence[Rows]) -> LayerFormat | None:
        """Return the format that a tensor of the model is in as a layer's weight; ``None``: it is decoded.

        Raises:
            CheckpointError: its rows come from layers that can't be made one.
        """
        layer, _, parameter = name.rpartition(".")
        sources = self._sources(parts)
        module = self.modules.get(layer) if parameter == "weight" else None
        is_float32 = bool(set(float32_modules(self.model)) & set(layer.split(".")))
        if type(module) is not nn.Linear or None in sources or self.config.is_ignored(layer) or is_float32:
            return None
        formats = {source.format for source in sources if source is not None}
        if any(layer_format.format in DECODED for layer_format in formats):
            return None
        shared = [{self._shared(source, name) for source in sources if source is not None} for name in _SHARED]
        several = len({part.source for part in parts}) > 1
        is_scaled = any(layer_format.has_mul_scale for layer_format in formats)
        if len(formats) > 1 or any(len(values) > 1 for values in shared) or (several and is_scaled):
            raise CheckpointError(
                f"{self.file.path}: {name} is made of layers with different formats or scales: "
                + ", ".join(sorted({part.source for part in parts}))
            )
        return formats.pop()

    def _sources(self, parts: Sequence[Rows]) -> list[StoredLayer | None]:
        return [
            self.layers.get(part.source.removesuffix(".weight")) if part.source.endswith(".weight") else None
            for part in parts
        ]

    def _shared(self, source: StoredLayer, name: str) -> float | None:
        stored = source.names.get(name)
        return None if stored is None else float(self.file.read(stored).float())

    def tensors(self, name: str, parts: Sequence[Rows], layer: LayerFormat | None) -> dict[str, ForeignTensor]:
        """Return a tensor of the model and, of a layer's weight, those that belong to it, by name."""
        sources = self._sources(parts)
        if layer is None:
            values = [self._values(part, source, name) for part, source in zip(parts, sources, strict=True)]
            shape = (sum(each.shape[0] for each in values), *values[0].shape[1:]) if values[0].shape else ()

            def make() -> torch.Tensor:
                made = [each.make() for each in values]
                return made[0] if len(made) == 1 else torch.cat(made)

            return {name: ComfyWeight(shape, values[0].encoding, make, make)}
        prefix = name.removesuffix("weight")
        pieces = [(source, part) for source, part in zip(sources, parts, strict=True) if source is not None]
        return {f"{prefix}{tensor}": value for tensor, value in self._quantized(name, pieces, layer).items()}

    def _values(self, part: Rows, source: StoredLayer | None, name: str) -> ComfyWeight:
        """Return rows of a tensor as floats."""
        if source is None:
            stored = self.plain[part.source]
            header = self.file.headers[stored]
            shape = (part.last - part.first, *header.shape[1:]) if header.shape else ()

            def read() -> torch.Tensor:
                tensor = self.file.read_rows(stored, part.first, part.last) if header.shape else self.file.read(stored)
                return tensor

            return ComfyWeight(shape, header.dtype, read, read)
        rows, columns = self._extent(source, [part], name)

        def decode() -> torch.Tensor:
            return self._decode(source)[part.first : part.first + rows, :columns]

        return ComfyWeight((rows, columns), source.format.format, decode, decode)

    def _extent(self, source: StoredLayer, parts: Sequence[Rows], name: str) -> tuple[int, int]:
        """Return the rows and columns of a weight without padding, as far as the model tells."""
        rows, columns = sum(part.last - part.first for part in parts), source.columns
        padding = _PADDING.get(source.format.format, 1)
        expected = self.expected.get(name)
        if expected is not None and expected.ndim == 2:
            if len(parts) == 1 and -(-expected.shape[0] // padding) * padding == rows:
                rows = expected.shape[0]
            if -(-expected.shape[1] // padding) * padding == columns:
                columns = expected.shape[1]
        return rows, columns

    def _quantized(
        self, name: str, pieces: Sequence[tuple[StoredLayer, Rows]], layer: LayerFormat
    ) -> dict[str, ForeignTensor]:
        first = pieces[0][0]
        rows, columns = self._extent(first, [part for _, part in pieces], name)
        kind = layer.format

        def weight() -> torch.Tensor:
            found = torch.cat([self._weight_rows(source, part) for source, part in pieces])
            return found[:rows, : columns // 2 if kind == "nvfp4" else columns].contiguous()

        def scale() -> torch.Tensor:
            found = torch.cat([self._scale_rows(source, part) for source, part in pieces])
            return found[:rows, : -(-columns // _GROUP_SIZES[kind]) if kind in _GROUP_SIZES else 1].contiguous()

        scale_columns = -(-columns // _GROUP_SIZES[kind]) if kind in _GROUP_SIZES else 1
        if layer.block is not None:
            return self._in_blocks(name, pieces, layer.block, weight)
        made: dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]] = {
            "weight": ((rows, columns), weight),
            "weight_scale": ((rows, scale_columns), scale),
        }
        if kind == "nvfp4":
            made["weight_scale_2"] = ((), lambda: self._one(first, "weight_scale_2"))
        if layer.has_input_scale:
            made["input_scale"] = ((), lambda: self._one(first, "input_scale"))
        if layer.has_mul_scale:
            made["mul_scale"] = ((columns,), lambda: self._read(first, "pre_quant_scale").float().flatten()[:columns])
        return {tensor: ComfyWeight(shape, kind, make, make) for tensor, (shape, make) in made.items()}

    def _in_blocks(
        self,
        name: str,
        pieces: Sequence[tuple[StoredLayer, Rows]],
        block: tuple[int, int],
        weight: Callable[[], torch.Tensor],
    ) -> dict[str, ForeignTensor]:
        """Return a weight under scales of blocks; fused layers are cut between blocks."""
        columns = pieces[0][0].columns
        for source, part in pieces:
            if part.first % block[0] or (part.last % block[0] and part.last != source.rows):
                raise CheckpointError(
                    f"{self.file.path}: {name} is made of rows {part.first} to {part.last} of {part.source}, which cuts"
                    f" a block of {block[0]} rows that share a scale"
                )
        rows = sum(part.last - part.first for _, part in pieces)

        def scale() -> torch.Tensor:
            found = [
                self._block_scales(source)[part.first // block[0] : -(-part.last // block[0])]
                for source, part in pieces
            ]
            return torch.cat(found).contiguous()

        shape = (-(-rows // block[0]), -(-columns // block[1]))
        return {
            "weight": ComfyWeight((rows, columns), "float8_e4m3fn", weight, weight),
            "weight_scale_inv": ComfyWeight(shape, "float8_e4m3fn", scale, scale),
        }

    def _block_scales(self, source: StoredLayer) -> torch.Tensor:
        """Return the scales of a weight in blocks, float32 [row blocks, column blocks]."""
        assert source.format.block is not None
        rows = -(-source.rows // source.format.block[0])
        return self._read(source, "weight_scale").float().reshape(rows, -1)

    def _read(self, source: StoredLayer, tensor: str) -> torch.Tensor:
        return self.file.read(source.names[tensor])

    def _one(self, source: StoredLayer, tensor: str) -> torch.Tensor:
        return self._read(source, tensor).float().reshape(())

    def _weight_rows(self, source: StoredLayer, part: Rows) -> torch.Tensor:
        """Return rows of a weight as the layer's method has them."""
        rows = self.file.read_rows(source.names["weight"], part.first, part.last)
        if source.format.format in ("float8_e4m3fn", "mxfp8"):
            return rows.view(E4M3)
        return swap_nibbles(rows) if source.format.format == "nvfp4" and source.is_blocked else rows

    def _scale_rows(self, source: StoredLayer, part: Rows) -> torch.Tensor:
        """Return the scales of rows of a weight as the layer's method has them."""
        if "weight_scale" not in source.names:
            return torch.ones(part.last - part.first, 1)
        scale = self._read(source, "weight_scale")
        if source.format.format not in _GROUP_SIZES:
            return scale.float().reshape(-1, 1).expand(source.rows, 1)[part.first : part.last]
        dtype = E4M3 if source.format.format == "nvfp4" else torch.uint8
        if source.is_blocked:
            scale = from_blocked(scale, source.rows, source.groups)
        return scale.reshape(source.rows, source.groups).view(dtype)[part.first : part.last]

    def _decode(self, source: StoredLayer) -> torch.Tensor:
        """Return the float32 weight of a layer, for the input as it comes."""
        whole = Rows(source.name, 0, source.rows)
        kind = source.format.format
        if kind == "nvfp4":
            weight, scale = self._weight_rows(source, whole), self._scale_rows(source, whole)
            values = nvfp4.dequantize_nvfp4(weight, scale, self._one(source, "weight_scale_2"))
        elif kind == "mxfp8":
            values = mx.dequantize_mx(self._weight_rows(source, whole), self._scale_rows(source, whole))
        elif source.format.block is not None:
            values = dequantize_fp8(self._weight_rows(source, whole), self._block_scales(source), source.format.block)
        elif kind in DECODED:
            values = self._weight_rows(source, whole).float() * self._scale_rows(source, whole)
        else:
            weight, scale = self._weight_rows(source, whole), self._scale_rows(source, whole)
            values = comfyui_dequantize(kind, weight, scale, rotation=source.format.rotation)
        scaled = source.names.get("pre_quant_scale")
        return values if scaled is None else values * self.file.read(scaled).float().flatten()


# Of a layer as a whole.
_SHARED = ("weight_scale_2", "input_scale")
