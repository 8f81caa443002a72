"""The engine: a loaded pipeline that answers prompts."""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowbit.cache.base import GenerationCache
from lowbit.containers.atomic import write_text
from lowbit.engine import processes
from lowbit.engine.calibrate import calibrate
from lowbit.engine.config import OmniDiffusionConfig, merge_quantization, parse_device
from lowbit.engine.load import load
from lowbit.engine.memory import PeakMemory
from lowbit.engine.optimize import optimize
from lowbit.engine.request import Request, StepHook, draw_seeds
from lowbit.engine.runner import Runner
from lowbit.engine.scheduler import Scheduler
from lowbit.engine.sizes import check_limits, check_size
from lowbit.hosts.attention import AttentionRecord
from lowbit.inputs.arguments import call_arguments, for_prompt
from lowbit.inputs.data import OmniDiffusionSamplingParams, merge_params
from lowbit.inputs.prompts import Prompt, is_single, parse_prompt, parse_prompts
from lowbit.models.generation_defaults import FILE_NAME, generation_defaults_text
from lowbit.outputs import OmniRequestOutput
from lowbit.quantization.factory import QuantizationSpec
from lowbit.quantization.manifest import Manifest

logger = logging.getLogger(__name__)


class Omni:
    """A pipeline, quantized while loading.

    Attributes:
        loaded: the pipeline and how it was loaded.
        optimized: what was done to it for many requests.
        load_time_s: seconds that loading and calibrating took.
        load_peak_memory_mb: highest memory meanwhile, in 10^6 bytes (see ``engine.memory``).
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
        config = OmniDiffusionConfig(
            model=model,
            quantization_config=merge_quantization(quantization, quantization_config),
            dtype=dtype,
            device=device,
            enforce_eager=enforce_eager,
            calibration_prompts=tuple(calibration_prompts),
            trust_remote_code=trust_remote_code,
            cache_backend=cache_backend,
            cache_config=cache_config,
            attention_quantization=attention_quantization,
        ).resolved()
        processes.enter(parse_device(config.device))
        peak, start = PeakMemory(parse_device(config.device)), time.perf_counter()
        self.loaded = load(config)
        calibrate(self.loaded, config.calibration_prompts)
        self.load_time_s = time.perf_counter() - start
        self.load_peak_memory_mb = peak.megabytes()
        self.optimized = optimize(self.loaded)
        self._log()

    @property
    def config(self) -> OmniDiffusionConfig:
        """What it was built from."""
        return self.loaded.config

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline."""
        return self.loaded.pipeline

    @property
    def runner(self) -> Runner:
        """What runs requests on it, step by step; several threads may use it."""
        return self.loaded.runner

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Of the pipeline's arguments, where its folder has others than its class."""
        return self.loaded.defaults

    @property
    def attention(self) -> Mapping[str, AttentionRecord]:
        """Component -> what was done to its attention, for those whose attention is quantized."""
        return self.loaded.attention

    @property
    def set_aside(self) -> Mapping[str, list[str]]:
        """Component -> layers that are not computed, because the pipeline does not look at their results."""
        return self.optimized.set_aside

    @property
    def cache(self) -> GenerationCache | None:
        """What lets denoising steps reuse earlier ones' work, ``None`` for nothing."""
        return self.runner.cache

    @cache.setter
    def cache(self, cache: GenerationCache | None) -> None:
        self.runner.cache = cache

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.loaded.device

    @property
    def manifests(self) -> dict[str, Manifest]:
        """What loading did to each quantized component."""
        return self.loaded.manifests

    def modules(self) -> dict[str, Any]:
        """Return the components that hold weights, by name."""
        return self.loaded.modules()

    def transformers(self) -> dict[str, Any]:
        """Return the pipeline's diffusion transformers by component name."""
        return self.loaded.transformers()

    def generate(
        self,
        prompts: str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]],
        sampling_params: OmniDiffusionSamplingParams | None = None,
        *,
        progress: bool = True,
        on_step: StepHook | None = None,
        timeout_s: float | None = None,
        **parameters: Any,
    ) -> OmniRequestOutput | list[OmniRequestOutput]:
        """Make pictures or videos. Several threads may call this: they take turns step by step.

        Args:
            prompts: one prompt, or several, which are made one after the other. A prompt is text, or a dictionary with
                the keys ``prompt`` and ``negative_prompt``.
            sampling_params: how; ``None`` takes the model's defaults.
            progress: show a bar per prompt.
            on_step: called after each denoising step with its index from 0 and the latents, in the pipeline's own
                shape; what it returns, if not ``None``, takes their place.
            timeout_s: seconds from now after which no further step begins.
            parameters: of ``OmniDiffusionSamplingParams``, one by one, such as ``num_inference_steps=4``.

        Returns:
            An output for one prompt, a list of them for several.

        Raises:
            ConfigError: a prompt or parameter the model can't take.
            DeadlineError: ``timeout_s`` passed.
        """
        processes.enter(self.device)
        params = merge_params(sampling_params, parameters)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        options: dict[str, Any] = {"progress": progress, "on_step": on_step, "deadline": deadline}
        scheduler = Scheduler(self.runner)
        for request in [self.request(prompt, params, **options) for prompt in parse_prompts(prompts)]:
            scheduler.submit(request)
        outputs: list[OmniRequestOutput] = []
        while scheduler.is_busy:
            outputs += [state.output() for state in scheduler.step()]
        return outputs[0] if is_single(prompts) else outputs

    def request(
        self,
        prompt: str | Mapping[str, Any] | Prompt,
        sampling_params: OmniDiffusionSamplingParams | None = None,
        *,
        progress: bool = False,
        on_step: StepHook | None = None,
        deadline: float | None = None,
    ) -> Request:
        """Return a checked request, for ``runner`` to start and step.

        Args:
            prompt: text, or a dictionary as ``generate`` takes it.
            sampling_params: how; ``None`` takes the model's defaults.
            progress: show a bar.
            on_step: see ``generate``.
            deadline: on the clock of ``time.monotonic``, in seconds, after which no further step begins.

        Raises:
            ConfigError: a prompt or parameter the model can't take.
        """
        parsed = parse_prompt(prompt)
        params = for_prompt(sampling_params or OmniDiffusionSamplingParams(), parsed)
        return Request(
            prompt=parsed.text,
            arguments=self._arguments(params),
            seeds=draw_seeds(params.seed, params.num_outputs_per_prompt),
            progress=progress,
            on_step=on_step,
            deadline=deadline,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the pipeline with its quantized components to ``folder``; ``Omni(folder)`` loads it again."""
        self.pipeline.save_pretrained(folder, safe_serialization=True)
        if self.defaults:
            write_text(Path(folder) / FILE_NAME, generation_defaults_text(self.defaults))

    def _arguments(self, params: OmniDiffusionSamplingParams) -> dict[str, Any]:
        """Return the pipeline's arguments other than prompt and generator, checked."""
        known = inspect.signature(self.pipeline.__call__).parameters
        arguments = call_arguments(params, self.defaults, known, type(self.pipeline).__name__)
        check_size(self.pipeline, arguments.get("height"), arguments.get("width"))
        check_limits(self.pipeline, arguments, self.device)
        return arguments

    def _log(self) -> None:
        for manifest in self.manifests.values():
            logger.info("%s", manifest.summary())
        for name, record in self.attention.items():
            logger.info("%s: %s", name, record.summary())
        for name, count in self.loaded.fused.items():
            logger.info("%s: %d norms, gates and attention layers in one pass each", name, count)
        for name, layers in self.set_aside.items():
            logger.info("%s: %s not computed, the pipeline does not look at them", name, ", ".join(layers))
        for name, layer in self.optimized.on_host.items():
            logger.info("%s: %s stays in the CPU's memory", name, layer)
