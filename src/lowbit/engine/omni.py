"""The engine: a loaded pipeline that answers prompts."""

from __future__ import annotations

import inspect
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from lowbit.cache import build_cache
from lowbit.cache.base import Skips
from lowbit.checkpoints.component import manifests
from lowbit.compat.convolution import convolve_in_float32, has_convolution
from lowbit.engine.config import OmniDiffusionConfig, merge_quantization
from lowbit.engine.loading import load_pipeline, resolve_model, route_attention, routed
from lowbit.engine.memory import PeakMemory
from lowbit.engine.placement import keep_embeddings_on_host, set_aside
from lowbit.engine.sizes import check_size
from lowbit.errors import ConfigError
from lowbit.hosts.attention import AttentionRecord, quantize_attention, speed_up_attention
from lowbit.hosts.fused import fuse_elementwise
from lowbit.inputs.data import OmniDiffusionSamplingParams
from lowbit.models import is_diffusion_transformer
from lowbit.models.embedded import EMBEDDED_NAME
from lowbit.models.generation_defaults import FILE_NAME, generation_defaults_text, read_generation_defaults
from lowbit.outputs import OmniRequestOutput
from lowbit.quantization.calibration.smoothing import watched_inputs
from lowbit.quantization.calibration.static import calibration, uncalibrated_layers
from lowbit.quantization.factory import QuantizationSpec
from lowbit.quantization.manifest import Manifest
from lowbit.quantization.plan import quantize_model

logger = logging.getLogger(__name__)

_request_numbers = itertools.count()

StepHook = Callable[[int, torch.Tensor], torch.Tensor | None]


class Omni:
    """A pipeline, quantized while loading.

    Attributes:
        config: what it was built from.
        pipeline: the diffusers pipeline.
        manifests: component -> which layers took which method and kernel, which were kept and why, and the bytes.
        load_time_s: seconds that loading took.
        load_peak_memory_mb: highest memory while loading, in 10^6 bytes (see ``engine.memory``).
        cache: what lets denoising steps reuse earlier ones' work, ``None`` for nothing.
        attention: component -> what was done to its attention, for those whose attention is quantized.
        defaults: of the pipeline's arguments, where its folder has others than its class.
        set_aside: component -> layers that are not computed, because the pipeline does not look at their results.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        quantization: QuantizationSpec = None,
        quantization_config: QuantizationSpec = None,
        dtype: torch.dtype | str = torch.bfloat16,
        device: torch.device | str | None = None,
        enforce_eager: bool = True,
        calibration_prompts: Sequence[str] = (),
        trust_remote_code: bool = False,
        cache_backend: str | None = None,
        cache_config: Mapping[str, Any] | None = None,
        attention_quantization: str | Mapping[str, str | None] | None = None,
    ) -> None:
        """Load ``model``.

        Args:
            model: a folder in diffusers' format or a Hub id; ``None`` or ``"embedded"`` is the embedded model.
            quantization: a method's name, such as ``"int8"``.
            quantization_config: a method with options, or a dictionary from components to methods; see
                ``build_quant_config``.
            dtype: of weights that are not quantized and of activations.
            device: ``None`` takes an accelerator when there is one.
            enforce_eager: ``False`` compiles the transformers' repeated blocks.
            calibration_prompts: for ``smoothing``, and for FP8's static activation scheme where the checkpoint holds no
                input scales.
            trust_remote_code: run code that comes with the checkpoint.
            cache_backend: reuse what earlier denoising steps computed, such as ``"tea_cache"``.
            cache_config: the cache's options, such as ``{"rel_l1_thresh": 0.2}``.
            attention_quantization: compute attention in ``"int8"`` or ``"fp8"``; a dictionary from components to these.
                ``None`` quantizes none, but lets quantized transformers use a faster kernel where there is one;
                ``"none"`` leaves attention to diffusers.

        Raises:
            ConfigError: options that don't exist, contradict each other or the checkpoint.
            CheckpointError: files or tensors that are missing, damaged or of the wrong shape.
            UnsupportedError: nothing can run this here; lists every reason.
        """
        self.config = OmniDiffusionConfig(
            model=None if model == EMBEDDED_NAME else model,
            quantization_config=merge_quantization(quantization, quantization_config),
            dtype=dtype,
            device=device,
            enforce_eager=enforce_eager,
            calibration_prompts=tuple(calibration_prompts),
            trust_remote_code=trust_remote_code,
            cache_backend=cache_backend,
            cache_config=cache_config,
            attention_quantization=attention_quantization,
        )
        self.cache = build_cache(cache_backend, cache_config)
        check_prompts(self.config)
        self.defaults = read_generation_defaults(resolve_model(self.config.model))
        peak, start = PeakMemory(self.device), time.perf_counter()
        self.pipeline = load_pipeline(self.config)
        self.attention = self._choose_attention()
        self.fused = self._fuse()
        self._widen_convolutions()
        self._smooth(self.config.calibration_prompts)
        self.load_time_s = time.perf_counter() - start
        self.load_peak_memory_mb = peak.megabytes()
        if self.cache is not None:
            self.cache.check(self.transformers())
        self._calibrate(self.config.calibration_prompts)
        self.set_aside = set_aside(self.pipeline)
        on_host = {} if self.device.type == "cpu" else keep_embeddings_on_host(self.pipeline)
        if not enforce_eager:
            for transformer in self.transformers().values():
                transformer.compile_repeated_blocks(fullgraph=True)
        for manifest in self.manifests.values():
            logger.info("%s", manifest.summary())
        for name, record in self.attention.items():
            logger.info("%s: %s", name, record.summary())
        for name, count in self.fused.items():
            logger.info("%s: %d norms, gates and attention layers in one pass each", name, count)
        for name, layers in self.set_aside.items():
            logger.info("%s: %s not computed, the pipeline does not look at them", name, ", ".join(layers))
        for name, layer in on_host.items():
            logger.info("%s: %s stays in the CPU's memory", name, layer)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        assert isinstance(self.config.device, torch.device)
        return self.config.device

    @property
    def manifests(self) -> dict[str, Manifest]:
        """What loading did to each quantized component."""
        return manifests(self.pipeline)

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

    def generate(
        self,
        prompts: str | Sequence[str],
        sampling_params: OmniDiffusionSamplingParams | None = None,
        *,
        progress: bool = True,
        on_step: StepHook | None = None,
    ) -> OmniRequestOutput | list[OmniRequestOutput]:
        """Make pictures or videos.

        Args:
            prompts: one prompt, or several.
            sampling_params: how; ``None`` takes the model's defaults.
            progress: show a bar per prompt.
            on_step: called after each denoising step with its index from 0 and the latents, in the pipeline's own
                shape; what it returns, if not ``None``, takes their place.

        Returns:
            An output for one prompt, a list of them for several.

        Raises:
            ConfigError: a prompt or parameter the model can't take.
        """
        params = sampling_params or OmniDiffusionSamplingParams()
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigError("A prompt must be text that is not empty")
        arguments = self._arguments(params)
        steps = _Steps(self.pipeline, on_step)
        outputs = [self._generate_one(text, params, arguments, progress, steps) for text in texts]
        return outputs[0] if isinstance(prompts, str) else outputs

    def save_pretrained(self, folder: str) -> None:
        """Write the pipeline with its quantized components to ``folder``; ``Omni(folder)`` loads it again."""
        self.pipeline.save_pretrained(folder, safe_serialization=True)
        if self.defaults:
            (Path(folder) / FILE_NAME).write_text(generation_defaults_text(self.defaults), encoding="utf-8")

    def _arguments(self, params: OmniDiffusionSamplingParams) -> dict[str, Any]:
        """Return the pipeline's arguments other than prompt and generator, checked."""
        asked = {
            "height": params.height,
            "width": params.width,
            "num_inference_steps": params.num_inference_steps,
            "guidance_scale": params.guidance_scale,
            "negative_prompt": params.negative_prompt,
            "num_frames": params.num_frames,
            "num_images_per_prompt": params.num_outputs_per_prompt if params.num_outputs_per_prompt > 1 else None,
        }
        arguments = {**self.defaults, **{key: value for key, value in asked.items() if value is not None}}
        arguments.update(params.extra_args)
        known = inspect.signature(self.pipeline.__call__).parameters
        if "num_frames" in known:  # videos are arrays unless asked for otherwise
            arguments.setdefault("output_type", "pil")
        unknown = [name for name in arguments if name not in known]
        if unknown:
            raise ConfigError(
                f"{type(self.pipeline).__name__} takes no {', '.join(unknown)}. It takes: {', '.join(known)}"
            )
        check_size(self.pipeline, arguments.get("height"), arguments.get("width"))
        return arguments

    def _generate_one(
        self,
        prompt: str,
        params: OmniDiffusionSamplingParams,
        arguments: Mapping[str, Any],
        progress: bool,
        steps: _Steps,
    ) -> OmniRequestOutput:
        first_seed = secrets.randbelow(2**32) if params.seed is None else params.seed
        seeds = [first_seed + index for index in range(params.num_outputs_per_prompt)]
        # The noise is drawn on the CPU, so that a seed means the same start on every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.pipeline.set_progress_bar_config(disable=not progress, desc="denoising")
        steps.ends.clear()
        peak, start = PeakMemory(self.device), time.perf_counter()
        with torch.no_grad(), self._caching(arguments) as skips:
            result = self.pipeline(prompt=prompt, generator=generators, **steps.arguments, **arguments)
        elapsed = time.perf_counter() - start
        images, frames = _pictures(result)
        return OmniRequestOutput(
            request_id=f"request-{next(_request_numbers)}",
            prompt=prompt,
            images=images,
            frames=frames,
            seeds=seeds,
            num_inference_steps=len(steps.ends) or arguments.get("num_inference_steps", 0),
            generation_time_s=elapsed,
            step_times_s=steps.durations(),
            peak_memory_mb=peak.megabytes(),
            skipped_steps=skips.steps(),
        )

    def _caching(self, arguments: Mapping[str, Any]) -> AbstractContextManager[Skips]:
        if self.cache is None:
            return nullcontext(Skips())
        default = inspect.signature(self.pipeline.__call__).parameters["num_inference_steps"].default
        steps = arguments.get("num_inference_steps", default)
        return self.cache.active(self.pipeline, self.transformers(), steps)

    def _choose_attention(self) -> dict[str, AttentionRecord]:
        assert isinstance(self.config.dtype, torch.dtype)
        modules, transformers = self.modules(), self.transformers()
        setting: dict[str, Any] = {"device": self.device, "dtype": self.config.dtype}
        if self.config.attention_quantization is None:
            quantized = self._quantized_transformers()
            found = {name: speed_up_attention(transformer, **setting) for name, transformer in quantized.items()}
            return {name: record for name, record in found.items() if record is not None}
        kinds = route_attention(self.config.attention_quantization, modules, transformers)
        return {name: quantize_attention(modules[name], kind, **setting) for name, kind in kinds.items()}

    def _fuse(self) -> dict[str, int]:
        assert isinstance(self.config.dtype, torch.dtype)
        setting: dict[str, Any] = {"device": self.device, "dtype": self.config.dtype}
        counts = {name: fuse_elementwise(part, **setting) for name, part in self._quantized_transformers().items()}
        return {name: count for name, count in counts.items() if count}

    def _widen_convolutions(self) -> None:
        assert isinstance(self.config.dtype, torch.dtype)
        if self.device.type != "cpu" or has_convolution(self.config.dtype):
            return
        for name, part in self.modules().items():
            if count := convolve_in_float32(part):
                logger.info("%s: %d convolutions in float32, this CPU has none in %s", name, count, self.config.dtype)

    def _quantized_transformers(self) -> dict[str, Any]:
        quantized = {*self.manifests, *routed(self.config)}
        return {name: transformer for name, transformer in self.transformers().items() if name in quantized}

    def _smooth(self, prompts: Sequence[str]) -> None:
        """Quantize what must be watched first: generate with the unquantized model, then quantize it in place."""
        waiting = {name: config for name, config in routed(self.config).items() if config.needs_calibration}
        if not waiting:
            return
        parts = self.modules()
        with ExitStack() as stack:
            seen = {name: stack.enter_context(watched_inputs(parts[name])) for name in waiting}
            logger.info("Watching %d prompts for smoothing", len(prompts))
            self.generate(list(prompts), OmniDiffusionSamplingParams(seed=0))
        for name, config in waiting.items():
            quantize_model(parts[name], config, seen_inputs=seen[name])

    def _calibrate(self, prompts: Sequence[str]) -> None:
        waiting = {name: part for name, part in self.transformers().items() if uncalibrated_layers(part)}
        if not waiting:
            return
        if not prompts:
            raise missing_scales(waiting)
        logger.info("Calibrating input scales on %d prompts", len(prompts))
        for part in waiting.values():
            with calibration(part):
                self.generate(list(prompts), OmniDiffusionSamplingParams(seed=0))


def check_prompts(config: OmniDiffusionConfig) -> None:
    """Raise ``ConfigError`` where there are no calibration prompts and weights can't be quantized without."""
    if not config.calibration_prompts and any(part.needs_calibration for part in routed(config).values()):
        raise ConfigError("smoothing is found by watching the model generate: give calibration_prompts")


def missing_scales(components: Iterable[str]) -> ConfigError:
    """Return the error for components with static activations whose input scales are still to be found."""
    return ConfigError(
        f"The static activation scheme needs input scales that {', '.join(components)} lacks. Give"
        " calibration_prompts, load a checkpoint that holds them, or use activation_scheme='dynamic'"
    )


def _pictures(result: Any) -> tuple[list[Any], list[list[Any]]]:
    """Return the images and the videos' frames of a pipeline's output, as PIL images."""
    if hasattr(result, "images"):
        return list(result.images), []
    return [], [list(video) for video in result.frames]


class _Steps:
    """Notes when each denoising step ends, and hands its latents to a hook."""

    def __init__(self, pipeline: Any, hook: StepHook | None) -> None:
        self.ends: list[float] = []
        self.hook = hook
        self.arguments: dict[str, Any] = {}
        if "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:
            self.arguments["callback_on_step_end"] = self._note
        elif hook is not None:
            raise ConfigError(f"{type(pipeline).__name__} does not call back after each step: its latents can't be had")

    def _note(self, _pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.ends.append(time.perf_counter())
        replaced = self.hook(step, tensors["latents"]) if self.hook is not None else None
        return tensors if replaced is None else {**tensors, "latents": replaced}

    def durations(self) -> list[float]:
        """Return the seconds between successive ends."""
        return [later - earlier for earlier, later in itertools.pairwise(self.ends)]
