"""What quantizing each layer alone does to the model's prediction.

The model runs once as it is, and what enters and leaves its transformers at a few denoising steps is kept. Then, one
layer at a time takes the method, the transformers run again on what was kept, and what leaves them is compared: errors
of one step, from the reference's latents, of one layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.containers.atomic import write_text
from lowbit.errors import ConfigError
from lowbit.evaluation.recording import Task, generate
from lowbit.models.embedded import EMBEDDED_NAME
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.factory import build_quant_config
from lowbit.quantization.plan import plan_layers, quantize_layer

if TYPE_CHECKING:
    from lowbit.engine import Omni

PROBES = 4
"""Denoising steps looked at, evenly spaced, the first and the last among them."""


@dataclass(frozen=True)
class Call:
    """What entered a transformer in one call of it, and what left.

    Attributes:
        component: the transformer's name in the pipeline.
        arguments: positional and keyword arguments, tensors copied.
        output: float32, of the first tensor (or list of tensors) that left.
    """

    component: str
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    output: Tensor


@dataclass(frozen=True)
class LayerDamage:
    """What quantizing one layer alone does.

    Attributes:
        name: with its component.
        damage: root mean square over calls of the relative L2 of what leaves the transformer.
        bytes_before: of the weight as it is.
        bytes_after: of the quantized tensors.
    """

    name: str
    damage: float
    bytes_before: int
    bytes_after: int

    @property
    def saved_bytes(self) -> int:
        """What quantizing it saves."""
        return self.bytes_before - self.bytes_after


def quantizable_layers(omni: Omni, config: QuantizationConfig) -> dict[str, tuple[nn.Linear, LinearMethod]]:
    """Return the layers that ``config`` would quantize, by name with the component, in order."""
    found: dict[str, tuple[nn.Linear, LinearMethod]] = {}
    for component, transformer in omni.transformers().items():
        for name, decision in plan_layers(transformer, config).items():
            if decision.method is not None:
                layer = transformer.get_submodule(name)
                assert isinstance(layer, nn.Linear)
                found[f"{component}.{name}"] = (layer, decision.method)
    return found


def one_method(spec: Any) -> QuantizationConfig:
    """Return the configuration of a single method.

    Raises:
        ConfigError: none, one per component, one of a checkpoint that is quantized already, or one with smoothing.
    """
    config = build_quant_config(spec)
    if not isinstance(config, QuantizationConfig):
        raise ConfigError(f"Give one of lowbit's own quantization methods for the diffusion transformers, not {spec!r}")
    if config.is_serialized:
        raise ConfigError(f"{spec!r} describes a checkpoint that is quantized already; give the unquantized one")
    if config.needs_calibration:
        raise ConfigError(f"{spec!r}: layers can't be smoothed one at a time; leave smoothing out")
    return config


def record_calls(omni: Omni, task: Task, probes: int = PROBES) -> list[Call]:
    """Run every case and keep what enters and leaves the transformers at ``probes`` steps."""
    calls: list[Call] = []
    for _, prompt, seed in tqdm(task.cases, desc="calls", unit="case", leave=False):
        steps = _calls_by_step(omni, task, prompt, seed)
        calls += [call for index in spread(len(steps), probes) for call in steps[index]]
    return calls


def _calls_by_step(omni: Omni, task: Task, prompt: str, seed: int) -> list[list[Call]]:
    steps: list[list[Call]] = [[]]

    def next_step(_step: int, _latents: Tensor) -> None:
        steps.append([])

    with _kept(omni, steps):
        generate(omni, task, prompt, seed, next_step)
    return [step for step in steps if step]


def spread(count: int, at_most: int) -> list[int]:
    """Return up to ``at_most`` evenly spaced indices below ``count``, both ends among them."""
    if count <= at_most:
        return list(range(count))
    if at_most == 1:
        return [count // 2]
    return sorted({round(index * (count - 1) / (at_most - 1)) for index in range(at_most)})


@contextmanager
def _kept(omni: Omni, steps: list[list[Call]]) -> Iterator[None]:
    def hook(component: str) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            steps[-1].append(Call(component, _copied((args, kwargs)), _flat(output)))

        return keep

    handles = [
        transformer.register_forward_hook(hook(component), with_kwargs=True)
        for component, transformer in omni.transformers().items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value


def _flat(output: Any) -> Tensor:
    """Return the prediction as one float32 vector: a tensor, the first of a tuple or an output's, or a list of them."""
    first = output if isinstance(output, (Tensor, list)) else output[0]
    tensors = [first] if isinstance(first, Tensor) else list(first)
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors])


@contextmanager
def swapped(omni: Omni, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in the places of layers (by name with the component) for the duration of the context."""
    transformers = omni.transformers()
    former: dict[str, nn.Module] = {}
    try:
        for name, layer in layers.items():
            component, _, path = name.partition(".")
            former[name] = transformers[component].get_submodule(path)
            transformers[component].set_submodule(path, layer)
        yield
    finally:
        for name, layer in former.items():
            component, _, path = name.partition(".")
            transformers[component].set_submodule(path, layer)


@torch.no_grad()
def damage(omni: Omni, calls: Sequence[Call]) -> float:
    """Return the root mean square over ``calls`` of the relative L2 between what leaves now and what left then."""
    transformers = omni.transformers()
    total = 0.0
    for call in calls:
        args, kwargs = call.arguments
        found = _flat(transformers[call.component](*args, **kwargs))
        norm = torch.linalg.vector_norm(call.output.double())
        total += float(torch.linalg.vector_norm((found - call.output).double()) / norm) ** 2
    return math.sqrt(total / len(calls))


def layer_damages(
    omni: Omni, config: QuantizationConfig, calls: Sequence[Call], known: Mapping[str, LayerDamage] | None = None
) -> Iterator[LayerDamage]:
    """Yield what quantizing each layer alone does, in the model's order; what is in ``known`` is not measured again."""
    layers = quantizable_layers(omni, config)
    with tqdm(layers.items(), desc=f"{config.get_name()}, each layer alone", unit="layer", leave=False) as progress:
        for name, (layer, method) in progress:
            if known and name in known:
                yield known[name]
                continue
            quantized = quantize_layer(layer, method, name)
            with swapped(omni, {name: quantized}):
                found = damage(omni, calls)
            before = layer.weight.numel() * layer.weight.element_size()
            yield LayerDamage(name, found, before, quantized.quantized_bytes())


def measure(
    omni: Omni, spec: Any, task: Task, file: Path | None = None, probes: int = PROBES, calls: Sequence[Call] = ()
) -> list[LayerDamage]:
    """Return what quantizing each layer alone does, in the model's order.

    Args:
        omni: the reference; not quantized.
        spec: the method, with options if any.
        task: prompts and seeds.
        file: where to keep what is known after each layer; what it knows of the same question is not measured again.
        probes: denoising steps to look at.
        calls: what ``record_calls`` returned for the same task and probes, where that is known.

    Raises:
        ConfigError: no single method, it applies to no layer, or ``file`` answers another question.
    """
    config = one_method(spec)
    question = settings(omni, config, task, probes)
    known = read_damages(file, question) if file is not None else {}
    names = list(quantizable_layers(omni, config))
    if all(name in known for name in names):
        return [known[name] for name in names]
    found: list[LayerDamage] = []
    for layer in layer_damages(omni, config, calls or record_calls(omni, task, probes), known):
        found.append(layer)
        if file is not None and layer.name not in known:
            write_damages(file, question, {**known, **{item.name: item for item in found}}.values())
    return found


def settings(omni: Omni, config: QuantizationConfig, task: Task, probes: int) -> dict[str, Any]:
    """Return what a measurement depends on."""
    return {
        "model": omni.config.model or EMBEDDED_NAME,
        "dtype": str(omni.config.dtype).removeprefix("torch."),
        "quantization": {**config.to_dict(), "kernel": config.kernel},
        "prompts": list(task.prompts),
        "seeds": list(task.seeds),
        "probes": probes,
        "sampling": {key: value for key, value in asdict(task.params).items() if key != "seed"},
    }


def read_damages(file: Path, question: Mapping[str, Any]) -> dict[str, LayerDamage]:
    """Return what ``file`` knows, by name; nothing where there is no file.

    Raises:
        ConfigError: it is not such a file, or of other settings.
    """
    if not file.exists():
        return {}
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        layers = {row["name"]: row for row in kept["layers"]}
        known = kept["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no result of lowbit sensitivity; name another file") from error
    asked = json.loads(json.dumps(question))
    if known != asked:
        different = [key for key in asked if known.get(key) != asked[key]]
        raise ConfigError(
            f"{file} holds the result of other settings ({', '.join(different)}); name another file or delete it"
        )
    return {
        name: LayerDamage(name, row["damage"], row["bytes_before"], row["bytes_after"]) for name, row in layers.items()
    }


def write_damages(file: Path, question: Mapping[str, Any], layers: Iterable[LayerDamage]) -> None:
    """Write layers, the most damaging first, and the settings that found them."""
    ranked = [{**asdict(layer), "saved_bytes": layer.saved_bytes} for layer in rank(layers)]
    write_text(file, json.dumps({"settings": question, "layers": ranked}, indent=1))


def rank(layers: Iterable[LayerDamage]) -> list[LayerDamage]:
    """Return layers, the most damaging first."""
    return sorted(layers, key=lambda layer: (-layer.damage, layer.name))
