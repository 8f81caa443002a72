"""LoRA adapters on quantized layers: peft adds them to what a layer computes, as to any ``nn.Linear``.

Three things the libraries do by looking at a layer's weight, which a quantized layer's can't answer: merging an adapter
into it, which is refused; comparing its shape with the adapter's, to widen one of them (FLUX's loader does); and taking
its norm for DoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lowbit.compat.parts.overrides import override
from lowbit.errors import UnsupportedError
from lowbit.quantization.linear import QuantizedLinear

# Library's module -> class and method that merge adapters into weights: of a whole model, or of one layer.
_MERGING: Mapping[str, tuple[str, str]] = {
    "diffusers.loaders.peft": ("PeftAdapterMixin", "fuse_lora"),
    "peft.tuners.lora.layer": ("Linear", "merge"),
    "peft.tuners.lycoris_utils": ("LycorisLayer", "merge"),
}

_FLUX_LOADER = "diffusers.loaders.lora_pipeline"
_DORA = "peft.tuners.lora.dora"


def register(module: ModuleType) -> None:
    """Prepare one of the libraries' modules for quantized layers."""
    if module.__name__ == _FLUX_LOADER:
        override(module.FluxLoraLoaderMixin, "_calculate_module_shape", _module_shape)
        override(module.FluxLoraLoaderMixin, "_maybe_expand_lora_state_dict", _widen_adapters)
        override(module, "_maybe_dequantize_weight_for_expanded_lora", _refuse_expanding)
    elif module.__name__ == _DORA:
        override(module, "dequantize_module_weight", _dequantized)
    else:
        owner, name = _MERGING[module.__name__]
        override(getattr(module, owner), name, _refuse_merging)


def _refuse_merging(original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Merge, unless an adapter of ``module`` is on a quantized layer: before any of its weights is changed."""
    names = [
        name for name, part in module.named_modules() if isinstance(getattr(part, "base_layer", None), QuantizedLinear)
    ]
    if names:
        raise UnsupportedError(
            f"Adapters can't be fused into quantized layers ({len(names)} here, {names[0] or type(module).__name__} is"
            " one): the sum would have to be rounded to few bits again, and what was there could not be restored. Leave"
            " them beside the weights and weigh them with set_adapters, or fuse them before quantizing"
        )
    return original(module, *args, **kwargs)


def _dequantized(original: Callable[..., Any], module: nn.Module) -> Any:
    """Return the numbers [N, K] of a layer in its compute dtype: DoRA needs their norm."""
    if isinstance(module, QuantizedLinear):
        return nn.Parameter(module.dequantized().to(module.compute_dtype), requires_grad=False)
    return original(module)


def _module_shape(
    original: Callable[..., Any], model: nn.Module, base_module: Any = None, base_weight_param_name: str | None = None
) -> Any:
    """Return (out_features, in_features) of the layer; a packed weight has another shape."""
    layer = base_module
    if layer is None and base_weight_param_name is not None:
        layer = model.get_submodule(base_weight_param_name.removesuffix(".weight"))
    layer = getattr(layer, "base_layer", layer)
    if isinstance(layer, QuantizedLinear):
        return layer.out_features, layer.in_features
    return original(model, base_module=base_module, base_weight_param_name=base_weight_param_name)


def _widen_adapters(
    original: Callable[..., Any], transformer: nn.Module, lora_state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Pad adapters for fewer inputs with zeros; diffusers looks for a weight [N, K] in the state dict.

    Those of quantized layers are padded here, the others by ``original``.
    """
    layers = {f"transformer.{name}.": layer for name, layer in transformer.named_modules()}
    ours, others = {}, {}
    for name, tensor in lora_state_dict.items():
        prefix, _, _ = name.partition("lora_")
        layer = layers.get(prefix)
        layer = getattr(layer, "base_layer", layer)
        if not isinstance(layer, QuantizedLinear):
            others[name] = tensor
        elif name.endswith("lora_A.weight"):
            if tensor.shape[1] > layer.in_features:
                raise _too_large(layer)
            ours[name] = nn.functional.pad(tensor, (0, layer.in_features - tensor.shape[1]))
        else:
            ours[name] = tensor
    return {**original(transformer=transformer, lora_state_dict=others), **ours}


def _refuse_expanding(original: Callable[..., Any], model: nn.Module, module: nn.Module) -> Any:
    layer = getattr(module, "base_layer", module)
    if isinstance(layer, QuantizedLinear):
        raise _too_large(layer)
    return original(model, module)


def _too_large(layer: QuantizedLinear) -> UnsupportedError:
    return UnsupportedError(
        f"The adapter is for a larger layer than {layer.prefix} ({layer.in_features} to {layer.out_features}"
        " features), which can't grow as it is quantized: keep it with ignored_layers"
    )
