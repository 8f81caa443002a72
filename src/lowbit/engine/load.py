"""Loading: from a configuration to a pipeline that computes what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit.cache.base import GenerationCache
from lowbit.checkpoints.component import manifests
from lowbit.checkpoints.pairs import noise_pairs
from lowbit.compat.parts.tensors import convolves
from lowbit.compat.patches.convolution import convolve_in_float32
from lowbit.containers.json_file import read_json
from lowbit.engine.config import OmniDiffusionConfig
from lowbit.engine.loading import ComponentIndex, quantized_here, read_components, resolve_model, route, route_attention
from lowbit.engine.runner import Runner
from lowbit.errors import CheckpointError, ConfigError
from lowbit.hosts.attention import AttentionRecord, quantize_attention, speed_up_attention
from lowbit.hosts.fused import fuse_elementwise
from lowbit.models import is_diffusion_transformer
from lowbit.models.generation_defaults import read_generation_defaults
from lowbit.quantization.backends import BackendConfig
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.manifest import Manifest

if TYPE_CHECKING:
    from lowbit.hosts import other_quantizers as backends

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Loaded:
    """A pipeline, loaded: it computes what its configuration says, but for what only calibration can find.

    Attributes:
        config: what it was loaded from.
        source: its folder or Hub id.
        pipeline: of diffusers.
        defaults: of the pipeline's arguments, where its folder has others than its class.
        routed: component -> configuration of those that lowbit quantizes; some wait for ``calibrate``.
        cache: what lets denoising steps reuse earlier ones' work, ``None`` for nothing.
        attention: component -> what was done to its attention, for those whose attention is quantized.
        fused: component -> number of norms, gates and attention layers that take one pass each.
    """

    config: OmniDiffusionConfig
    source: str
    pipeline: Any
    defaults: Mapping[str, Any]
    routed: Mapping[str, QuantizationConfig]
    cache: GenerationCache | None = None
    attention: Mapping[str, AttentionRecord] = field(default_factory=dict)
    fused: Mapping[str, int] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        assert isinstance(self.config.device, torch.device)
        return self.config.device

    @property
    def manifests(self) -> dict[str, Manifest]:
        """What loading did to each quantized component."""
        return manifests(self.pipeline)

    @cached_property
    def runner(self) -> Runner:
        """What runs requests on the pipeline: one, so that all who use it take turns."""
        return Runner(self.pipeline, self.device, self.transformers, self.cache)

    def modules(self) -> dict[str, Any]:
        """Return the components that hold weights, by name."""
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, torch.nn.Module)}

    def transformers(self) -> dict[str, Any]:
        """Return the pipeline's diffusion transformers by component name."""
        return {
            name: part
            for name, part in self.modules().items()
            if is_diffusion_transformer(type(part).__module__.split(".")[0], type(part).__name__)
        }

    def quantized_transformers(self) -> dict[str, Any]:
        """Return those of the transformers that are quantized, or wait for ``calibrate`` to be."""
        quantized = {*self.manifests, *self.routed}
        return {name: transformer for name, transformer in self.transformers().items() if name in quantized}


def load(config: OmniDiffusionConfig) -> Loaded:
    """Load a pipeline: its weights quantized, its attention of the kind that was asked for.

    Raises:
        ConfigError: options that contradict each other or the checkpoint.
        CheckpointError: files or tensors that are missing, damaged or of the wrong shape.
        UnsupportedError: nothing can run this here; lists every reason.
    """
    config = config.resolved()
    cache = config.build_cache()
    loader = PipelineLoader.check(config)
    loaded = Loaded(
        config=config,
        source=loader.source,
        defaults=read_generation_defaults(loader.source),
        pipeline=loader.load(),
        routed=loader.routed,
        cache=cache,
    )
    loaded.attention = _choose_attention(loaded)
    loaded.fused = _fuse(loaded)
    _widen_convolutions(loaded)
    if loaded.cache is not None:
        loaded.cache.check(loaded.transformers())
    return loaded


def _choose_attention(loaded: Loaded) -> dict[str, AttentionRecord]:
    modules, transformers = loaded.modules(), loaded.transformers()
    setting: dict[str, Any] = {"device": loaded.device, "dtype": loaded.config.dtype}
    if loaded.config.attention_quantization is None:
        quantized = loaded.quantized_transformers()
        found = {name: speed_up_attention(transformer, **setting) for name, transformer in quantized.items()}
        return {name: record for name, record in found.items() if record is not None}
    kinds = route_attention(loaded.config.attention_quantization, modules, transformers)
    return {name: quantize_attention(modules[name], kind, **setting) for name, kind in kinds.items()}


def _fuse(loaded: Loaded) -> dict[str, int]:
    setting: dict[str, Any] = {"device": loaded.device, "dtype": loaded.config.dtype}
    counts = {name: fuse_elementwise(part, **setting) for name, part in loaded.quantized_transformers().items()}
    return {name: count for name, count in counts.items() if count}


def _widen_convolutions(loaded: Loaded) -> None:
    dtype = loaded.config.dtype
    assert isinstance(dtype, torch.dtype)
    if loaded.device.type != "cpu" or convolves(dtype):
        return
    for name, part in loaded.modules().items():
        if count := convolve_in_float32(part):
            logger.info("%s: %d convolutions in float32, this CPU has none in %s", name, count, dtype)


def load_pipeline(config: OmniDiffusionConfig) -> Any:
    """Check and load the pipeline of ``config``, all at once; see ``PipelineLoader`` for what it raises."""
    return PipelineLoader.check(config).load()


def check_prompts(config: OmniDiffusionConfig, routed: Mapping[str, QuantizationConfig]) -> None:
    """Raise ``ConfigError`` where there are no calibration prompts and weights can't be quantized without."""
    waiting = [name for name, found in routed.items() if found.needs_calibration]
    if waiting and not config.calibration_prompts:
        raise ConfigError(
            f"smoothing of {', '.join(waiting)} is found by watching the model generate: give calibration_prompts"
        )


@dataclass(frozen=True)
class PipelineLoader:
    """A pipeline whose files were checked, to be loaded at once or component by component.

    Attributes:
        config: what to load and how.
        source: its folder or Hub id.
        components: that it has.
        routed: component -> configuration of those that lowbit is to quantize.
        chosen: component -> configuration of those that diffusers and transformers load through lowbit.
        foreign: component -> configuration of those whose weights are not in their own folders.
        others: component -> what to ask of other libraries.
    """

    config: OmniDiffusionConfig
    source: str
    components: ComponentIndex
    routed: Mapping[str, QuantizationConfig]
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

        config = config.resolved()
        source = resolve_model(config.model)
        components = read_components(source)
        asked = route(config.quantization, components)
        own = quantized_here(asked)
        check_prompts(config, own)
        chosen = {name: found for name, found in own.items() if not found.needs_calibration}
        if Path(source).is_dir():
            chosen.update(_described(Path(source), components, asked))
        requests = {name: found for name, found in asked.items() if isinstance(found, BackendConfig)}
        others = backends.prepare(source, components, requests)
        foreign = noise_pairs(
            {name: chosen.pop(name) for name in list(chosen) if chosen[name].weights_from is not None}
        )
        if Path(source).is_dir():
            here = [name for name in components if name not in foreign]
            check_pipeline(source, chosen, components=here, device=config.device or "cpu")
            chosen.update(_separate_configs(Path(source), components, chosen))
        return cls(config, source, components, own, chosen, foreign, others)

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


def _described(
    folder: Path, components: ComponentIndex, asked: Mapping[str, QuantizationConfig | BackendConfig]
) -> dict[str, QuantizationConfig]:
    """Return the configurations of components whose weights lie beside a description of msModelSlim's."""
    from lowbit.checkpoints.msmodelslim.read import described

    found = {name: described(folder / name, asked.get(name)) for name in components}
    return {name: config for name, config in found.items() if config is not None}


def _separate_configs(
    folder: Path, components: Iterable[str], chosen: Mapping[str, QuantizationConfig]
) -> dict[str, QuantizationConfig]:
    """Return the configurations of components that have theirs in ``hf_quant_config.json``, which diffusers ignores."""
    from lowbit.checkpoints.checks import separate_config
    from lowbit.hosts.routing import merge_configs

    found = {}
    for name in components:
        stored = separate_config(folder / name)
        if stored is not None and read_json(folder / name / "config.json").get("quantization_config") is None:
            found[name] = merge_configs(stored, chosen.get(name))
    return found
