"""Where a model is, which components it has, and what each of them is to take."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.engine.config import parse_attention
from lowbit.errors import CheckpointError, ConfigError, expected_one_of
from lowbit.models import is_diffusion_transformer
from lowbit.models.embedded import EMBEDDED_NAME, embedded_model
from lowbit.quantization.backends import BackendConfig
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.component import ComponentQuantizationConfig
from lowbit.quantization.factory import AnyQuantizationConfig

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

ComponentIndex = Mapping[str, tuple[str, str]]


def resolve_model(model: str | None) -> str:
    """Return the folder or Hub id to load.

    Raises:
        ConfigError: it is neither an existing folder nor of the form ``owner/name``.
        CheckpointError: a folder without ``model_index.json``.
    """
    if model is None or model == EMBEDDED_NAME:
        return str(embedded_model().folder)
    path = Path(model).expanduser()
    if path.is_file():
        raise ConfigError(f"{model} is a file; name a folder in diffusers' format (with model_index.json) or a Hub id")
    if not path.is_dir():
        if _HUB_ID.fullmatch(model):
            return model
        raise ConfigError(f"There is no folder {model}, and it is no Hub id of the form owner/name")
    if not (path / "model_index.json").is_file():
        raise CheckpointError(
            f"{path / 'model_index.json'} is missing: a pipeline's folder holds it beside one folder per component"
        )
    return str(path)


def local_component(source: str, component: str) -> Path:
    """Return the folder of a component with its weights, downloaded from the Hub if ``source`` is there.

    Raises:
        ConfigError: it can't be had.
    """
    from huggingface_hub import snapshot_download

    return (
        _downloaded(source, component, lambda: snapshot_download(source, allow_patterns=[f"{component}/*"])) / component
    )


def local_pipeline(source: str, without: Iterable[str] = ()) -> Path:
    """Return the folder of a pipeline, downloaded from the Hub if ``source`` is there.

    Args:
        source: a folder or a Hub id.
        without: components whose weights are not needed.

    Raises:
        ConfigError: it can't be had.
    """
    from diffusers import DiffusionPipeline

    left_out = dict.fromkeys(without)
    return _downloaded(source, "files", lambda: DiffusionPipeline.download(source, use_safetensors=True, **left_out))


def _downloaded(source: str, what: str, download: Callable[[], Any]) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(download())
    except Exception as error:  # of the network or of the Hub: many kinds, all with a message
        raise ConfigError(f"Can't get {what} of {source}: {str(error).splitlines()[0]}") from error


def read_components(source: str) -> ComponentIndex:
    """Return component -> (library, class) from the pipeline's ``model_index.json``, of a folder or from the Hub.

    Raises:
        CheckpointError: the file is not what diffusers writes.
    """
    from diffusers import DiffusionPipeline

    try:
        index = dict(DiffusionPipeline.load_config(source))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"Can't read model_index.json of {source}: {str(error).splitlines()[0]}") from error
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)
    }


def route(
    config: AnyQuantizationConfig | None, components: ComponentIndex
) -> dict[str, QuantizationConfig | BackendConfig]:
    """Return component -> configuration for the components to quantize.

    A plain method, and the default of a configuration per component, go to the diffusion transformers.

    Raises:
        ConfigError: a component that the pipeline lacks or that is no model, or a method and no component to apply it
            to.
    """
    if config is None:
        return {}
    transformers = [name for name, entry in components.items() if is_diffusion_transformer(*entry)]
    if isinstance(config, ComponentQuantizationConfig):
        config.check_components(components)
        inner = [name for name in config.component_configs if name not in components]
        if inner:
            raise ConfigError(
                f"The quantization configuration names parts of components: {', '.join(inner)}. Name components, and"
                " keep layers of theirs with ignored_layers"
            )
        named = {name for name in components if config.component_configs.get(name) is not None}
        _refuse_no_models(named, components)
        resolved = {name: config.resolve(name) for name in [*transformers, *named]}
        return {name: found for name, found in resolved.items() if found is not None}
    if not transformers:
        raise ConfigError(
            f"{config.get_name()} applies to diffusion transformers and the pipeline has none. Name a component:"
            f" {{component: {config.get_name()!r}}} with one of {', '.join(components)}"
        )
    return dict.fromkeys(transformers, config)


def _refuse_no_models(names: Collection[str], components: ComponentIndex) -> None:
    """Raise ``ConfigError`` for components that are no models, such as a scheduler."""
    wrong = sorted(name for name in names if is_model(*components[name]) is False)
    if wrong:
        models = [name for name in components if is_model(*components[name])]
        raise ConfigError(
            f"The quantization configuration names components that are no models: {', '.join(wrong)}. Models are:"
            f" {', '.join(models)}"
        )


def is_model(library: str, class_name: str) -> bool | None:
    """Tell whether an entry of ``model_index.json`` is a model; ``None`` if its class is not known here."""
    module = importlib.import_module(library) if library in ("diffusers", "transformers") else None
    kind = getattr(module, class_name, None)
    return issubclass(kind, nn.Module) if isinstance(kind, type) else None


def quantized_here(routed: Mapping[str, QuantizationConfig | BackendConfig]) -> dict[str, QuantizationConfig]:
    """Return those of ``route``'s components that lowbit quantizes, not another library."""
    return {name: found for name, found in routed.items() if isinstance(found, QuantizationConfig)}


def route_attention(
    kind: str | Mapping[str, str | None] | None,
    components: ComponentIndex | Mapping[str, Any],
    transformers: Iterable[str],
) -> dict[str, str]:
    """Return component -> kind of attention quantization.

    Args:
        kind: one for all ``transformers``, or component -> kind.
        components: of the pipeline, by name.
        transformers: names of its diffusion transformers.

    Raises:
        ConfigError: an unknown kind, a component that the pipeline lacks, or no transformer.
    """
    parsed = parse_attention(kind)
    if parsed is None:
        return {}
    if isinstance(parsed, str):
        parsed = dict.fromkeys(transformers, parsed)
        if not parsed:
            raise ConfigError("attention_quantization applies to diffusion transformers and the pipeline has none")
    missing = [name for name in parsed if name not in components]
    if missing:
        raise ConfigError(
            f"attention_quantization names components that the pipeline lacks: {', '.join(missing)}."
            f" {expected_one_of(components)}"
        )
    return parsed
