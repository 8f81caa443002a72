"""Components whose weights come from somewhere else than their own folder: a single file in another tool's format.

A method whose configuration has ``weights_from`` needs a reader: a module of this package with one function
``open_weights(config, model) -> ForeignWeights`` and a line in ``_READERS``. It says which tensors there are, under the
model's own names, and which configuration they make; planning, checking, loading and the manifest are the same for all.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from lowbit.checkpoints import component as loading
from lowbit.checkpoints.checks import refuse
from lowbit.compat.parts.modules import float32_modules, ignored_keys
from lowbit.errors import CheckpointError, UnsupportedError, located
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.plan import announce

logger = logging.getLogger(__name__)

# Method -> module with open_weights.
_READERS = {
    "gguf": "lowbit.checkpoints.gguf.read",
    "svdquant": "lowbit.checkpoints.nunchaku.read",
    "comfyui": "lowbit.checkpoints.comfyui.read",
    "ascend": "lowbit.checkpoints.msmodelslim.read",
}


class ForeignTensor(Protocol):
    """A tensor that a reader found."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its values."""
        ...

    @property
    def encoding(self) -> str:
        """How it is stored."""
        ...

    def quantized(self) -> torch.Tensor:
        """Return it as the method's parameter of that name."""
        ...

    def decoded(self) -> torch.Tensor:
        """Return its values in a floating dtype."""
        ...


@dataclass(frozen=True)
class ForeignWeights:
    """What a reader found.

    Attributes:
        location: the file, for messages.
        files: that hold the tensors, if there are others than ``location``.
        settings: of the model's configuration, that they were made for.
        config: the configuration that these weights make.
        tensors: by the model's names.
        missing: further names that the format should have had, in its own spelling.
    """

    location: str
    config: QuantizationConfig
    tensors: Mapping[str, ForeignTensor]
    missing: Sequence[str] = ()
    files: Sequence[Path] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def load_component(
    source: str,
    component: str,
    library: str,
    class_name: str,
    config: QuantizationConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load a component of a pipeline with its weights from elsewhere.

    Args:
        source: the base model's folder or Hub id, for the component's configuration.
        component: its name in the pipeline.
        library: of its class.
        class_name: of its class.
        config: with ``weights_from``.
        dtype: of what is not quantized, and of activations.
        device: to load to.

    Raises:
        UnsupportedError: the component is no model of diffusers, or no kernel can run a layer.
        CheckpointError: the file is damaged, or its tensors are not the component's: all in one message.
        ConfigError: a wrong option.
    """
    import diffusers

    kind: Any = getattr(diffusers, class_name, None) if library == "diffusers" else None
    if kind is None:
        raise UnsupportedError(
            f"{component}: {config.get_name()} files are read for diffusers' transformers, not for"
            f" {library}.{class_name}"
        )
    settings = {**kind.load_config(source, subfolder=component)}
    settings.pop("quantization_config", None)  # of the weights that are not used
    with init_empty_weights():
        model: nn.Module = kind.from_config(settings)
    weights = open_weights(config, model)
    model = _with_settings(model, weights)
    with located(weights.location):
        load_weights(model, weights, dtype, device)
    model.register_to_config(_name_or_path=source)  # type: ignore[operator]
    return model


def _with_settings(model: Any, weights: ForeignWeights) -> Any:
    """Return the model that the weights were made for, where their file says more than the base model.

    Raises:
        CheckpointError: the model has no such setting.
    """
    others = {name: value for name, value in weights.settings.items() if model.config.get(name) != value}
    if not others:
        return model
    unknown = sorted(others.keys() - model.config.keys())
    if unknown:
        raise CheckpointError(
            f"{weights.location} is made for a model with {', '.join(unknown)}, which {type(model).__name__} has not:"
            " give the base model that the file was made from"
        )
    logger.info("%s sets %s, as %s demands", type(model).__name__, others, weights.location)
    with init_empty_weights():
        return type(model).from_config({**model.config, **others})


def open_weights(config: QuantizationConfig, model: nn.Module) -> ForeignWeights:
    """Open what ``config.weights_from`` names, for ``model`` (on the meta device)."""
    reader = importlib.import_module(_READERS[config.get_name()])
    with located(str(config.weights_from)):
        weights: ForeignWeights = reader.open_weights(config, model)
    return weights


def load_weights(
    model: nn.Module, weights: ForeignWeights, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """Fill ``model`` (on the meta device), one tensor at a time, and record the manifest.

    Raises:
        CheckpointError: tensors that are missing, unexpected or of another shape, all in one message.
    """
    float32 = tuple(float32_modules(model))
    preparation = loading.prepare(model, weights.config, dtype, device=device, kept={"float32 module": float32})
    expected = model.state_dict()
    _check(model, preparation, weights, expected)
    for name, empty in expected.items():
        tensor = weights.tensors.get(name)
        if tensor is None:
            continue  # optional
        found = preparation.find(name)
        if found is not None:
            layer, parameter = found
            layer.load_tensor(parameter, tensor.quantized().to(device))
            layer.owns_weight = True
            continue
        kept = torch.float32 if set(float32) & set(name.split(".")) else dtype
        value = tensor.decoded().reshape(empty.shape).to(kept if empty.is_floating_point() else empty.dtype)
        set_module_tensor_to_device(model, name, device, value=value, dtype=value.dtype)
    loading.drop_absent(preparation.layers.values())
    model.to(device)  # buffers that no checkpoint has
    loading.check_loaded(model)
    loading.finish(model, preparation, weights.files or [weights.location])
    announce(model)
    model.eval()


def _check(
    model: nn.Module,
    preparation: loading.Preparation,
    weights: ForeignWeights,
    expected: Mapping[str, torch.Tensor],
) -> None:
    ignored = ignored_keys(model)
    missing = sorted(name for name in expected.keys() - weights.tensors.keys() if not preparation.may_be_absent(name))
    unexpected = sorted(
        name for name in weights.tensors.keys() - expected.keys() if not any(re.search(p, name) for p in ignored)
    )
    wrong = []
    for name in expected.keys() & weights.tensors.keys():
        tensor, found = weights.tensors[name], preparation.find(name)
        needed = tuple(expected[name].shape)
        if found is not None and found[1] == "weight":
            needed = (found[0].out_features, found[0].in_features)
        if _squeezed(tensor.shape) != _squeezed(needed):
            wrong.append(f"{name}: found {tensor.encoding} {list(tensor.shape)}, needs {list(needed)}")
    in_file = f" (in the file: {', '.join(weights.missing)})" if weights.missing else ""
    heading = f"{weights.location}: not the tensors of {type(model).__name__}"
    refuse(heading, missing, unexpected, sorted(wrong), in_file)


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """Return ``shape`` without extents of one, which some writers leave out."""
    return tuple(extent for extent in shape if extent != 1)
