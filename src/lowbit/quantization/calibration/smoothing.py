"""Finding and folding the scales of smoothing.

``s[j] = absmax(x[:, j])**alpha / absmax(W[:, j])**(1 - alpha)`` (SmoothQuant, Xiao et al., 2023, equation 4) evens out
the channels of the input at the cost of those of the weight. Here s is rounded to a power of two, so that dividing by
it and multiplying with it are exact in floating point: smoothing by itself changes nothing. ``mul_scale`` is 1 / s.

What it gains depends on the layer: where a token's largest channel is not the same all the time, the weight loses more
than the input gains. So each layer is quantized both ways, and smoothed if its error on rows it has seen falls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.errors import ConfigError
from lowbit.models.smoothing import FOLDS, Fold
from lowbit.quantization.base import LinearMethod
from lowbit.quantization.linear import QuantizedLinear

_LIMIT = 2.0**20
"""Scales are kept within this factor of one: a channel that is hardly used must not overflow float16."""

_WORTH = 0.9
"""Layers are smoothed where their squared error falls below this share: less is not worth a multiplication."""

_ROWS = 128
"""Most rows that are kept of a layer's input, to measure its error on."""


@dataclass(frozen=True)
class SeenInput:
    """What a linear layer's input was like on representative prompts.

    Attributes:
        absmax: float32 [K], the largest absolute value of each channel.
        rows: [R, K], some of its rows, from all calls alike; R is 128 at most.
    """

    absmax: Tensor
    rows: Tensor


@contextmanager
def watched_inputs(model: nn.Module) -> Iterator[dict[str, SeenInput]]:
    """While inside, watch the input of every linear layer.

    Yields:
        name -> what was seen, of the layers that have run.
    """
    found: dict[str, SeenInput] = {}
    rows_per_call: dict[str, int] = {}

    def observe(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2)
            absmax = x.abs().amax(dim=0).float()
            count = min(rows_per_call.setdefault(name, _ROWS // 8), len(x))
            rows = x[torch.linspace(0, len(x) - 1, count).long()]
            if name in found:
                absmax = torch.maximum(found[name].absmax, absmax)
                rows = torch.cat([found[name].rows, rows])
            if len(rows) > _ROWS:  # thin out, and take fewer of what is still to come
                rows, rows_per_call[name] = rows[::2].clone(), -(-rows_per_call[name] // 2)
            found[name] = SeenInput(absmax, rows)

        return hook

    handles = [
        module.register_forward_pre_hook(observe(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def smoothing_scale(input_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """Return ``mul_scale`` float32 [K] from the absolute maxima [K] of the input's and of the weight's channels.

    A channel that is zero in either is left alone.
    """
    x, weight = input_absmax.float(), weight_absmax.float()
    scale = x.pow(alpha) / weight.pow(1 - alpha)
    power = torch.exp2(-torch.log2(scale).round())
    usable = (x > 0) & (weight > 0) & torch.isfinite(power)
    return torch.where(usable, power, 1.0).clamp(1 / _LIMIT, _LIMIT)


@torch.no_grad()
def smooth(
    model: nn.Module, names: list[str], seen: Mapping[str, SeenInput], alpha: float, method: LinearMethod
) -> dict[str, Tensor]:
    """Smooth the layers of an unquantized model in place, where it makes their error smaller.

    Args:
        model: with float weights.
        names: of the linear layers that will be quantized.
        seen: name -> the layer's input, as ``watched_inputs`` yields it.
        alpha: how much of the difference between channels goes to the weight.
        method: what the layers will be quantized with, to measure their error on the rows seen.

    Returns:
        name -> ``mul_scale`` for the layers whose input must be multiplied while running. Those of which a norm or
        a linear layer before could take the scale are not among them, nor are those that gain nothing.

    Raises:
        ConfigError: a layer was never run, or saw values that are not finite.
    """
    unseen = [name for name in names if name not in seen or not torch.isfinite(seen[name].absmax).all()]
    if unseen:
        raise ConfigError(
            f"Calibration for smoothing gave no usable input for {len(unseen)} layers: {', '.join(unseen[:5])}"
        )
    left, online = list(names), {}
    for source, consumers in _folds(model, names):
        left = [name for name in left if name not in consumers]
        layers = [model.get_submodule(name) for name in consumers]
        scale = _useful_scale(layers, seen[consumers[0]], alpha, method)
        if scale is not None:
            for layer in layers:
                _divide(layer, scale)
            _multiply(model.get_submodule(source), scale)
    for name in left:
        layer = model.get_submodule(name)
        scale = _useful_scale([layer], seen[name], alpha, method)
        if scale is not None:
            _divide(layer, scale)
            online[name] = scale
    return online


def _useful_scale(layers: list[nn.Module], seen: SeenInput, alpha: float, method: LinearMethod) -> Tensor | None:
    """Return the scale of layers with one input, ``None`` where it would not lower their error."""
    weights = [layer.get_parameter("weight").float() for layer in layers]
    device = weights[0].device
    maxima = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    scale = smoothing_scale(seen.absmax.to(device), maxima, alpha)
    x = seen.rows.to(device).float()
    plain = sum(squared_error(x, weight, method) for weight in weights)
    smoothed = sum(squared_error(x * scale, weight / scale, method) for weight in weights)
    return scale if smoothed < _WORTH * plain else None


def squared_error(x: Tensor, weight: Tensor, method: LinearMethod) -> float:
    """Return the squared error of a quantized layer's result, relative to the result.

    Args:
        x: float32 [M, K].
        weight: float32 [N, K].
        method: what the layer is quantized with.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    quantized = QuantizedLinear.like(layer, method, "", torch.float32)
    quantized.load_unquantized(weight)
    exact = nn.functional.linear(x, weight)
    return float((quantized(x) - exact).square().sum() / exact.square().sum().clamp(min=torch.finfo().tiny))


def _divide(layer: nn.Module, scale: Tensor) -> None:
    """Divide the columns of a linear layer's weight."""
    weight = layer.get_parameter("weight")
    weight.div_(scale.to(weight))


def _multiply(source: nn.Module, scale: Tensor) -> None:
    """Multiply the channels that leave a norm or a linear layer."""
    weight = source.get_parameter("weight")
    weight.mul_((scale[:, None] if weight.dim() == 2 else scale).to(weight))
    bias = getattr(source, "bias", None)
    if bias is not None:
        bias.mul_(scale.to(bias))


def _folds(model: nn.Module, names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (source, consumers) by full name, where all consumers are smoothed and the source can scale."""
    modules = dict(model.named_modules())
    for fold in FOLDS.get(type(model).__name__, ()):
        for prefix in modules:
            source, consumers = _full(prefix, fold)
            module = modules.get(source)
            if module is None or getattr(module, "weight", None) is None:
                continue
            if all(name in names for name in consumers):
                yield source, consumers


def _full(prefix: str, fold: Fold) -> tuple[str, list[str]]:
    return f"{prefix}.{fold.source}", [f"{prefix}.{name}" for name in fold.consumers]
