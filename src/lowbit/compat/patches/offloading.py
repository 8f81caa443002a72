"""Offloading by diffusers and accelerate: hooks that bring a layer's parameters for its forward and take them away.

They keep references to parameters, or copies in the layout they found, and put them into the layer without telling it.
So quantized layers that such hooks are put on keep the checkpoint's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lowbit.compat.parts.overrides import override
from lowbit.quantization.linear import QuantizedLinear


def register(module: ModuleType) -> None:
    """Prepare a module of accelerate or ``diffusers.hooks.group_offloading`` for quantized layers."""
    if module.__name__.startswith("diffusers"):
        override(module.ModuleGroup, "__init__", _init_module_group)
        return
    override(module, "set_module_tensor_to_device", _set_tensor)
    if module.__name__ == "accelerate.hooks":
        override(module.AlignDevicesHook, "init_hook", _init_align_devices_hook)


def _init_align_devices_hook(original: Callable[..., Any], hook: Any, module: nn.Module) -> Any:
    for layer in _quantized(module.modules() if hook.place_submodules else [module]):
        if hook.offload:
            layer.let_others_move()
            if layer is module and layer.method.stored_names:
                hook.weights_map = _under_own_names(layer, hook.weights_map)
        elif hook.execution_device is not None:  # moved once, now
            layer.leave_kernel()
    return original(hook, module)


def _set_tensor(original: Callable[..., Any], module: nn.Module, tensor_name: str, *args: Any, **kwargs: Any) -> Any:
    """Move or set a tensor of ``module``; what it replaces is the parameter, not the view that ``weight`` is."""
    layer = module.get_submodule(tensor_name.rpartition(".")[0])
    with layer.showing_codes() if isinstance(layer, QuantizedLinear) else nullcontext():
        return original(module, tensor_name, *args, **kwargs)


def _under_own_names(layer: QuantizedLinear, weights: Any) -> dict[str, torch.Tensor]:
    """Return what to bring for a layer whose checkpoint has other names and layouts than its parameters.

    accelerate took ``weights`` from the state dict: copies, which are let go.
    """
    dataset = getattr(weights, "dataset", None)
    if isinstance(dataset, dict):
        for stored in (layer.stored_name(name) for name in layer.quantized_names):
            dataset.pop(f"{weights.prefix}{stored}", None)
    return {name: parameter.data.to("cpu") for name, parameter in layer.named_parameters()}


def _init_module_group(
    original: Callable[..., Any], group: Any, modules: list[nn.Module], *args: Any, **kwargs: Any
) -> None:
    for layer in _quantized(part for module in modules for part in module.modules()):
        layer.let_others_move()
    original(group, modules, *args, **kwargs)


def _quantized(modules: Iterable[nn.Module]) -> list[QuantizedLinear]:
    return [module for module in modules if isinstance(module, QuantizedLinear)]
