"""Finding the input scales of the static activation scheme by watching real inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowbit.errors import ConfigError
from lowbit.quantization.linear import QuantizedLinear
from lowbit.quantization.methods.fp8 import UNCALIBRATED


def static_layers(model: torch.nn.Module) -> dict[str, QuantizedLinear]:
    """Return the layers of ``model`` that scale their input with a stored ``input_scale``, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear) and "input_scale" in layer.quantized_names
    }


def uncalibrated_layers(model: torch.nn.Module) -> list[str]:
    """Return the names of the layers whose ``input_scale`` is still to be found."""
    return [
        name
        for name, layer in static_layers(model).items()
        if layer.get_parameter("input_scale").item() == UNCALIBRATED
    ]


@contextmanager
def calibration(model: torch.nn.Module) -> Iterator[None]:
    """While inside, run ``model`` on representative inputs; afterwards every layer has its ``input_scale``.

    Layers compute with dynamic scales meanwhile, so that early layers do not disturb what later ones see.

    Raises:
        ConfigError: on leaving, when a layer saw no input or an input that was not finite; nothing is changed then.
    """
    layers = static_layers(model)
    absmax: dict[str, float] = dict.fromkeys(layers, 0.0)
    methods = {name: layer.method for name, layer in layers.items()}

    def observe(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            largest = float(inputs[0].detach().abs().amax())
            absmax[name] = max(absmax[name], largest if math.isfinite(largest) else math.inf)

        return layers[name].register_forward_pre_hook(hook)

    handles = [observe(name) for name in layers]
    for layer in layers.values():
        layer.method = copy.copy(layer.method)
        layer.method.activation_scheme = "dynamic"
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.method = methods[name]
    unseen = [name for name, value in absmax.items() if not 0.0 < value < math.inf]
    if unseen:
        raise ConfigError(f"Calibration gave no usable input for {len(unseen)} layers: {', '.join(unseen)}")
    for name, layer in layers.items():
        scale = torch.tensor(layer.method.input_scale_of(absmax[name]), dtype=torch.float32)
        layer.replace_tensor("input_scale", scale.to(layer.get_parameter("input_scale").device))
