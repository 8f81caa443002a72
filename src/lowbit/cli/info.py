"""``lowbit info``: what this machine can run, and what would be quantized in a model."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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

  lowbit info --quantization int8                # its kernels on this machine

  lowbit info embedded --quantization int8

  lowbit info ./z-image --quantization fp8 --ignored-layers feed_forward

  lowbit info ./z-image-int8
"""

IN_USE = "in use"
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
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Every kernel on this machine, and why it does not run.")
    ] = False,
) -> None:
    """Show which kernels run here and why not the others; of a MODEL, what is or would be quantized, and why not all.

    A model that is quantized already is shown as it is. Of another one, what int8 would do if no method is named.
    """
    elsewhere = {
        "--quantization-config": quantization_config,
        "--ignored-layers": ignored_layers,
        "--gguf-model": gguf_model,
        "--gguf-type": gguf_type,
        "--comfyui-model": comfyui_model,
        "--svdquant-model": svdquant_model,
    }
    if model is None:
        given = [name for name, value in elsewhere.items() if value is not None]
        if given:
            raise ConfigError(f"{', '.join(given)}: give the MODEL it is for, such as lowbit info embedded")
        _show_machine(quantization, verbose)
        return
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


def _show_machine(method: str | None, verbose: bool) -> None:
    """Print a line per method; all kernels of one method, or of all where the user wants more."""
    kernels = _tables()
    if method is not None:
        if method.lower() in BACKENDS:
            raise ConfigError(
                f"{method} computes with kernels of its own. Give a MODEL to see which layers it would take"
            )
        wanted = config_class(method).get_name()
        kernels = {what: entry for what, entry in kernels.items() if entry[0] == wanted}
    typer.echo(f"lowbit {lowbit.__version__} on Python {platform.python_version()}, {platform.system()}")
    typer.echo("  ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    threads = torch.get_num_threads()
    typer.echo(f"cpu: {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads != 1)}")
    typer.echo(f"     {helper.description()}")
    for device in devices():
        typer.echo(f"\nkernels on {device}:")
        for what, (_, table, make_problem) in kernels.items():
            rows = kernel_rows(table, make_problem(device))
            if verbose or method is not None:
                typer.echo(f"{what}:")
                for name, verdict in rows.items():
                    typer.echo(f"  {name:18} {verdict}")
            else:
                typer.echo(f"  {what:16} {_summary(rows)}")
    if method is not None:
        return
    _show_backends()
    typer.echo("families with known defaults: " + ", ".join(family.name for family in FAMILIES))
    if not verbose:
        typer.echo("\nlowbit info --verbose      every kernel, and why it does not run")
        typer.echo("lowbit info -q METHOD      those of one method")
        typer.echo("lowbit info MODEL          what would be quantized in a model")


def _tables() -> dict[str, tuple[str, Sequence[Implementation], Callable[[torch.device], AnyProblem]]]:
    """Return what is computed -> (method, its kernels, the problem on a device)."""
    found: dict[str, tuple[str, Sequence[Implementation], Callable[[torch.device], AnyProblem]]] = {}
    for method in SUPPORTED_QUANTIZATION_METHODS:
        chosen = config_class(method)().linear_method()
        problem = partial(
            Problem,
            dtype=torch.bfloat16,
            out_features=1024,
            in_features=1024,
            format=chosen.format,
        )
        found[method] = (method, chosen.table, problem)
    for kind in attention.KINDS:
        problem_of_kind = partial(attention.AttentionProblem, dtype=torch.bfloat16, kind=kind, head_dim=128)
        found[f"{kind} attention"] = (kind, attention.IMPLEMENTATIONS, problem_of_kind)
    return found


def kernel_rows(table: Sequence[Implementation], problem: AnyProblem) -> dict[str, str]:
    """Return kernel -> whether it runs a problem. Implementations that share a name, for several devices, are one."""
    reasons: dict[str, list[str]] = {}
    able: dict[str, Implementation] = {}
    chosen: Implementation | None = None
    for implementation, reason in verdicts(table, problem):
        reasons.setdefault(implementation.name, [])
        if reason is not None:
            reasons[implementation.name].append(reason)
            continue
        able.setdefault(implementation.name, implementation)
        if chosen is None and implementation.automatic:
            chosen = able[implementation.name] = implementation
    rows = {}
    for name, refusals in reasons.items():
        if chosen is not None and name == chosen.name:
            rows[name] = IN_USE + (f": {chosen.slow}" if chosen.slow else "")
        elif name in able:
            rows[name] = "yes, when asked for by name"
        else:
            rows[name] = f"no: {'; '.join(dict.fromkeys(refusals))}"
    return rows


def _summary(rows: Mapping[str, str]) -> str:
    used = [(name, verdict.removeprefix(IN_USE).lstrip(": ")) for name, verdict in rows.items() if IN_USE in verdict]
    if not used:
        return "none runs here"
    name, note = used[0]
    others = [other for other, verdict in rows.items() if verdict.startswith("yes")]
    note = f": {note.split(':')[0].split(', so')[0]}" if note else ""
    return f"{name}{note}" + (f"  (also {', '.join(others)})" if others and not note else "")


def _show_backends() -> None:
    from lowbit.hosts.other_quantizers import is_installed

    found = [f"{backend} ({'installed' if is_installed(backend) else 'not installed'})" for backend in BACKENDS]
    typer.echo(f"\nother libraries: {', '.join(found)}")


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
