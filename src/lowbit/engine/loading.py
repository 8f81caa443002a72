"""From a model's name to a pipeline whose chosen components are quantized."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit.containers.json_file import read_json
from lowbit.engine.config import OmniDiffusionConfig, parse_attention
from lowbit.errors import CheckpointError, ConfigError
from lowbit.models import is_diffusion_transformer
from lowbit.models.embedded import EMBEDDED_NAME, embedded_model
from lowbit.quantization.backends import BackendConfig
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.component import ComponentQuantizationConfig
from lowbit.quantization.factory import AnyQuantizationConfig

if TYPE_CHECKING:
    from lowbit.hosts import other_quantizers as backends

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

ComponentIndex = Mapping[str, tuple[str, str]]


def load_pipeline(config: OmniDiffusionConfig) -> Any:
    """Check and load the pipeline of ``config``, all at once; see ``PipelineLoader`` for what it raises."""
    return PipelineLoader.check(config).load()


@dataclass(frozen=True)
class PipelineLoader:
    """A pipeline whose files were checked, to be loaded at once or component by component.

    Attributes:
        config: what to load and how.
        source: its folder or Hub id.
        components: that it has.
        chosen: component -> configuration of those that diffusers and transformers load through lowbit.
        foreign: component -> configuration of those whose weights are not in their own folders.
        others: component -> what to ask of other libraries.
    """

    config: OmniDiffusionConfig
    source: str
    components: ComponentIndex
    chosen: Mapping[str, QuantizationConfig]
    foreign: Mapping[str, QuantizationConfig]
    others: Mapping[str, backends.Request]

    @classmethod
    def check(cls, config: OmniDiffusionConfig) -> PipelineLoader:
        """Find what each component of ``config``'s model takes, and check the files of a local one.

        Raises:
            ConfigError: there is no such model, or the quantization names components it lacks or contradicts it.
            CheckpointError: files or tensors are missing, damaged or of the wrong shape.
        """
        from lowbit.hosts import other_quantizers as backends
        from lowbit.hosts.preflight import check_pipeline

        source = resolve_model(config.model)
        components = read_components(source)
        chosen = {name: found for name, found in routed(config).items() if not found.needs_calibration}
        if Path(source).is_dir():
            chosen.update(_described(Path(source), components, route(config.quantization, components)))
        others = backends.prepare(source, components, _other_backends(config, components))
        foreign = {name: chosen.pop(name) for name in list(chosen) if chosen[name].weights_from is not None}
        _check_places(foreign)
        if Path(source).is_dir():
            own = [name for name in components if name not in foreign]
            check_pipeline(source, chosen, components=own, device=config.device or "cpu")
            chosen.update(_separate_configs(Path(source), chosen))
        return cls(config, source, components, chosen, foreign, others)

    def load(self, names: Sequence[str] | None = None) -> Any:
        """Load the pipeline, quantizing tensor by tensor all that needs no calibration first.

        Args:
            names: load these components only, as a pipeline of nothing else; ``None`` for all.

        Raises:
            CheckpointError: tensors are not what a component needs, or a component that was asked for is not in the
                pipeline or was not quantized.
        """
        from diffusers.quantizers import PipelineQuantizationConfig

        from lowbit.checkpoints.parts import parts_class
        from lowbit.hosts import other_quantizers as backends

        kind = pipeline_class(self.source) if names is None else parts_class(names)
        wanted = set(self.components if names is None else names)
        others = {name: request for name, request in self.others.items() if name in wanted}
        mapping: dict[str, Any] = {name: config for name, config in self.chosen.items() if name in wanted}
        mapping.update({name: request.config_object for name, request in others.items()})
        device = self.config.device
        arguments: dict[str, Any] = {
            "torch_dtype": self.config.dtype,
            "use_safetensors": True,
            "trust_remote_code": self.config.trust_remote_code,
        }
        if mapping:
            arguments["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
        if device is not None and str(device) != "cpu":
            # each tensor goes to the device by itself, not the model through memory
            arguments["device_map"] = str(device)
        loaded = self._load_foreign(wanted)
        pipeline = kind.from_pretrained(self.source, **arguments, **loaded)
        check_components(pipeline, loaded, [*self.chosen.keys() & wanted, *loaded])
        backends.record(pipeline, others)
        check_components(pipeline, {}, others)
        return pipeline

    def _load_foreign(self, wanted: Collection[str]) -> dict[str, Any]:
        """Load the components whose weights are not in their own folders; their folders' weights are not needed."""
        from lowbit.checkpoints.external import load_component

        dtype, device = self.config.dtype, str(self.config.device or "cpu")
        assert isinstance(dtype, torch.dtype)
        return {
            name: load_component(self.source, name, *self.components[name], found, dtype=dtype, device=device)
            for name, found in self.foreign.items()
            if name in wanted
        }


def pipeline_class(source: str) -> Any:
    """Return the class that ``model_index.json`` names: diffusers' own, else ``DiffusionPipeline``, which finds it.

    ``DiffusionPipeline.from_pretrained`` drops components that it is given and that the class calls optional.
    """
    import diffusers

    name = diffusers.DiffusionPipeline.load_config(source).get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    is_pipeline = isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)
    return found if is_pipeline else diffusers.DiffusionPipeline


def check_components(pipeline: Any, given: Mapping[str, Any], quantized: Iterable[str]) -> None:
    """Check that a loaded pipeline has the components that were asked for.

    Args:
        pipeline: of diffusers.
        given: component -> the object that the pipeline must hold.
        quantized: names of components that must have a manifest.

    Raises:
        CheckpointError: names those that are missing, others than the given, or not quantized.
    """
    parts = pipeline.components
    problems = [f"{name} is not the one that was loaded" for name in given if parts.get(name) is not given[name]]
    problems += [
        f"{name} is {'not quantized' if parts.get(name) is not None else 'missing'}"
        for name in quantized
        if not hasattr(parts.get(name), "lowbit_manifest")
    ]
    if problems:
        raise CheckpointError(
            f"{type(pipeline).__name__} did not take what was asked for: {', '.join(problems)}. A pipeline's own code"
            " or model_index.json leaves these components out"
        )


def _check_places(foreign: Mapping[str, QuantizationConfig]) -> None:
    places = [found.weights_from for found in foreign.values()]
    if len(set(places)) < len(places):
        raise ConfigError(
            f"{places[0]} holds one component, and {', '.join(foreign)} would all take it: give each its own with a"
            " configuration per component"
        )


def _other_backends(config: OmniDiffusionConfig, components: ComponentIndex) -> dict[str, BackendConfig]:
    found = route(config.quantization, components)
    return {name: each for name, each in found.items() if isinstance(each, BackendConfig)}


def _described(
    folder: Path, components: ComponentIndex, asked: Mapping[str, QuantizationConfig | BackendConfig]
) -> dict[str, QuantizationConfig]:
    """Return the configurations of components whose weights lie beside a description of msModelSlim's."""
    from lowbit.checkpoints.msmodelslim.read import described

    found = {name: described(folder / name, asked.get(name)) for name in components}
    return {name: config for name, config in found.items() if config is not None}


def _separate_configs(folder: Path, chosen: Mapping[str, QuantizationConfig]) -> dict[str, QuantizationConfig]:
    """Return the configurations of components that have theirs in ``hf_quant_config.json``, which diffusers ignores."""
    from lowbit.checkpoints.checks import separate_config
    from lowbit.hosts.routing import merge_configs

    found = {}
    for name in read_components(str(folder)):
        stored = separate_config(folder / name)
        if stored is not None and read_json(folder / name / "config.json").get("quantization_config") is None:
            found[name] = merge_configs(stored, chosen.get(name))
    return found


def routed(config: OmniDiffusionConfig) -> dict[str, QuantizationConfig]:
    """Return component -> configuration for the components of ``config``'s model that lowbit is to quantize."""
    found = route(config.quantization, read_components(resolve_model(config.model)))
    return {name: each for name, each in found.items() if isinstance(each, QuantizationConfig)}


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
    return issubclass(kind, torch.nn.Module) if isinstance(kind, type) else None


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
            f"attention_quantization names components that the pipeline lacks: {', '.join(missing)}. It has:"
            f" {', '.join(components)}"
        )
    return parsed
