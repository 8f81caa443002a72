"""``lowbit info``: what this machine can run, and what would be quantized in a model."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import typer

import lowbit
from lowbit.cli import options
from lowbit.errors import ConfigError
from lowbit.models import FAMILIES, family_of
from lowbit.ops import attention
from lowbit.ops.cpu import native
from lowbit.ops.dispatch import AnyProblem, Implementation, Problem, verdicts
from lowbit.quantization.backends import BACKENDS, BackendConfig
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.factory import SUPPORTED_QUANTIZATION_METHODS, build_quant_config, config_class
from lowbit.quantization.plan import plan_layers

EXAMPLES = """Examples:

  lowbit info

  lowbit info embedded --quantization int8

  lowbit info ./z-image --quantization fp8 --ignored-layers feed_forward
"""

_PACKAGES = ("torch", "diffusers", "transformers", "triton")


def info(
    model: Annotated[str | None, typer.Argument(help="A folder, a Hub id, or `embedded`.")] = None,
    quantization: options.Quantization = "int8",
    quantization_config: options.QuantizationConfigText = None,
    ignored_layers: options.IgnoredLayers = None,
    gguf_model: options.GgufModel = None,
    gguf_type: options.GgufType = None,
    comfyui_model: options.ComfyUiModel = None,
    svdquant_model: options.SvdQuantModel = None,
) -> None:
    """Show which kernels run here and why not the others; of a MODEL, what would be quantized and why not the rest."""
    if model is None:
        _show_machine()
    else:
        method = None if quantization_config is not None else quantization
        _show_model(
            model,
            options.quantization_spec(
                method,
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
    typer.echo(f"native helpers: {native.description()}")
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
    from lowbit.integrations.backends import is_installed

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
    from lowbit.integrations.skeleton import empty_component

    config = build_quant_config(spec)
    source = resolve_model(model)
    components = read_components(source)
    chosen = route(config, components)
    for name, (library, class_name) in components.items():
        if name not in chosen:
            typer.echo(f"{name}: {class_name}, as it is")
            continue
        _show_component(name, class_name, empty_component(source, name, library, class_name), chosen[name])
    if not chosen:
        raise ConfigError("Nothing to quantize: give --quantization or --quantization-config")


def _show_component(
    name: str, class_name: str, skeleton: torch.nn.Module, config: QuantizationConfig | BackendConfig
) -> None:
    fates = _fates(skeleton, config)
    groups: Counter[tuple[str, str]] = Counter()
    for layer, (method, reason) in fates.items():
        groups[re.sub(r"(?<=\.)\d+(?=\.)", "*", layer), method or f"kept: {reason}"] += 1
    weights = {layer: skeleton.get_parameter(f"{layer}.weight").numel() for layer in fates}
    quantized = sum(weights[layer] for layer, (method, _) in fates.items() if method)
    typer.echo(f"{name}: {class_name}, {sum(weights.values()) / 1e6:,.1f} M weights in linear layers,")
    typer.echo(f"  of which {config.get_name()} takes {quantized / max(1, sum(weights.values())):.1%}")
    width = max(len(layer) for layer, _ in groups)
    for (layer, what), count in groups.items():
        typer.echo(f"  {layer:{width}}  x{count:<4} {what}")
    if isinstance(config, BackendConfig):
        typer.echo(f"  {config.backend} is asked to; what it did is in the manifest of Omni")
    family = family_of(class_name)
    if family and family.note:
        typer.echo(f"  {family.name}: {family.note}")


def _fates(skeleton: torch.nn.Module, config: QuantizationConfig | BackendConfig) -> dict[str, tuple[str, str]]:
    """Return linear layer -> (method, reason to keep it); one of them is empty."""
    if isinstance(config, BackendConfig):
        from lowbit.integrations.backends import kept_by_name, route_of

        through = route_of(type(skeleton).__module__.split(".", maxsplit=1)[0])
        return {
            layer: ("" if reason else f"{config.backend} ({through})", reason)
            for layer, reason in kept_by_name(skeleton, config).items()
        }
    plan = plan_layers(skeleton, config)
    return {layer: (each.method.name if each.method else "", each.reason) for layer, each in plan.items()}
