"""Deciding which linear layers of a model take the method, and replacing them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lowbit.errors import ConfigError
from lowbit.models import kept_layers, weight_only_layers
from lowbit.models.patterns import matches, matches_any
from lowbit.ops.dispatch import select
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.calibration.smoothing import SeenInput, smooth
from lowbit.quantization.factory import build_quant_config
from lowbit.quantization.linear import QuantizedLinear
from lowbit.quantization.manifest import LayerRecord, Manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """What happens to one linear layer: a method, or the reason for none."""

    method: LinearMethod | None
    reason: str = ""


Plan = Mapping[str, Decision]

# Called with a model after it was quantized in memory. The hosts add what lets a model's own library save it.
AFTER_QUANTIZING: list[Callable[[nn.Module], None]] = []
# Called with a model that is to be quantized in memory: reason -> patterns of the layers that the model's own library
# keeps in high precision, as it does while loading. The hosts add theirs.
KEPT_BY_HOSTS: list[Callable[[nn.Module], Mapping[str, Collection[str]]]] = []


def announce(model: nn.Module) -> None:
    """Tell the hosts that ``model`` has been quantized or loaded outside of their ``from_pretrained``."""
    for hook in AFTER_QUANTIZING:
        hook(model)


def plan_layers(model: nn.Module, config: QuantizationConfig) -> Plan:
    """Decide for every linear layer of ``model`` (which may be on the meta device).

    A model quantized now keeps what its family keeps (``lowbit.models``) and what ``ignored_layers`` names, and takes
    the weights alone of what ``weight_only_layers`` names, or the family does; of a checkpoint that is already
    quantized, the two options alone say what was done.

    Raises:
        ConfigError: a pattern of ``ignored_layers`` or ``weight_only_layers`` names no module (a user's mistake; a
            checkpoint's may name layers of a larger model, such as ``lm_head``), or nothing is left to quantize.
    """
    if not config.is_serialized or config.weights_from is not None:
        for option in ("ignored_layers", "weight_only_layers"):
            check_patterns(getattr(config, option) or (), (name for name, _ in model.named_modules() if name), option)
        if config.weight_only_layers and config.weight_only_method() is None:
            raise ConfigError(f"weight_only_layers: {config.get_name()} has no weight-only kind; int8 and fp8 have")
        if config.weight_only_layers is None and config.weight_only_method() is not None:
            config = replace(config, weight_only_layers=list(weight_only_layers(type(model).__name__)))
    family = {} if config.is_serialized else kept_layers(type(model).__name__)
    linear = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    if config.is_serialized:
        config = _with_full_names(config, linear)
    plan = {name: _decide(name, layer, config, family) for name, layer in linear.items()}
    if not any(decision.method for decision in plan.values()):
        if config.weights_from is not None and plan and not any(map(config.is_ignored, plan)):
            logger.warning("%s: no layer is quantized; all run in the model's dtype", config.weights_from)
            return plan
        reasons = sorted({decision.reason for decision in plan.values()})
        because = f"all {len(plan)} are kept ({'; '.join(reasons)})" if plan else "it has none"
        raise ConfigError(f"{config.get_name()} applies to no linear layer of {type(model).__name__}: {because}")
    return plan


def keep(plan: Plan, kept: Mapping[str, Collection[str]]) -> Plan:
    """Return ``plan`` without the layers that ``kept``, reason -> patterns, names."""

    def decide(name: str, decision: Decision) -> Decision:
        reasons = (reason for reason, patterns in kept.items() if matches_any(patterns, name))
        reason = next(reasons, None) if decision.method is not None else None
        return decision if reason is None else Decision(None, reason)

    return {name: decide(name, decision) for name, decision in plan.items()}


def _with_full_names(config: QuantizationConfig, names: Collection[str]) -> QuantizationConfig:
    """Let full names in ``ignored_layers`` and ``weight_only_layers`` stand for themselves alone.

    A checkpoint names its layers in full: ``proj_out`` of FLUX.1 is not ``single_transformer_blocks.0.proj_out``.
    """

    def exact(patterns: Iterable[str] | None) -> list[str]:
        return [f"re:{re.escape(name)}$" if name in names else name for name in patterns or ()]

    return replace(
        config, ignored_layers=exact(config.ignored_layers), weight_only_layers=exact(config.weight_only_layers)
    )


def _decide(name: str, layer: nn.Linear, config: QuantizationConfig, family: Mapping[str, Iterable[str]]) -> Decision:
    method = config.get_quant_method(layer, name)
    if method is None or not method.weight_only:
        for reason, patterns in family.items():
            if matches_any(patterns, name):
                return Decision(None, reason)
    if method is None:
        return Decision(None, config.kept_reason(name))
    refusal = method.refusal(layer)
    return Decision(None, refusal) if refusal else Decision(method)


def check_patterns(patterns: Iterable[str], names: Iterable[str], option: str = "ignored_layers") -> None:
    """Raise ``ConfigError`` for patterns that match none of ``names``, showing what there is to name."""
    names = list(names)
    unmatched = [pattern for pattern in patterns if not any(matches(pattern, name) for name in names)]
    if unmatched:
        parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
        raise ConfigError(
            f"{option} {unmatched} match no layer of this model. Its layers are made of: {', '.join(parts)}"
        )


def replace_layers(model: nn.Module, plan: Plan, dtype: torch.dtype) -> None:
    """Put an empty ``QuantizedLinear`` on the meta device in place of every layer that takes a method."""
    for name, decision in plan.items():
        if decision.method is not None:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            model.set_submodule(name, QuantizedLinear.like(layer, decision.method, name, dtype))


def check_kernels(layers: Iterable[QuantizedLinear], device: torch.device) -> None:
    """Check before any work is done that a kernel can run each layer on ``device``.

    Raises:
        UnsupportedError: none can run a layer; lists every reason.
        ConfigError: the configuration names a kernel that does not exist.
    """
    problems = {layer.method.problem(layer, device): layer.method for layer in layers}
    for problem, method in problems.items():
        select(method.family, method.table, problem, method.kernel)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantized layers of ``model`` by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def make_manifest(model: nn.Module, plan: Plan, component: str = "") -> Manifest:
    """Record what became of ``model``'s linear layers."""
    records = []
    for name, decision in plan.items():
        layer = model.get_submodule(name)
        if isinstance(layer, QuantizedLinear):
            kernel = layer.implementation.name if layer.implementation else None
            before = layer.out_features * layer.in_features * layer.compute_dtype.itemsize
            records.append(LayerRecord(name, layer.method.name, kernel, "", before, layer.quantized_bytes()))
        else:
            assert isinstance(layer, nn.Linear)
            size = layer.weight.numel() * layer.weight.element_size()
            records.append(LayerRecord(name, None, None, decision.reason, size, size))
    linear_bytes = sum(record.bytes_after for record in records)
    total = sum(_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()])
    return Manifest(component or type(model).__name__, records, total - linear_bytes)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    quantization: str | Mapping[str, Any] | QuantizationConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
    seen_inputs: Mapping[str, SeenInput] | None = None,
    **options: Any,
) -> Manifest:
    """Quantize the linear layers of a model in memory, in place, one at a time.

    Args:
        model: any module; the layers that its family (see ``lowbit.models``) or its library keeps in high precision
            stay, as they do while loading.
        quantization: a method's name, a dictionary with ``method``, or a configuration.
        progress: called with (layers done, layers to do).
        seen_inputs: for ``smoothing``: linear layer's name -> what its input was like on representative prompts
            (``lowbit.quantization.calibration.smoothing.watched_inputs`` keeps it).
        options: of the method, such as ``ignored_layers=["img_mlp"]``.

    Returns:
        What was done; also kept as ``model.lowbit_manifest``.

    Raises:
        ConfigError: an option is wrong, or nothing is left to quantize.
        UnsupportedError: no kernel can run a layer. Whatever is raised here, the model is unchanged.
    """
    config = build_quant_config(quantization, **options)
    if not isinstance(config, QuantizationConfig):
        raise ConfigError(
            "quantize_model takes one of lowbit's own methods, not a configuration per component or another library's"
        )
    if config.is_serialized:
        raise ConfigError("quantize_model quantizes unquantized weights; load serialized ones with from_pretrained")
    if config.needs_calibration and seen_inputs is None:
        raise ConfigError("smoothing needs to have seen the layers' inputs: give seen_inputs, see watched_inputs")
    plan = plan_layers(model, config)
    for kept_by_host in KEPT_BY_HOSTS:
        plan = keep(plan, kept_by_host(model))
    chosen = {name: decision.method for name, decision in plan.items() if decision.method is not None}
    _check_kernels_of(model, chosen)
    scales = _smooth(model, config, chosen, seen_inputs) if seen_inputs is not None and config.needs_calibration else {}
    for done, (name, method) in enumerate(chosen.items(), start=1):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, quantize_layer(layer, method, name, scales.get(name)))
        if progress is not None:
            progress(done, len(chosen))
    manifest = make_manifest(model, plan)
    model.lowbit_manifest = manifest  # type: ignore[assignment]
    model.lowbit_config = config  # type: ignore[assignment]
    announce(model)
    logger.info("%s", manifest.summary())
    return manifest


def _check_kernels_of(model: nn.Module, chosen: Mapping[str, LinearMethod]) -> None:
    """Check that a kernel can run every layer that is going to be quantized, each where its weight is."""
    by_device: dict[torch.device, list[QuantizedLinear]] = {}
    for name, method in chosen.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        empty = QuantizedLinear.like(layer, method, name, layer.weight.dtype)
        by_device.setdefault(layer.weight.device, []).append(empty)
    for device, layers in by_device.items():
        check_kernels(layers, device)


def _smooth(
    model: nn.Module, config: Any, chosen: Mapping[str, LinearMethod], seen: Mapping[str, SeenInput]
) -> dict[str, torch.Tensor]:
    names = [name for name, method in chosen.items() if not method.weight_only]
    # The reference rounds activations too, whatever is fastest on this machine.
    method = replace(config, smoothing=None, kernel="reference").linear_method()
    return smooth(model, names, seen, config.smoothing, method)


def quantize_layer(
    linear: nn.Linear, method: LinearMethod, name: str = "", mul_scale: torch.Tensor | None = None
) -> QuantizedLinear:
    """Return ``linear`` quantized with ``method``, on the same device; ``linear`` is unchanged.

    Args:
        linear: of any floating dtype.
        method: what to quantize with.
        name: full name in the model, for messages.
        mul_scale: float32 [K] by which the input is to be multiplied; the weight is divided by it already.
    """
    quantized = QuantizedLinear.like(linear, method, name, linear.weight.dtype)
    quantized.load_unquantized(linear.weight.data)
    if mul_scale is not None:
        method.smooth_input(quantized, mul_scale.to(linear.weight.device))
    quantized.bias = linear.bias
    quantized.train(linear.training)
    quantized.process_weights_after_loading()
    return quantized
