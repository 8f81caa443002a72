"""Taking no device memory and no time for layers whose results the pipeline does not look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowbit.models.unused import UNUSED_LAYERS


def set_aside(pipeline: Any) -> dict[str, list[str]]:
    """Move the layers of ``UNUSED_LAYERS`` to the CPU and have them pass on what they are given.

    They stay in the model, so that it can be saved whole; on the CPU a layer that is not read takes no memory either,
    where its file is mapped.

    Args:
        pipeline: loaded; its components are changed in place.

    Returns:
        Component -> names of the layers set aside.
    """
    done: dict[str, list[str]] = {}
    for component, names in UNUSED_LAYERS.get(type(pipeline).__name__, {}).items():
        model = getattr(pipeline, component, None)
        if isinstance(model, nn.Module):
            done[component] = [name for name in names if _set_aside(model, name)]
    return {component: names for component, names in done.items() if names}


def _set_aside(model: nn.Module, name: str) -> bool:
    layer = find_layer(model, name)
    if layer is None or _shares_weights(model, layer):
        return False
    layer.to("cpu").forward = _pass_on
    return True


def find_layer(model: nn.Module, name: str) -> nn.Module | None:
    """Return the layer with a name of ``UNUSED_LAYERS``, ``None`` where there is none."""
    found: Any = model
    for part in name.split("."):
        if part.lstrip("-").isdigit():
            found = found[int(part)] if isinstance(found, nn.ModuleList) and len(found) else None
        else:
            found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def _shares_weights(model: nn.Module, layer: nn.Module) -> bool:
    """Whether other layers have weights of ``layer``, as a head may have the embedding's."""
    own = {id(parameter) for parameter in layer.parameters()}
    inside = {id(module) for module in layer.modules()}
    others = (module for module in model.modules() if id(module) not in inside)
    return any(id(parameter) in own for module in others for parameter in module.parameters(recurse=False))


def _pass_on(hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return hidden_states
