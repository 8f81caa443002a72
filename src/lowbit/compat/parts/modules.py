"""What models, layers and pipelines of torch, diffusers and transformers keep in private attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn


def float32_modules(model: nn.Module) -> list[str]:
    """Return names, or parts of names, of the modules that a model of diffusers or transformers keeps in float32."""
    return list(getattr(model, "_keep_in_fp32_modules", None) or ())


def strict_float32_modules(model: nn.Module) -> list[str]:
    """Return those that transformers keeps in float32 for bfloat16 too."""
    return list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())


def ignored_keys(model: nn.Module) -> Sequence[str]:
    """Return patterns of tensors that a model lets a checkpoint have beside its own."""
    return getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()


def absent_keys(model: nn.Module) -> list[str]:
    """Return patterns of tensors that a checkpoint may lack of a model of transformers."""
    return list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def may_lack(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let a checkpoint lack the tensors of a model of transformers that match these patterns too."""
    owner: Any = model
    owner._keys_to_ignore_on_load_missing = [*absent_keys(model), *patterns]


def set_config(model: Any, config: Any) -> None:
    """Replace the configuration of a model of diffusers."""
    model._internal_dict = config


def key_renaming(model: nn.Module) -> Callable[[Any], None] | None:
    """Return what diffusers applies, in place, to the names of a model's old checkpoints."""
    return getattr(model, "_fix_state_dict_keys_on_load", None)


def repeated_blocks(model: nn.Module) -> frozenset[str]:
    """Return the names of the classes that diffusers compiles once for all of a model's blocks."""
    return frozenset(getattr(model, "_repeated_blocks", None) or ())


def persistent_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a module's own parameters and those buffers that are in its state dict."""
    for name, tensor in {**module._parameters, **module._buffers}.items():
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor


def has_hooks(module: nn.Module) -> bool:
    """Tell whether calling a module does more than its class's forward."""
    return "forward" in module.__dict__ or bool(module._forward_hooks or module._forward_pre_hooks)


def hook_registry(module: nn.Module) -> Any:
    """Return diffusers' registry of a module's hooks, ``None`` where it has none."""
    return getattr(module, "_diffusers_hook", None)


def qwen_modulated(block: Any, hidden: torch.Tensor, modulation: torch.Tensor, index: Any) -> torch.Tensor:
    """Return what a block of Qwen-Image scales and shifts ``hidden`` to."""
    modulated: torch.Tensor = block._modulate(hidden, modulation, index)[0]
    return modulated


def note_call(pipeline: Any, **values: Any) -> None:
    """Set what a pipeline's ``__call__`` notes of itself under ``_name``, and its properties and callbacks read."""
    for name, value in values.items():
        setattr(pipeline, f"_{name}", value)


def noted(pipeline: Any, name: str) -> Any:
    """Return what ``note_call`` set."""
    return getattr(pipeline, f"_{name}")


def execution_device(pipeline: Any) -> torch.device:
    """Return where a pipeline computes, which under offloading is not where its weights are."""
    device: torch.device = pipeline._execution_device
    return device


def attention_registry(dispatcher: Any) -> Any:
    """Return the registry of ``diffusers.models.attention_dispatch``: its backends and the one that is active."""
    return dispatcher._AttentionBackendRegistry


def enumeration_value(kind: Any, text: str) -> Any:
    """Return a value of a closed enumeration of strings, made without entering it."""
    value = str.__new__(kind, text)
    value._name_, value._value_ = text.upper(), text
    return value


def goes_through_dispatcher(processor: Any) -> bool:
    """Tell whether an attention processor calls diffusers' dispatcher, which takes a backend and a parallel plan."""
    return hasattr(processor, "_attention_backend")


def attention_backend(processor: Any) -> Any:
    """Return the backend that an attention processor names; ``None`` for the default."""
    return processor._attention_backend


def set_attention_backend(processor: Any, backend: Any) -> None:
    """Let an attention processor name another backend."""
    processor._attention_backend = backend


def parallel_config(processor: Any) -> Any:
    """Return the plan by which an attention processor is distributed, ``None`` for one device."""
    return processor._parallel_config
