"""``lowbit info``: what this machine can run, and what would be quantized in a model."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import typer

import lowbit
from lowbit.cli import options
from lowbit.errors import ConfigError
from lowbit.models import FAMILIES, family_of
from lowbit.ops import attention
from lowbit.ops.cpu import helper
from lowbit.ops.dispatch import AnyProblem, Implementation, Problem, verdicts
from lowbit.quantization.backends import BACKENDS, BackendConfig
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.factory import SUPPORTED_QUANTIZATION_METHODS, build_quant_config, config_class

EXAMPLES = """Examples:

  lowbit info

  lowbit info embedded --quantization int8

  lowbit info ./z-image --quantization fp8 --ignored-layers feed_forward

  lowbit info ./z-image-int8
"""

_PACKAGES = ("torch", "diffusers", "transformers", "triton")


def info(
    model: Annotated[str | None, typer.Argument(help="A folder, a Hub id, or `embedded`.")] = None,
    quantization: options.Quantization = None,
    quantization_config: options.QuantizationConfigText = None,
    ignored_layers: options.IgnoredLayers = None,
    gguf_model: options.GgufModel = None,
    gguf_type: options.GgufType = None,
    comfyui_model: options.ComfyUiModel = None,
    svdquant_model: options.SvdQuantModel = None,
) -> None:
    """Show which kernels run here and why not the others; of a MODEL, what is or would be quantized, and why not all.

    A model that is quantized already is shown as it is. Of another one, what int8 would do if no method is named.
    """
    if model is None:
        _show_machine()
    else:
        _show_model(
            model,
            options.quantization_spec(
                quantization,
                quantization_config,
                ignored_layers,
                gguf_model=gguf_model,
                gguf_type=gguf_type,
                comfyui_model=comfyui_model,
                svdquant_model=svdquant_model,
            ),
        )


def devices() -> list[torch.device]:
    """Return the devices of this machine, the accelerator first."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [*([accelerator] if accelerator else []), torch.device("cpu")]


def _show_machine() -> None:
    typer.echo(f"lowbit {lowbit.__version__} on Python {platform.python_version()}, {platform.system()}")
    typer.echo("  ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    typer.echo(f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    typer.echo(f"native helpers: {helper.description()}")
    for device in devices():
        for method in SUPPORTED_QUANTIZATION_METHODS:
            typer.echo(f"\n{method} on {device}:")
            chosen = config_class(method)().linear_method()
            scheme, weight_format = chosen.activation_scheme, chosen.weight_format
            _show_kernels(chosen.table, Problem(device, torch.bfloat16, 1024, 1024, scheme, None, weight_format))
        for kind in attention.KINDS:
            typer.echo(f"\n{kind} attention on {device}:")
            problem = attention.AttentionProblem(device, torch.bfloat16, kind, 128)
            _show_kernels(attention.IMPLEMENTATIONS, problem)
    _show_backends()
    typer.echo("\nmodel families with known defaults: " + ", ".join(family.name for family in FAMILIES))


def _show_backends() -> None:
    from lowbit.hosts.other_quantizers import is_installed

    typer.echo("\nother libraries, through diffusers and transformers:")
    for backend in BACKENDS:
        typer.echo(f"  {backend:18} {'installed' if is_installed(backend) else 'not installed'}")


def _show_kernels(table: Sequence[Implementation], problem: AnyProblem) -> None:
    chosen = False
    for implementation, reason in verdicts(table, problem):
        if reason is not None:
            verdict = f"no: {reason}"
        elif chosen or not implementation.automatic:
            verdict = "yes, when asked for by name"
        else:
            verdict, chosen = "in use" + (f": {implementation.slow}" if implementation.slow else ""), True
        typer.echo(f"  {implementation.name:18} {verdict}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _show_model(model: str, spec: Any) -> None:
    from lowbit.engine.loading import read_components, resolve_model, route
    from lowbit.hosts.inspect import files_on_disk, own_config, stored_config
    from lowbit.hosts.routing import method_of

    source = resolve_model(model)
    components = read_components(source)
    asked = route(build_quant_config(spec), components)
    chosen: dict[str, QuantizationConfig | BackendConfig] = {
        name: config for name, config in asked.items() if isinstance(config, BackendConfig)
    }
    ours = {name: config for name, config in asked.items() if isinstance(config, QuantizationConfig)}
    own = {name: own_config(source, name, ours.get(name)) for name in components if name not in chosen}
    chosen.update({name: config for name, config in own.items() if config is not None})
    others = {name: method_of(stored) for name in own if (stored := stored_config(source, name)) is not None}
    if not chosen and not others and spec is None:
        chosen = route(build_quant_config("int8"), components)
    for name, entry in components.items():
        if name in chosen:
            _show_component(source, name, entry, chosen[name])
            continue
        size = files_on_disk(source, name)
        what = f"quantized with {others[name]}, by its own library" if name in others else "as it is"
        typer.echo(f"{name}: {entry[1]}, {what}" + (f", {size / 1e6:,.1f} MB on disk" if size else ""))
    if not chosen and not others:
        raise ConfigError("Nothing to quantize: give --quantization or --quantization-config")


def _show_component(source: str, name: str, entry: tuple[str, str], config: QuantizationConfig | BackendConfig) -> None:
    from lowbit.checkpoints.skeleton import empty_component
    from lowbit.hosts.inspect import inspect_component

    weights: Mapping[str, int]
    if isinstance(config, BackendConfig):
        skeleton = empty_component(source, name, *entry)
        fates = _fates_elsewhere(skeleton, config)
        weights = {layer: skeleton.get_parameter(f"{layer}.weight").numel() for layer in fates}
        last = f"{config.backend} is asked to; what it did is in the manifest of Omni"
    else:
        found = inspect_component(source, name, *entry, config, torch.bfloat16)
        fates = {record.name: (record.method or "", record.reason) for record in found.manifest.layers}
        weights, last = found.weights, found.manifest.summary()
    _show_layers(name, entry[1], config.get_name(), fates, weights)
    typer.echo(f"  {last}")
    family = family_of(entry[1])
    if family and family.note:
        typer.echo(f"  {family.name}: {family.note}")


def _show_layers(
    name: str, class_name: str, method: str, fates: Mapping[str, tuple[str, str]], weights: Mapping[str, int]
) -> None:
    groups: Counter[tuple[str, str]] = Counter()
    for layer, (taken, reason) in fates.items():
        groups[re.sub(r"(?<=\.)\d+(?=\.)", "*", layer), taken or f"kept: {reason}"] += 1
    quantized = sum(weights[layer] for layer, (taken, _) in fates.items() if taken)
    typer.echo(f"{name}: {class_name}, {sum(weights.values()) / 1e6:,.1f} M weights in linear layers,")
    typer.echo(f"  of which {method} takes {quantized / max(1, sum(weights.values())):.1%}")
    width = max(len(layer) for layer, _ in groups)
    for (layer, what), count in groups.items():
        typer.echo(f"  {layer:{width}}  x{count:<4} {what}")


def _fates_elsewhere(skeleton: torch.nn.Module, config: BackendConfig) -> dict[str, tuple[str, str]]:
    """Return linear layer -> (method of another library, reason to keep it); one of them is empty."""
    from lowbit.hosts.other_quantizers import kept_by_name, route_of

    through = route_of(type(skeleton).__module__.split(".", maxsplit=1)[0])
    return {
        layer: ("" if reason else f"{config.backend} ({through})", reason)
        for layer, reason in kept_by_name(skeleton, config).items()
    }
