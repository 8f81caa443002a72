"""lowbit's attention in a diffusers model, through the library's own attention dispatcher.

Each attention processor holds the name of the backend that ``dispatch_attention_fn`` calls for it. lowbit registers a
backend for each kind and kernel, and names it in the processors of one model: other models keep theirs, and
``restore_attention`` gives back what was there. (The library's ``set_attention_backend`` also changes the process's
default, and so every model.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from lowbit.compat.parts.modules import (
    attention_backend,
    attention_registry,
    enumeration_value,
    goes_through_dispatcher,
    set_attention_backend,
)
from lowbit.errors import ConfigError
from lowbit.ops.attention import (
    IMPLEMENTATIONS,
    TORCH,
    UNQUANTIZED,
    AttentionProblem,
    attention_operator,
    check_kind,
    select_kernel,
)
from lowbit.ops.dispatch import AUTO, verdicts

_RECORD = "lowbit_attention"

# Attention to fewer keys stays torch's: there is no time in it to save.
FEWEST_KEYS = 512


@dataclass(frozen=True)
class AttentionRecord:
    """What was done to a model's attention.

    Attributes:
        kind: ``"int8"``, ``"fp8"`` or ``UNQUANTIZED``.
        kernel: implementation that computes it.
        layers: number of attention modules.
    """

    kind: str
    kernel: str
    layers: int

    def summary(self) -> str:
        """Return it in a few words."""
        kind = "unquantized" if self.kind == UNQUANTIZED else self.kind
        return f"{self.layers} attention layers {kind} ({self.kernel})"


def quantize_attention(
    model: nn.Module, kind: str, *, device: torch.device, dtype: torch.dtype, kernel: str = AUTO
) -> AttentionRecord:
    """Have ``model``, a diffusers model, compute its attention in 8 bits from now on.

    Args:
        model: its attention modules have to call diffusers' dispatcher.
        kind: ``"int8"`` or ``"fp8"``.
        device: it runs on.
        dtype: it computes in.
        kernel: a name of ``lowbit.ops.attention.IMPLEMENTATIONS``; ``"auto"`` takes the first that can.

    Raises:
        ConfigError: an unknown kind or kernel, or attention that does not go through the dispatcher.
        UnsupportedError: no kernel can run it here; lists every reason.
    """
    kind = check_kind(kind)
    if kind == UNQUANTIZED:
        raise ConfigError("Attention can be quantized to int8 or fp8; restore_attention undoes it")
    processors = check_attention(model)
    chosen = select_kernel(AttentionProblem(device, dtype, kind, _head_dim(model)), kernel)
    return _replace_attention(model, processors, kind, chosen)


def speed_up_attention(model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> AttentionRecord | None:
    """Have ``model`` compute attention by a kernel of lowbit that is faster than torch's and no less exact, if any is.

    That is ``native`` on CPUs with AMX, and on those with AVX512-VNNI and no instructions for ``dtype``; see
    ``lowbit.ops.cpu.attention``.
    Attention to fewer than ``FEWEST_KEYS`` keys stays torch's.

    Args:
        model: any module.
        device: it runs on.
        dtype: it computes in.

    Returns:
        What was done; ``None`` where torch's is the best there is, where attention does not go through diffusers'
        dispatcher, or where another of its backends was chosen.
    """
    from diffusers.models import attention_dispatch

    try:
        processors = check_attention(model)
    except ConfigError:
        return None
    default, _ = attention_registry(attention_dispatch).get_active_backend()
    others = [backend for backend in map(attention_backend, processors.values()) if backend is not None]
    if others or default != attention_dispatch.AttentionBackendName.NATIVE:
        return None
    problem = AttentionProblem(device, dtype, UNQUANTIZED, _head_dim(model))
    kernel = next(entry.name for entry, refusal in verdicts(IMPLEMENTATIONS, problem) if refusal is None)
    return None if kernel == TORCH else _replace_attention(model, processors, UNQUANTIZED, kernel)


def _replace_attention(model: nn.Module, processors: Mapping[str, Any], kind: str, kernel: str) -> AttentionRecord:
    backend = _backend(kind, kernel)
    restore_attention(model)
    for processor in processors.values():
        processor._lowbit_previous_backend = attention_backend(processor)
        set_attention_backend(processor, backend)
    record = AttentionRecord(kind, kernel, len(processors))
    setattr(model, _RECORD, record)
    return record


def restore_attention(model: nn.Module) -> None:
    """Undo ``quantize_attention`` or ``speed_up_attention``; does nothing to a model with diffusers' own attention."""
    for module in _attention_modules(model).values():
        processor = module.processor
        if hasattr(processor, "_lowbit_previous_backend"):
            set_attention_backend(processor, processor._lowbit_previous_backend)
            del processor._lowbit_previous_backend
    if hasattr(model, _RECORD):
        delattr(model, _RECORD)


def attention_record(model: nn.Module) -> AttentionRecord | None:
    """Return what was done to the attention of ``model``, ``None`` where nothing was."""
    record: AttentionRecord | None = getattr(model, _RECORD, None)
    return record


def check_attention(model: nn.Module) -> dict[str, Any]:
    """Return the model's attention processors by the module's name.

    Raises:
        ConfigError: it has none, or some don't call diffusers' dispatcher.
    """
    modules = _attention_modules(model)
    name = type(model).__name__
    if not modules:
        raise ConfigError(f"attention_quantization: {name} has no attention of diffusers' kind to quantize")
    others = {
        type(module.processor).__name__ for module in modules.values() if not goes_through_dispatcher(module.processor)
    }
    if others:
        raise ConfigError(
            f"attention_quantization: {name} computes attention in {', '.join(sorted(others))}, which does not go"
            " through diffusers' attention dispatcher, so it can't be quantized"
        )
    return {name: module.processor for name, module in modules.items()}


def _attention_modules(model: nn.Module) -> Mapping[str, Any]:
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention, MochiAttention

    kinds = (AttentionModuleMixin, Attention, MochiAttention)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: module for name, module in found.items() if getattr(module, "processor", None) is not None}


def _head_dim(model: nn.Module) -> int | None:
    """Return the width of the widest head, where the modules tell."""
    widths = [
        module.inner_dim // module.heads
        for module in _attention_modules(model).values()
        if isinstance(getattr(module, "inner_dim", None), int) and isinstance(getattr(module, "heads", None), int)
    ]
    return max(widths, default=None)


@cache
def _backend(kind: str, kernel: str) -> Any:
    """Register the backend with the dispatcher and return its name, a value of the library's enumeration.

    The enumeration is closed, so the value is made without entering it: the dispatcher asks for its type only.
    """
    from diffusers.models import attention_dispatch

    text = f"lowbit_{kind}_{kernel}"
    name = enumeration_value(attention_dispatch.AttentionBackendName, text)

    def backend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: object = None,
    ) -> torch.Tensor:
        if dropout_p or return_lse or _parallel_config is not None:
            raise ValueError("lowbit's attention has no dropout, no log-sum-exp and no context parallelism")
        if not enable_gqa and query.shape[2] != key.shape[2]:
            raise ValueError(f"query has {query.shape[2]} heads, key {key.shape[2]}: that needs enable_gqa")
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        short = kind == UNQUANTIZED and key.shape[1] < FEWEST_KEYS
        chosen = TORCH if short else kernel
        result: torch.Tensor = attention_operator(query, key, value, attn_mask, factor, is_causal, kind, chosen)
        return result

    attention_registry(attention_dispatch).register(name)(backend)
    return name
