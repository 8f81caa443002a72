"""Norms, rotary embeddings and gates of diffusers' models in one pass each.

``fuse_elementwise`` gives modules and attention processors of a model subclasses of their classes that call
``lowbit.ops.elementwise``, ``unfuse_elementwise`` their own classes back; other models keep theirs. What is computed
is the same, in float32 and rounded once, where diffusers rounds in between; where gradients are recorded, diffusers'
own code runs. A new class is one entry of ``FUSED``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from lowbit.compat.parts.modules import attention_backend, parallel_config
from lowbit.ops.elementwise import normalize_operator
from lowbit.quantization.joint import gated_linear, linears

KERNELS = {
    "cpu": "lowbit.ops.cpu.elementwise",
    "cuda": "lowbit.ops.triton.elementwise",
    "xpu": "lowbit.ops.triton.elementwise",
}
"""What computes the operators on a type of device."""

FEWEST_ELEMENTS = 1 << 18
"""Smaller tensors of a CPU stay diffusers': there is no time in them to save."""


def fuse_elementwise(model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> int:
    """Have ``model`` compute norms, rotary embeddings and gates in one pass each from now on, where lowbit can.

    Args:
        model: any module.
        device: it runs on.
        dtype: it computes in.

    Returns:
        The number of modules and attention processors that do: 0 where ``kernel_refusal`` gives a reason.
    """
    if kernel_refusal(device, dtype) is not None:
        return 0
    found = [part for part in _parts(model) if _dotted_name(type(part)) in FUSED]
    for part in found:
        own: Any = type(part)
        part.__class__ = _replacement(own)
    return len(found)


def kernel_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why nothing computes this in one pass on ``device`` in ``dtype``, ``None`` where something does."""
    if device.type not in KERNELS:
        return f"there is no kernel for {device.type}"
    try:
        kernel = importlib.import_module(KERNELS[device.type])
    except ImportError as error:
        return f"{KERNELS[device.type]} can't be imported ({error})"
    reason: str | None = kernel.refusal(dtype)
    return reason


def unfuse_elementwise(model: nn.Module) -> None:
    """Undo ``fuse_elementwise``."""
    for part in _parts(model):
        if hasattr(type(part), "lowbit_replaces"):
            part.__class__ = type(part).lowbit_replaces


def _parts(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield module
        processor = getattr(module, "processor", None)
        if processor is not None and not isinstance(processor, nn.Module):
            yield processor


def _dotted_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@cache
def _replacement(base: Any) -> Any:
    replacement: Any = FUSED[_dotted_name(base)](base)
    replacement.lowbit_replaces = base
    return replacement


def _is_fused(x: torch.Tensor) -> bool:
    is_worth_it = x.device.type != "cpu" or x.numel() >= FEWEST_ELEMENTS
    return is_worth_it and x.device.type in KERNELS and not torch.is_grad_enabled()


def _plain_norm(norm: Any, dtype: torch.dtype) -> tuple[float, torch.Tensor | None] | None:
    """Return epsilon and weight of a norm whose result has the dtype of its input and nothing added; else ``None``."""
    is_torch = isinstance(norm, nn.RMSNorm)
    if not is_torch and not isinstance(norm, _diffusers_norm()):
        return None
    shape = norm.normalized_shape if is_torch else norm.dim
    weight: torch.Tensor | None = norm.weight
    if len(shape) != 1 or getattr(norm, "bias", None) is not None or (weight is not None and weight.dtype != dtype):
        return None
    return torch.finfo(dtype).eps if norm.eps is None else norm.eps, weight


@cache
def _diffusers_norm() -> type:
    from diffusers.models.normalization import RMSNorm

    kind: type = RMSNorm
    return kind


def _rotate(x: torch.Tensor, norm: Any, frequencies: torch.Tensor) -> torch.Tensor:
    """Return heads [batch, tokens, heads, width] normalized and times complex [batch or 1, tokens, width / 2]."""
    plain = _plain_norm(norm, x.dtype)
    epsilon, weight = (None, None) if plain is None else plain
    x = x if norm is None or plain is not None else norm(x)
    result: torch.Tensor = normalize_operator(x, epsilon, weight, torch.view_as_real(frequencies).float())
    return result


def _attend(processor: Any, query: Any, key: Any, value: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """Return [batch, tokens, heads * width] by the backend that the processor names."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    attended: torch.Tensor = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask,
        backend=attention_backend(processor),
        parallel_config=parallel_config(processor),
    )
    return attended.flatten(2, 3)


def _fused_norm(base: Any) -> type:
    class FusedRMSNorm(base):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> Any:
            # A compiler joins it with what comes before and after.
            is_left = torch.compiler.is_compiling() or not _is_fused(x)
            plain = None if is_left else _plain_norm(self, x.dtype)
            return super().forward(x) if plain is None else normalize_operator(x, *plain, None)

    return FusedRMSNorm


def _fused_gate(base: Any) -> type:
    class FusedFeedForward(base):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> Any:
            # On GPUs a compiler joins the gate with the quantization that follows.
            is_left = torch.compiler.is_compiling() and x.device.type != "cpu"
            is_joint = _is_fused(x) and not is_left
            return self.w2(gated_linear(self.w1, self.w3, x)) if is_joint else super().forward(x)

    return FusedFeedForward


def _fused_z_image(base: Any) -> type:
    class FusedZImageProcessor(base):  # type: ignore[misc]
        def __call__(
            self,
            attn: Any,
            hidden_states: torch.Tensor,
            encoder_hidden_states: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
            freqs_cis: torch.Tensor | None = None,
        ) -> Any:
            if freqs_cis is None or not _is_fused(hidden_states):
                return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
            heads = (attn.heads, -1)
            query, key, value = linears((attn.to_q, attn.to_k, attn.to_v), hidden_states)
            query = _rotate(query.unflatten(-1, heads), attn.norm_q, freqs_cis)
            key = _rotate(key.unflatten(-1, heads), attn.norm_k, freqs_cis)
            mask = attention_mask
            if mask is not None and mask.dim() == 2:
                mask = mask[:, None, None, :]
            result = _attend(self, query, key, value.unflatten(-1, heads), mask)
            for layer in attn.to_out:
                result = layer(result)
            return result

    return FusedZImageProcessor


def _fused_qwen_image(base: Any) -> type:
    class FusedQwenImageProcessor(base):  # type: ignore[misc]
        def __call__(
            self,
            attn: Any,
            hidden_states: torch.Tensor,
            encoder_hidden_states: torch.Tensor | None = None,
            encoder_hidden_states_mask: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
            image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        ) -> Any:
            text, masks = encoder_hidden_states, (encoder_hidden_states_mask, attention_mask)
            if text is None or attention_mask is not None or image_rotary_emb is None or not _is_fused(hidden_states):
                return super().__call__(attn, hidden_states, text, *masks, image_rotary_emb)
            image_frequencies, text_frequencies = (frequencies[None] for frequencies in image_rotary_emb)
            heads = (-1, attn.inner_dim // attn.heads)
            parts = []
            for states, layers, norms, frequencies in (
                (
                    text,
                    (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
                    (attn.norm_added_q, attn.norm_added_k),
                    text_frequencies,
                ),
                (hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), image_frequencies),
            ):
                query, key, value = (result.unflatten(-1, heads) for result in linears(layers, states))
                query, key = (_rotate(x, norm, frequencies) for x, norm in zip((query, key), norms, strict=True))
                parts.append((query, key, value))
            mask = None
            if encoder_hidden_states_mask is not None:
                image_mask = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
                mask = torch.cat([encoder_hidden_states_mask, image_mask], dim=1)[:, None, None, :]
            query, key, value = (torch.cat(both, dim=1) for both in zip(*parts, strict=True))
            attended = _attend(self, query, key, value, mask)
            of_text, of_image = attended.split([text.shape[1], hidden_states.shape[1]], dim=1)
            image_result = of_image.contiguous()
            for layer in attn.to_out:
                image_result = layer(image_result)
            return image_result, attn.to_add_out(of_text.contiguous())

    return FusedQwenImageProcessor


_TRANSFORMERS = "diffusers.models.transformers"
FUSED: Mapping[str, Callable[[Any], type]] = {
    "diffusers.models.normalization.RMSNorm": _fused_norm,
    "torch.nn.modules.normalization.RMSNorm": _fused_norm,
    f"{_TRANSFORMERS}.transformer_z_image.FeedForward": _fused_gate,
    f"{_TRANSFORMERS}.transformer_z_image.ZSingleStreamAttnProcessor": _fused_z_image,
    f"{_TRANSFORMERS}.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0": _fused_qwen_image,
}
"""Dotted names of classes, and what makes the subclass that is given in their place."""
