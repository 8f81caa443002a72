"""Finding and folding the scales of smoothing.

``s[j] = absmax(x[:, j])**alpha / absmax(W[:, j])**(1 - alpha)`` (SmoothQuant, Xiao et al., 2023, equation 4) evens out
the channels of the input at the cost of those of the weight. Here s is rounded to a power of two, so that dividing by
it and multiplying with it are exact in floating point: smoothing by itself changes nothing. ``mul_scale`` is 1 / s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowbit.errors import ConfigError
from lowbit.models.smoothing import FOLDS, Fold

_LIMIT = 2.0**20
"""Scales are kept within this factor of one: a channel that is hardly used must not overflow float16."""

_WORTH = 0.8
"""Layers are smoothed where the expected squared error falls below this share: an estimate is no measurement."""

_PEAK_OVER_RMS = 4.0
"""Of thousands of normal values."""


@contextmanager
def watched_absmax(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While inside, keep the largest absolute value of each channel of every linear layer's input.

    Yields:
        name -> float32 [K], of the layers that have run.
    """
    found: dict[str, Tensor] = {}

    def observe(name: str) -> object:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest = inputs[0].detach().flatten(0, -2).abs().amax(dim=0).float()
            found[name] = torch.maximum(found[name], largest) if name in found else largest

        return hook

    handles = [
        module.register_forward_pre_hook(observe(name))  # type: ignore[arg-type]
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
def smooth(model: nn.Module, names: list[str], input_absmax: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Smooth the layers of an unquantized model in place.

    Args:
        model: with float weights.
        names: of the linear layers that will be quantized.
        input_absmax: name -> [K], as ``watched_absmax`` yields them.
        alpha: how much of the difference between channels goes to the weight.

    Returns:
        name -> ``mul_scale`` for the layers whose input must be multiplied while running. Those of which a norm or
        a linear layer before could take the scale are not among them, nor are those that gain nothing.

    Raises:
        ConfigError: a layer was never run, or saw values that are not finite.
    """
    unseen = [name for name in names if name not in input_absmax or not torch.isfinite(input_absmax[name]).all()]
    if unseen:
        raise ConfigError(
            f"Calibration for smoothing gave no usable input for {len(unseen)} layers: {', '.join(unseen[:5])}"
        )
    left, online = list(names), {}
    for source, consumers in _folds(model, names):
        scale = _scale([model.get_submodule(name) for name in consumers], input_absmax[consumers[0]], alpha)
        if scale is None:
            left = [name for name in left if name not in consumers]
            continue
        for name in consumers:
            _divide(model.get_submodule(name), scale)
            left.remove(name)
        _multiply(model.get_submodule(source), scale)
    for name in left:
        layer = model.get_submodule(name)
        scale = _scale([layer], input_absmax[name], alpha)
        if scale is not None:
            _divide(layer, scale)
            online[name] = scale
    return online


def _scale(layers: list[nn.Module], input_absmax: Tensor, alpha: float) -> Tensor | None:
    """Return the scale of layers with one input, ``None`` where it would not lower their error."""
    weights = [layer.get_parameter("weight").float() for layer in layers]
    maxima = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    scale = smoothing_scale(input_absmax, maxima, alpha)
    plain = sum(expected_error(input_absmax, weight) for weight in weights)
    smoothed = sum(expected_error(input_absmax * scale, weight / scale) for weight in weights)
    return scale if smoothed < _WORTH * plain else None


def expected_error(input_absmax: Tensor, weight: Tensor) -> float:
    """Estimate the squared error of a layer in W8A8, up to a factor, to compare ways of scaling its channels.

    Rounding to steps of d makes an error of variance d**2 / 12. A token's step follows its largest channel, an output
    channel's its largest weight, so the input's rounding gives ``max(x)**2 * sum(W**2)`` and the weight's
    ``sum(max(W)**2) * sum(mean(x**2))``.

    Args:
        input_absmax: [K], the largest absolute value of each channel, about four times its root mean square.
        weight: [N, K].
    """
    mean_square = (input_absmax / _PEAK_OVER_RMS).square()
    of_input = input_absmax.amax().square() * weight.square().sum()
    of_weight = weight.abs().amax(dim=1).square().sum() * mean_square.sum()
    return float(of_input + of_weight)


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
