"""Checkpoints of msModelSlim: a description of every tensor's type, and weights under names of their own.

Written by ``msmodelslim/core/quant_service/modelslim_v1/save`` as AscendV1 (``quant_model_description.json`` and
``quant_model_weights*.safetensors``) or MindIE (``quant_model_description_<type>.json``,
``quant_model_weight_<type>.safetensors``). A smoothed layer ``X`` is stored as ``X.div.mul_scale`` and ``X.linear.*``.
Weights may also be in diffusers' own files beside a description. Names are diffusers', or those of the model's original
implementation (Wan's ``blocks.0.self_attn.q``), as msModelSlim quantizes that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lowbit.checkpoints.checks import TensorHeader, read_headers, weight_files
from lowbit.checkpoints.external import ForeignTensor, ForeignWeights
from lowbit.containers.json_file import read_json
from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.models.reference_names import WAN, Layers, names_of
from lowbit.ops.int8_static import bias_of, bits_to_scale
from lowbit.quantization.backends import BackendConfig
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.methods.ascend import FLOAT, AscendConfig

DESCRIPTIONS = "quant_model_description*.json"
WEIGHTS = "quant_model_weight*.safetensors"

_WEIGHT_AND_SCALE = ("weight", "weight_scale")
_STATIC = ("quant_bias", "input_scale", "input_offset", "deq_scale")
# Type -> tensors of a layer that may be in the checkpoint and are not needed.
_NOT_NEEDED: Mapping[str, Sequence[str]] = {"W8A8": ("weight_scale", "weight_offset"), "W8A8_MIX": _STATIC}
# What a bias is worked out from -> dtypes.
_BIAS_DTYPES: Mapping[str, Sequence[str]] = {
    "weight": ("I8",),
    "input_offset": ("F32", "F16", "BF16"),
    "quant_bias": ("I32",),
    "deq_scale": ("F32", "I64"),
}
# Class -> original name of a layer -> diffusers', one for one.
_ORIGINAL_NAMES: Mapping[str, Layers] = {"WanTransformer3DModel": WAN}


@dataclass(frozen=True)
class AscendTensor:
    """A tensor of the checkpoint, or one made of several.

    Attributes:
        shape: of its values.
        encoding: how it is stored.
        read: returns it.
    """

    shape: tuple[int, ...]
    encoding: str
    read: Callable[[], torch.Tensor]

    def quantized(self) -> torch.Tensor:
        """Return it as it is stored."""
        return self.read()

    def decoded(self) -> torch.Tensor:
        """Return it as it is stored: only unquantized tensors are asked for."""
        return self.read()


def find_description(folder: Path) -> Path | None:
    """Return the description in ``folder``, ``None`` if there is none.

    Raises:
        CheckpointError: there are several.
    """
    found = sorted(folder.glob(DESCRIPTIONS))
    if len(found) > 1:
        raise CheckpointError(f"{folder}: has several descriptions: {', '.join(file.name for file in found)}")
    return found[0] if found else None


def described(folder: Path, requested: QuantizationConfig | BackendConfig | None) -> AscendConfig | None:
    """Return the configuration to read the component in ``folder`` with, ``None`` if it has no description.

    Raises:
        ConfigError: it has one, and ``requested`` is another method.
    """
    description = find_description(folder)
    if description is None:
        return None
    if requested is not None and not isinstance(requested, AscendConfig):
        raise ConfigError(
            f"{description}: the checkpoint is already quantized with 'ascend' and can't be quantized again with"
            f" {requested.get_name()!r}"
        )
    return replace(requested or AscendConfig(), weights_folder=str(folder))


def open_weights(config: QuantizationConfig, model: nn.Module) -> ForeignWeights:
    """Open the description and the weights in ``config.weights_folder`` for ``model``.

    Raises:
        ConfigError: ``ignored_layers`` names layers that are quantized.
        CheckpointError: they contradict each other, or are damaged.
        UnsupportedError: a type that lowbit does not read.
    """
    assert isinstance(config, AscendConfig)
    assert config.weights_folder is not None
    folder = Path(config.weights_folder)
    description = find_description(folder)
    if description is None:
        raise CheckpointError(f"{folder}: has no {DESCRIPTIONS}")
    headers = read_headers(sorted(folder.glob(WEIGHTS)) or weight_files(folder))
    types = _tensor_types(description, headers)
    stored = _own_names({_parameter_name(name, headers): name for name in headers}, model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layer_types = _layer_types(description, {name: types[key] for name, key in stored.items()}, linear)
    ignored = [name for name in layer_types if config.is_ignored(name)]
    if ignored:
        raise ConfigError(f"ascend: ignored_layers can't keep what {description} has quantized: {', '.join(ignored)}")
    smoothed = [name for name in layer_types if f"{name}.mul_scale" in stored]
    found = replace(config, layer_types=layer_types, smoothed_layers=smoothed, weights_folder=None)
    handles = {file: safe_open(str(file), framework="pt") for file in {header.file for header in headers.values()}}
    sources = {name: _source(headers[key], key, handles[headers[key].file]) for name, key in stored.items()}
    biased = {name: layer for name in linear if (layer := model.get_submodule(name)).bias is not None}
    tensors: dict[str, ForeignTensor] = dict(_of_model(sources, layer_types, biased))
    return ForeignWeights(str(description), found, tensors, files=sorted(handles))


def _tensor_types(description: Path, headers: Mapping[str, TensorHeader]) -> dict[str, str]:
    """Return tensor -> type; raises ``CheckpointError`` where description and files differ."""
    content = read_json(description)
    types: dict[str, str] = {name: kind for name, kind in content.items() if isinstance(kind, str)}
    unnamed = sorted(name for name in headers if name not in types)
    # Without a dot: version, model_quant_type and the like.
    absent = sorted(name for name in types.keys() - headers.keys() if "." in name)
    problems = [f"{len(unnamed)} tensors have no type: {', '.join(unnamed)}"] if unnamed else []
    problems += [f"{len(absent)} tensors are missing: {', '.join(absent)}"] if absent else []
    if problems:
        raise CheckpointError("\n  ".join([f"{description}: not the types of the files beside it", *problems]))
    return {name: types[name] for name in headers}


def _parameter_name(stored: str, names: Mapping[str, Any]) -> str:
    """Return the model's name for a stored one, of a smoothed layer without what wraps it."""
    if stored.endswith(".div.mul_scale"):
        return f"{stored.removesuffix('.div.mul_scale')}.mul_scale"
    module, _, last = stored.rpartition(".")
    wrapper = module.removesuffix(".linear")
    return f"{wrapper}.{last}" if wrapper != module and f"{wrapper}.div.mul_scale" in names else stored


def _own_names(stored: Mapping[str, str], model: nn.Module) -> dict[str, str]:
    """Return the model's name -> the stored one, where the names are those of the original implementation.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    layers, expected = _ORIGINAL_NAMES.get(type(model).__name__, {}), model.state_dict().keys()
    renamed = {name: _diffusers_name(name, layers) for name in stored}
    if len(expected & set(renamed.values())) <= len(expected & stored.keys()):
        return dict(stored)
    counts = Counter(renamed.values())
    twice = sorted(key for name, key in stored.items() if counts[renamed[name]] > 1)
    if twice:
        raise CheckpointError(f"names of diffusers' beside those of the original implementation: {', '.join(twice)}")
    return {renamed[name]: key for name, key in stored.items()}


def _diffusers_name(name: str, layers: Layers) -> str:
    layer, _, last = name.rpartition(".")
    whole, parts = names_of(name, layers), names_of(layer, layers)
    return whole[0] if whole else f"{parts[0]}.{last}" if parts else name


def _layer_types(description: Path, types: Mapping[str, str], linear: set[str]) -> dict[str, str]:
    """Return layer -> type, those of ``FLOAT`` left out; raises for types on what is no linear layer."""
    found = {
        name.removesuffix(".weight"): kind for name, kind in types.items() if name.endswith(".weight") and kind != FLOAT
    }
    wrong = sorted(f"{name} ({kind})" for name, kind in found.items() if name not in linear)
    if wrong:
        raise CheckpointError(f"{description}: gives types to what is no linear layer of the model: {', '.join(wrong)}")
    AscendConfig(layer_types=found)  # refuses types that are not read
    return found


def _source(header: TensorHeader, key: str, handle: Any) -> AscendTensor:
    def read() -> torch.Tensor:
        try:
            tensor: torch.Tensor = handle.get_tensor(key)
        except (SafetensorError, AttributeError) as error:
            raise CheckpointError(f"{header.file}: {key} ({header}) can't be read: {error}") from error
        return tensor

    return AscendTensor(header.shape, header.dtype, read)


def _of_model(
    sources: Mapping[str, AscendTensor], layer_types: Mapping[str, str], biased: Mapping[str, nn.Module]
) -> dict[str, AscendTensor]:
    """Return the tensors by the model's names, of each quantized layer those that its method takes."""
    tensors = dict(sources)
    for name in [name.removesuffix(".mul_scale") for name in sources if name.endswith(".mul_scale")]:
        if name not in layer_types and f"{name}.weight" in sources:
            tensors[f"{name}.weight"] = _folded(name, sources[f"{name}.weight"], tensors.pop(f"{name}.mul_scale"))
    for layer, kind in layer_types.items():
        own = {last: sources.get(f"{layer}.{last}") for last in (*_STATIC, *_WEIGHT_AND_SCALE, "weight_offset", "bias")}
        for last in (*_NOT_NEEDED.get(kind, ()), "weight_offset"):
            tensors.pop(f"{layer}.{last}", None)
        offset = own["weight_offset"]
        if offset is not None and kind != "W8A8" and bool(offset.read().float().any()):
            raise UnsupportedError(f"ascend: {layer}.weight_offset is not zero: asymmetric weights are not read")
        if layer in biased and own["bias"] is None and kind in ("W8A8", "W8A8_MIX"):
            tensors[f"{layer}.bias"] = _bias(layer, own, biased[layer])
        if kind.startswith("W4A4"):
            tensors[f"{layer}.weight"] = _unpacked_shape(sources[f"{layer}.weight"])
        scale = sources.get(f"{layer}.mul_scale")
        if scale is not None:
            tensors[f"{layer}.mul_scale"] = _float32(scale)
    return tensors


def _float32(tensor: AscendTensor) -> AscendTensor:
    return replace(tensor, read=lambda: tensor.read().float())


def _folded(layer: str, weight: AscendTensor, mul_scale: AscendTensor) -> AscendTensor:
    """Return the weight of an unquantized layer times what its input would have been multiplied by."""
    if mul_scale.shape != weight.shape[1:]:
        shapes = f"{list(mul_scale.shape)}, its weight {list(weight.shape)}"
        raise CheckpointError(f"{layer}.div.mul_scale has the shape {shapes}: one element per column is needed")
    return replace(weight, read=lambda: weight.read().float() * mul_scale.read().float())


def _unpacked_shape(weight: AscendTensor) -> AscendTensor:
    is_packed = weight.encoding == "U8" and len(weight.shape) == 2
    return replace(weight, shape=(weight.shape[0], 2 * weight.shape[1])) if is_packed else weight


def _bias(layer: str, own: Mapping[str, AscendTensor | None], module: Any) -> AscendTensor:
    """Return the bias that ``quant_bias`` holds, of a layer whose file has it nowhere else."""
    parts = {name: own[name] for name in _BIAS_DTYPES}
    missing = [f"{layer}.{name}" for name, part in parts.items() if part is None]
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing: {', '.join(missing)}")
    found = {name: part for name, part in parts.items() if part is not None}
    rows, columns = module.out_features, module.in_features
    shapes = {"weight": ((rows, columns),), "input_offset": ((), (1,))}
    wrong = [
        f"{layer}.{name}: found {part.encoding} {list(part.shape)}, needs {_BIAS_DTYPES[name][0]} for the layer's bias"
        for name, part in found.items()
        if part.encoding not in _BIAS_DTYPES[name] or part.shape not in shapes.get(name, ((rows,),))
    ]
    if wrong:
        raise CheckpointError("\n  ".join([f"{len(wrong)} wrong:", *wrong]))

    def read() -> torch.Tensor:
        weight, offset, bias, scale = (part.read() for part in found.values())
        return bias_of(weight, offset, bias, bits_to_scale(scale) if scale.dtype == torch.int64 else scale)

    return AscendTensor(found["quant_bias"].shape, "in quant_bias", read)
