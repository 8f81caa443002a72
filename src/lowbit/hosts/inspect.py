"""What loading a component would do, found from its configuration and the headers of its files alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.checkpoints import component as loading
from lowbit.checkpoints.checks import read_headers, separate_config, weight_files
from lowbit.checkpoints.external import open_weights
from lowbit.checkpoints.msmodelslim.read import described
from lowbit.checkpoints.skeleton import empty_component
from lowbit.compat.parts.modules import float32_modules
from lowbit.containers.json_file import read_json
from lowbit.errors import located
from lowbit.hosts import routing as dispatch
from lowbit.hosts.transformers import for_base_model, kept_by_model
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.linear import QuantizedLinear
from lowbit.quantization.manifest import Manifest
from lowbit.quantization.plan import make_manifest


@dataclass(frozen=True)
class Inspection:
    """A component as it would be loaded.

    Attributes:
        config: that lowbit would load it with.
        manifest: of its layers; kernels are those of the CPU's tables only after loading, and so left out.
        weights: of every linear layer, name -> how many.
    """

    config: QuantizationConfig
    manifest: Manifest
    weights: Mapping[str, int]


def stored_config(source: str, component: str) -> Any:
    """Return what a local component's files say of their quantization, as they say it; ``None`` for nothing."""
    folder = Path(source) / component
    if not (folder / "config.json").is_file():
        return None
    return read_json(folder / "config.json").get("quantization_config") or separate_config(folder)


def own_config(source: str, component: str, requested: QuantizationConfig | None) -> QuantizationConfig | None:
    """Return the configuration that lowbit would load a component with, ``None`` if it would not.

    Args:
        source: the pipeline's folder or Hub id; of the latter only what is asked for is known.
        component: its name.
        requested: what the user asks for.

    Raises:
        ConfigError: the checkpoint is quantized another way.
    """
    if requested is not None and requested.weights_from is not None:
        return requested
    folder = Path(source) / component
    with located(str(folder)):
        found = described(folder, requested) if folder.is_dir() else None
        if found is not None:
            return found
        stored = stored_config(source, component)
        if stored is None or (requested is None and not dispatch.claims(stored)):
            return requested
        return dispatch.merge_configs(stored, requested)


def inspect_component(
    source: str, component: str, library: str, class_name: str, config: QuantizationConfig, dtype: torch.dtype
) -> Inspection:
    """Plan a component's layers as loading it would, without reading its weights.

    Args:
        source: the pipeline's folder or Hub id.
        component: its name.
        library: of its class.
        class_name: of its class.
        config: as ``own_config`` returns it.
        dtype: of what is not quantized.

    Raises:
        ConfigError: a wrong option, or nothing to quantize.
        CheckpointError: files that can't be read.
    """
    model = empty_component(source, component, library, class_name)
    weights = {name: layer.weight.numel() for name, layer in model.named_modules() if type(layer) is nn.Linear}
    others = _cast(model, dtype)
    found, files, names = _found(source, component, config, model)
    if found.needs_calibration:  # smoothing; which layers take the method does not depend on it
        found = replace(found, smoothing=None)  # type: ignore[call-arg]
    kept: Mapping[str, Sequence[str]] = {"float32 module": float32_modules(model)}
    if library == "transformers":
        found, kept = for_base_model(found, model), kept_by_model(model)
    preparation = loading.prepare(model, found, dtype, kept=kept)
    if found.is_serialized:
        _drop_absent(preparation.layers.values(), names)
    manifest = make_manifest(model, preparation.plan, component)
    return Inspection(found, replace(manifest, other_bytes=others, bytes_on_disk=loading.bytes_on_disk(files)), weights)


def _found(
    source: str, component: str, config: QuantizationConfig, model: nn.Module
) -> tuple[QuantizationConfig, Sequence[Path | str], Collection[str]]:
    """Return ``config`` with what the files' headers tell, the files, and the names of their tensors."""
    if config.weights_from is not None:
        weights = open_weights(config, model)
        return weights.config, weights.files or [weights.location], set(weights.tensors)
    folder = Path(source) / component
    if not folder.is_dir():
        return config, (), ()
    files = weight_files(folder)
    names = read_headers(files).keys()
    return config.of_checkpoint(names), files, names


def _drop_absent(layers: Iterable[QuantizedLinear], names: Collection[str]) -> None:
    """Let layers do without the optional tensors that are not among ``names``, which may have a model's prefix."""
    known = {*names, *(name.partition(".")[2] for name in names)}
    for layer in layers:
        for name in layer.method.optional & set(layer.quantized_names):
            if f"{layer.prefix}.{layer.stored_name(name)}" not in known:
                layer.drop_tensor(name)


def _cast(model: nn.Module, dtype: torch.dtype) -> int:
    """Give the parameters of ``model`` the dtype that loading gives them; return the bytes outside linear weights."""
    float32 = set(float32_modules(model))
    linear = {id(layer.weight) for layer in model.modules() if type(layer) is nn.Linear}
    others = 0
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not float32 & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
        others += 0 if id(parameter) in linear else parameter.nbytes
    return others + sum(buffer.nbytes for buffer in model.buffers())


def files_on_disk(source: str, component: str) -> int | None:
    """Return the bytes of a local component's weights; ``None`` if it has none, or is not here."""
    folder = Path(source) / component
    if not folder.is_dir():
        return None
    return loading.bytes_on_disk(folder.glob("*.safetensors"))
