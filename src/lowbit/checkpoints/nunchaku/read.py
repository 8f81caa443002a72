"""nunchaku's files as the weights of a component: their order undone, fused layers split.

A file holds a transformer's tensors (merged ones have ``quantization_config``, ``config`` and ``model_class`` in the
header's metadata): W4A4 layers with a low-rank product, modulation layers in 4 bits with 16-bit activations ("AWQ"),
and the others as they are. The orders are in ``lowbit.ops.nunchaku``, the names in ``nunchaku_names``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from lowbit.checkpoints.checks import TensorHeader
from lowbit.checkpoints.external import ForeignTensor, ForeignWeights
from lowbit.checkpoints.hub import resolve_safetensors
from lowbit.checkpoints.safetensors_file import SafetensorsFile, open_safetensors
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.models.nunchaku_names import LAYOUTS, NunchakuLayout
from lowbit.models.reference_names import Layout, names_of, reference_tensors
from lowbit.ops import nunchaku
from lowbit.ops.svdquant import svdquant_dequantize
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.methods.svdquant import PRECISIONS, SvdQuantConfig

_UNUSED = "smooth_factor_orig"  # of the original model; nothing reads it
# Names of earlier versions.
_ALIASES = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor", "smooth_orig": _UNUSED}
_FLOATS = ("BF16", "F16")


@dataclass(frozen=True)
class Part:
    """A tensor of the model, made when it is asked for."""

    shape: tuple[int, ...]
    encoding: str
    make: Callable[[], torch.Tensor]

    def quantized(self) -> torch.Tensor:
        """Return it."""
        return self.make()

    def decoded(self) -> torch.Tensor:
        """Return it."""
        return self.make()


def open_weights(config: QuantizationConfig, model: nn.Module) -> ForeignWeights:
    """Open the file that ``config.svdquant_model`` names and find the tensors of ``model`` in it.

    Raises:
        ConfigError: there is no such file.
        CheckpointError: the file is damaged or of another model; all tensors that are wrong in one message.
        UnsupportedError: nunchaku's layout of the model's class is not known.
    """
    assert isinstance(config, SvdQuantConfig)
    assert config.svdquant_model is not None
    layout = LAYOUTS.get(type(model).__name__)
    if layout is None:
        raise UnsupportedError(
            f"nunchaku's layout of {type(model).__name__} is not known; it is known of {', '.join(LAYOUTS)}"
        )
    file = open_safetensors(resolve_safetensors("svdquant_model", config.svdquant_model))
    reader = _Reader(file, layout, model)
    reader.check()
    ranks = reader.ranks
    most_common = Counter(ranks.values()).most_common(1)[0][0]
    config = replace(config, precision=reader.precision, rank=most_common, quantized_layers=dict(ranks))
    return ForeignWeights(str(file.path), config, reader.tensors(config))


@dataclass(frozen=True)
class Source:
    """A layer of the file.

    Attributes:
        name: in the file.
        rows: of its weight, without padding.
        columns: likewise.
        is_awq: 4-bit weights for 16-bit activations.
        after_gelu: see ``NunchakuLayout``.
        parts: of a modulation layer, 0 of others.
    """

    name: str
    rows: int
    columns: int
    is_awq: bool
    after_gelu: bool
    parts: int


@dataclass(frozen=True)
class _Reader:
    file: SafetensorsFile
    layout: NunchakuLayout
    model: nn.Module
    cache: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Name as today's versions write it -> name in the file."""
        found = {}
        for name in self.file.headers:
            layer, dot, tensor = name.rpartition(".")
            found[f"{layer}{dot}{_ALIASES.get(tensor, tensor)}"] = name
        return found

    @cached_property
    def linear(self) -> Mapping[str, nn.Linear]:
        return {name: layer for name, layer in self.model.named_modules() if type(layer) is nn.Linear}

    @cached_property
    def places(self) -> Mapping[str, tuple[Source, int]]:
        """Layer of the model -> the quantized layer of the file with its rows, and the first of them."""
        found = {}
        weights = [f"{name}.weight" for name in self.linear]
        for fused, tensor in reference_tensors(Layout("", self.layout.layers), weights).items():
            name = fused.removesuffix(".weight")
            if f"{name}.qweight" not in self.names:
                continue
            layers = [part.removesuffix(".weight") for part in tensor.parts]
            source = self._source(name, sum(self.linear[layer].out_features for layer in layers), layers[0])
            first = 0
            for layer in layers:
                found[layer] = (source, first)
                first += self.linear[layer].out_features
        return found

    @cached_property
    def joined(self) -> Mapping[str, tuple[Source, ...]]:
        """Layer of the model -> the quantized layers of the file with its columns."""
        found = {}
        for layer, linear in self.linear.items():
            names = names_of(layer, self.layout.joined)
            if names and all(f"{name}.qweight" in self.names for name in names):
                # The first reads what attention gives, as wide as the result.
                widths = (linear.out_features, linear.in_features - linear.out_features)
                found[layer] = tuple(
                    replace(self._source(name, linear.out_features, layer), columns=width)
                    for name, width in zip(names, widths, strict=True)
                )
        return found

    def _source(self, name: str, rows: int, layer: str) -> Source:
        columns = self.linear[layer].in_features
        parts = next((n for pattern, n in self.layout.modulation.items() if names_of(name, {pattern: ("",)})), 0)
        after_gelu = any(names_of(name, {pattern: ("",)}) for pattern in self.layout.after_gelu)
        return Source(name, rows, columns, f"{name}.wzeros" in self.names, after_gelu, parts)

    @cached_property
    def sources(self) -> Mapping[str, Source]:
        """All quantized layers of the file that are the model's, by name."""
        found = [source for source, _ in self.places.values()]
        return {source.name: source for source in [*found, *(s for group in self.joined.values() for s in group)]}

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """W4A4 layer of the model -> its rank."""
        single = {layer: (source,) for layer, (source, _) in self.places.items() if not source.is_awq}
        groups: Mapping[str, tuple[Source, ...]] = {**single, **self.joined}
        return {layer: sum(self._rank(source) for source in group) for layer, group in groups.items()}

    def _rank(self, source: Source) -> int:
        shape = self._header(f"{source.name}.proj_down").shape
        return shape[-1] if shape else 0

    @cached_property
    def precision(self) -> str:
        """Of the file's W4A4 layers: told by the dtype of their scales."""
        dtypes = {self._header(f"{s.name}.wscales").dtype for s in self.sources.values() if not s.is_awq}
        return "nvfp4" if dtypes == {"F8_E4M3"} else "int4"

    def _header(self, name: str) -> TensorHeader:
        found = self.names.get(name)
        return self.file.headers[found] if found is not None else TensorHeader(self.file.path, "nothing", ())

    def check(self) -> None:
        """Check the metadata, and every quantized layer's tensors.

        Raises:
            CheckpointError: what is wrong, all of it.
        """
        problems = [*self._metadata_problems()]
        for source in self.sources.values():
            problems += self._awq_problems(source) if source.is_awq else self._problems(source)
        if not self.ranks:
            problems.append(f"no 4-bit layer of {type(self.model).__name__}: this is not a file of nunchaku's")
        if problems:
            raise CheckpointError("\n  ".join([f"{self.file.path}: {len(problems)} problems", *problems]))

    def _metadata_problems(self) -> list[str]:
        problems = []
        class_name = self.file.metadata.get("model_class")
        if class_name is not None and class_name not in self.layout.class_names:
            problems.append(f"its model_class is {class_name}, and the base model's a {type(self.model).__name__}")
        config = self.file.json("quantization_config") or {}
        weight = config.get("weight")
        dtype = weight.get("dtype") if isinstance(weight, dict) else None
        if dtype is not None and _PRECISION_OF.get(str(dtype)) != self.precision:
            problems.append(f"quantization_config says the weights are {dtype}, and the tensors are {self.precision}")
        return problems

    def _problems(self, source: Source) -> list[str]:
        rows, columns = _padded(source.rows), _padded(source.columns)
        kind = PRECISIONS[self.precision]
        scales = ("F8_E4M3",) if self.precision == "nvfp4" else _FLOATS
        rank = self._rank(source)
        # The scales of 16 columns are padded to whole tiles, those of 64 to the weight's columns: two tiles.
        tile = nunchaku.TILE_COLUMNS
        scaled = -(-source.columns // tile) * tile if self.precision == "nvfp4" else columns
        needed: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
            "qweight": ((rows, columns // 2), ("I8", "U8")),
            "wscales": ((scaled // kind.group_size, rows), scales),
            "smooth_factor": ((columns,), _FLOATS),
            "proj_down": ((columns, rank), _FLOATS),
            "proj_up": ((rows, rank), _FLOATS),
            "bias": ((rows,), _FLOATS),
            "wcscales": ((rows,), _FLOATS),
        }
        optional = ("bias", "wcscales") if not source.after_gelu or self.precision == "nvfp4" else ("wcscales",)
        problems = self._compare(source, needed, optional)
        wtscale = self._header(f"{source.name}.wtscale")
        if wtscale.dtype != "nothing" and torch.Size(wtscale.shape).numel() != 1:
            problems.append(f"{source.name}.wtscale: found {wtscale}, needs one value")
        if rank % nunchaku.LOW_RANK_TILE or rank == 0:
            problems.append(f"{source.name}.proj_down: rank {rank} is no multiple of {nunchaku.LOW_RANK_TILE}")
        return problems

    def _awq_problems(self, source: Source) -> list[str]:
        stored = self._header(f"{source.name}.wscales").shape or (0,)
        groups = max(source.columns // nunchaku.AWQ_GROUP_SIZE, stored[0])  # beyond is padding
        scales = ((groups, source.rows), _FLOATS)
        needed: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
            "qweight": ((source.rows // 4, source.columns // 2), ("I32",)),
            "wscales": scales,
            "wzeros": scales,
            "bias": ((source.rows,), _FLOATS),
        }
        return self._compare(source, needed, ("bias",))

    def _compare(
        self,
        source: Source,
        needed: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]],
        optional: Sequence[str],
    ) -> list[str]:
        problems = []
        for tensor, (shape, dtypes) in needed.items():
            found = self._header(f"{source.name}.{tensor}")
            if found.dtype == "nothing" and tensor in optional:
                continue
            if found.shape != shape or found.dtype not in dtypes:
                expected = f"{' or '.join(dtypes)} {list(shape)}"
                problems.append(
                    f"{source.name}.{tensor}: found {found}, needs {expected} for {source.rows} x {source.columns}"
                )
        return problems

    def tensors(self, config: SvdQuantConfig) -> dict[str, ForeignTensor]:
        """Return the model's tensors; those of the file that are not the model's under their own names."""
        found: dict[str, ForeignTensor] = {}
        for layer, (source, first) in self.places.items():
            found.update(self._layer(layer, (source,), first, config))
        for layer, group in self.joined.items():
            found.update(self._layer(layer, group, 0, config))
        found.update(self._plain())
        return found

    def _layer(
        self, layer: str, group: tuple[Source, ...], first: int, config: SvdQuantConfig
    ) -> dict[str, ForeignTensor]:
        linear = self.linear[layer]
        last = first + linear.out_features
        dense = group[0].is_awq or config.is_ignored(layer)
        names = ["weight"] if dense else [name for name in _TENSORS if self._has(group, name)]
        if linear.bias is not None and all(f"{source.name}.bias" in self.names for source in group):
            names.append("bias")

        def make(name: str) -> Callable[[], torch.Tensor]:
            def read() -> torch.Tensor:
                tensors = self._decode(group)
                return _rows(name, _dense(tensors) if name == "weight" else tensors[name], first, last)

            return read

        shapes = {"weight": (last - first, linear.in_features), "bias": (last - first,)}
        encoding = "AWQ" if group[0].is_awq else self.precision
        return {
            f"{layer}.{name}": Part(shapes.get(name) or self._shape(name, layer, group), encoding, make(name))
            for name in names
        }

    def _has(self, group: tuple[Source, ...], name: str) -> bool:
        if name in ("wcscales", "wtscale"):
            return self.precision == "nvfp4" and any(f"{source.name}.{name}" in self.names for source in group)
        return True

    def _shape(self, name: str, layer: str, group: tuple[Source, ...]) -> tuple[int, ...]:
        """Of a W4A4 tensor of the model: of the weight that of its values."""
        rows, columns = self.linear[layer].out_features, self.linear[layer].in_features
        rank = sum(self._rank(source) for source in group)
        return {
            "qweight": (rows, columns),
            "wscales": (columns // PRECISIONS[self.precision].group_size, rows),
            "smooth_factor": (columns,),
            "proj_down": (columns, rank),
            "proj_up": (rows, rank),
            "wcscales": (rows,),
            "wtscale": (1,),
        }[name]

    def _plain(self) -> dict[str, ForeignTensor]:
        """Return what is not quantized, and what is not the model's."""
        known = {f"{source}.{name}" for source in self.sources for name in (*_TENSORS, "wzeros", "bias", _UNUSED)}
        plain = {name: stored for name, stored in self.names.items() if name not in known}
        found: dict[str, ForeignTensor] = {}
        expected = self.model.state_dict()
        fused = reference_tensors(Layout("", self.layout.layers), expected)
        for name, stored in plain.items():
            parts = fused[name].parts if name in fused else (name,)
            heights = [expected[part].shape[0] if part in expected and expected[part].ndim else 0 for part in parts]
            found.update(self._split(parts, heights, stored))
        return found

    def _split(self, parts: Sequence[str], heights: Sequence[int], stored: str) -> dict[str, ForeignTensor]:
        header = self.file.headers[stored]
        if len(parts) == 1:
            return {parts[0]: Part(header.shape, header.dtype, lambda: self._floats(stored))}
        found: dict[str, ForeignTensor] = {}
        first = 0
        for part, height in zip(parts, heights, strict=True):
            rows = slice(first, first + height)
            # A tensor that is too short shows in the shapes.
            shape = (len(range(*rows.indices(header.shape[0] if header.shape else 0))), *header.shape[1:])
            found[part] = Part(shape, header.dtype, lambda rows=rows: self._floats(stored)[rows])  # type: ignore[misc]
            first += height
        return found

    def _floats(self, stored: str) -> torch.Tensor:
        return self.file.read(stored)

    def _decode(self, group: tuple[Source, ...]) -> dict[str, torch.Tensor]:
        """Return the row-major tensors of a layer, or of the layers that hold its columns; the last is remembered."""
        key = " ".join(source.name for source in group)
        if key not in self.cache:
            self.cache.clear()
            try:
                decoded = [self._awq(source) if source.is_awq else self._w4a4(source) for source in group]
            except ValueError as error:
                raise CheckpointError(f"{self.file.path}: {key}: {error}") from error
            self.cache[key] = decoded[0] if len(decoded) == 1 else _join(decoded, f"{self.file.path}: {key}")
        return self.cache[key]

    def _read(self, source: Source, tensor: str) -> torch.Tensor | None:
        name = self.names.get(f"{source.name}.{tensor}")
        return None if name is None else self.file.read(name)

    def _need(self, source: Source, tensor: str) -> torch.Tensor:
        found = self._read(source, tensor)
        assert found is not None, tensor  # checked before
        return found

    def _awq(self, source: Source) -> dict[str, torch.Tensor]:
        weight = nunchaku.awq_dequantize(*(self._need(source, name) for name in ("qweight", "wscales", "wzeros")))
        bias = self._read(source, "bias")
        if source.parts:
            weight, bias = nunchaku.split_modulation(weight, bias, source.parts)
        return {"dense": weight} if bias is None else {"dense": weight, "bias": bias}

    def _w4a4(self, source: Source) -> dict[str, torch.Tensor]:
        rows, columns = source.rows, source.columns
        groups = columns // PRECISIONS[self.precision].group_size
        unpack_scales = nunchaku.unpack_micro_scales if self.precision == "nvfp4" else nunchaku.unpack_scales
        found = {
            "qweight": nunchaku.unpack_weight(self._need(source, "qweight").view(torch.int8))[:rows, : columns // 2],
            "wscales": unpack_scales(self._need(source, "wscales"))[:groups, :rows],
            "smooth_factor": nunchaku.unpack_scales(self._need(source, "smooth_factor"))[:columns],
            "proj_down": nunchaku.unpack_low_rank(self._need(source, "proj_down"), down=True)[:columns],
            "proj_up": nunchaku.unpack_low_rank(self._need(source, "proj_up"), down=False)[:rows],
        }
        for name in ("bias", "wcscales"):
            packed = self._read(source, name)
            if packed is not None:
                found[name] = nunchaku.unpack_scales(packed)[:rows]
        wtscale = self._read(source, "wtscale")
        if wtscale is not None:
            found["wtscale"] = wtscale.float().reshape(1)
        if source.after_gelu and self.precision == "int4":
            found["bias"] = _fold_shift(found)
        return found


_PRECISION_OF = {"int4": "int4", "sint4": "int4", "fp4_e2m1_all": "nvfp4"}
_TENSORS = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up", "wcscales", "wtscale")
# Those without rows of their own.
_SHARED = ("smooth_factor", "proj_down", "wtscale")


def _padded(extent: int) -> int:
    return -(-extent // nunchaku.TILE_ROWS) * nunchaku.TILE_ROWS


def _rows(name: str, tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    if name in _SHARED:
        return tensor.clone()  # of each layer its own: safetensors does not write memory that tensors share
    return tensor[:, first:last].contiguous() if name == "wscales" else tensor[first:last].contiguous()


def _dense(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "dense" in tensors:
        return tensors["dense"]
    return svdquant_dequantize(**{name: tensors[name] for name in _TENSORS if name in tensors})


def _fold_shift(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the bias float32 [N] of a layer whose 4-bit product expects its input shifted, for one that does not."""
    main = {name: tensors[name] for name in _TENSORS if name in tensors and not name.startswith("proj")}
    none = {"proj_down": tensors["proj_down"][:, :0], "proj_up": tensors["proj_up"][:, :0]}
    added = svdquant_dequantize(**main, **none).sum(dim=1) * nunchaku.GELU_SHIFT
    return tensors["bias"].float() + added


def _join(layers: Sequence[Mapping[str, torch.Tensor]], what: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer whose columns are those of several, with their low-rank products side by side."""
    if any("wcscales" in layer for layer in layers):
        raise CheckpointError(f"{what}: layers with scales per output channel (wcscales) can't be made one layer")
    first = layers[0].get("wtscale", torch.ones(1))
    found = {
        "qweight": torch.cat([layer["qweight"] for layer in layers], dim=1),
        "wscales": torch.cat([layer["wscales"] for layer in layers]),
        # The scale of the first is that of all: what others have beyond goes to their inputs.
        "smooth_factor": torch.cat(
            [layer["smooth_factor"].float() * (first / layer.get("wtscale", torch.ones(1))) for layer in layers]
        ),
        "proj_down": torch.block_diag(*(layer["proj_down"] for layer in layers)),
        "proj_up": torch.cat([layer["proj_up"] for layer in layers], dim=1),
        "wtscale": first,
    }
    biases = [layer["bias"].float() for layer in layers if "bias" in layer]
    return {**found, "bias": torch.stack(biases).sum(dim=0)} if biases else found
