"""Taking no device memory for what need not be there: layers that nobody looks at, and tables of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding

from lowbit.models.unused import UNUSED_LAYERS

LEAST_BYTES = 1 << 28
"""Of a table of embeddings that is worth moving."""


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


class HostEmbedding(nn.Module):
    """An embedding whose table stays in the CPU's memory: a prompt reads a few hundred rows of its 150,000.

    The table is no parameter, so that moving the model does not move it and the model's device is that of its layers;
    in the state it has the embedding's name.
    """

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__()
        self.table = layer.weight.detach().to("cpu")

    @property
    def weight(self) -> torch.Tensor:
        """The table [tokens, width]."""
        return self.table

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows [..., width] of ``tokens`` [...], on their device."""
        return embedding(tokens.to("cpu"), self.table).to(tokens.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.table

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, torch.Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        if strict:
            unexpected_keys += [name for name in state_dict if name.startswith(prefix) and name != key]
        if key not in state_dict:
            missing_keys += [key] if strict else []
        elif state_dict[key].shape != self.table.shape:
            shapes = f"expected {list(self.table.shape)}, got {list(state_dict[key].shape)}"
            error_msgs.append(f"size mismatch for {key}: {shapes}")
        else:  # a table of its own, as the old one may be mapped from a file
            is_assigned = local_metadata.get("assign_to_params_buffers", False)
            dtype = state_dict[key].dtype if is_assigned else self.table.dtype
            self.table = state_dict[key].detach().to("cpu", dtype, copy=not is_assigned)


def keep_embeddings_on_host(pipeline: Any, least_bytes: int = LEAST_BYTES) -> dict[str, str]:
    """Move the text encoders' tables of embeddings to the CPU, where no other layer shares them.

    Args:
        pipeline: loaded on an accelerator; its components are changed in place.
        least_bytes: smaller tables stay.

    Returns:
        Component -> name of its embedding, for those that were moved.
    """
    done = {}
    for component, model in pipeline.components.items():
        found = find_embedding(model, least_bytes)
        if found is not None:
            name, layer = found
            model.set_submodule(name, HostEmbedding(layer))
            done[component] = name
    return done


def find_embedding(model: Any, least_bytes: int = LEAST_BYTES) -> tuple[str, nn.Embedding] | None:
    """Return name and layer of the embedding that ``keep_embeddings_on_host`` moves, ``None`` where it moves none."""
    from transformers import PreTrainedModel

    layer = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(layer) is not nn.Embedding or _shares_weights(model, layer) or layer.weight.nbytes < least_bytes:
        return None
    return next(name for name, module in model.named_modules() if module is layer), layer


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
