"""What the step adapters share: the state they advance, and the parts that are the same in every family."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lowbit.compat.parts.modules import execution_device
from lowbit.errors import ConfigError


@dataclass(kw_only=True, eq=False)
class StepState:
    """Everything that changes while one request is generated.

    Attributes:
        pipeline: this request's own view of the pipeline: shared models, a scheduler and settings of its own.
        arguments: every parameter of the pipeline's ``__call__``, defaults filled in.
        latents: the current sample, in the layout that the pipeline denoises.
        timesteps: of the request's scheduler, one per denoising step.
        step: index of the next step, from 0.
        prediction: of the transformer for the current step, guidance applied; ``None`` between steps.
        prompt_embeds: of the prompt, as the family's transformer takes them.
        negative_prompt_embeds: likewise, for classifier-free guidance.
        inputs: the family's other inputs of the transformer, constant over steps.
    """

    pipeline: Any
    arguments: Mapping[str, Any]
    latents: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    timesteps: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    step: int = 0
    prediction: Tensor | None = field(default=None, repr=False)
    prompt_embeds: Any = field(default=None, repr=False)
    negative_prompt_embeds: Any = field(default=None, repr=False)
    inputs: Any = field(default=None, repr=False)

    @property
    def is_finished(self) -> bool:
        """All steps are taken; the sample can be decoded."""
        return self.step >= len(self.timesteps)


class StepModel(ABC):
    """A pipeline's ``__call__`` in four verbs.

    ``prepare_encode``, then ``denoise_step`` and ``step_scheduler`` until the state is finished, then ``post_decode``:
    the results are byte for byte those of ``__call__`` with the same arguments. An adapter holds no state.
    """

    callback_tensors: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds")
    """What ``callback_on_step_end`` may ask for and replace."""

    is_indivisible: ClassVar[bool] = False
    """Its only step is the whole generation."""

    def refusal(self, arguments: Mapping[str, Any]) -> str | None:
        """Return why these arguments need the pipeline's own ``__call__``, ``None`` if they do not."""
        return None

    @abstractmethod
    def prepare_encode(self, state: StepState) -> None:
        """Check the arguments, encode the prompts, draw the noise and set the timesteps.

        Raises:
            ConfigError: arguments that the pipeline does not take.
        """

    @abstractmethod
    def denoise_step(self, states: Sequence[StepState]) -> None:
        """Set ``prediction`` of each state, in one forward; several states must have equal ``batch_key``s."""

    @abstractmethod
    def batch_key(self, state: StepState) -> Hashable:
        """Return what must be equal for states to share a forward: shapes, dtypes and guidance handling."""

    def step_scheduler(self, state: StepState) -> None:
        """Advance ``latents`` by ``prediction`` and ``step`` by one, and call ``callback_on_step_end``."""
        timestep = state.timesteps[state.step]
        before = state.latents.dtype
        (state.latents,) = state.pipeline.scheduler.step(state.prediction, timestep, state.latents, return_dict=False)
        if state.latents.dtype != before and torch.backends.mps.is_available():
            state.latents = state.latents.to(before)
        state.prediction = None
        self._call_back(state, timestep)
        state.step += 1

    @abstractmethod
    def post_decode(self, state: StepState) -> Any:
        """Return the pictures in the requested ``output_type`` (for ``"latent"`` the sample)."""

    def _call_back(self, state: StepState, timestep: Tensor) -> None:
        callback = state.arguments["callback_on_step_end"]
        if callback is None:
            return
        asked = {name: getattr(state, name) for name in state.arguments["callback_on_step_end_tensor_inputs"]}
        returned = callback(state.pipeline, state.step, timestep, asked)
        for name in self.callback_tensors:
            if name in returned:
                setattr(state, name, returned.pop(name))

    def _check_callback_tensors(self, arguments: Mapping[str, Any]) -> None:
        unknown = [
            name for name in arguments["callback_on_step_end_tensor_inputs"] if name not in self.callback_tensors
        ]
        if unknown:
            raise ConfigError(
                f"callback_on_step_end_tensor_inputs: unknown {', '.join(map(repr, unknown))}. Expected some of:"
                f" {', '.join(self.callback_tensors)}"
            )


def call_arguments(pipeline: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every parameter of the pipeline's ``__call__``, defaults filled in."""
    signature = inspect.signature(type(pipeline).__call__)
    bound = signature.bind(pipeline, **given)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name))
    del arguments["self"]
    return arguments


def batch_size(arguments: Mapping[str, Any]) -> int:
    """Return the number of prompts."""
    prompt = arguments["prompt"]
    if isinstance(prompt, str):
        return 1
    return len(prompt if prompt is not None else arguments["prompt_embeds"])


def set_timesteps(state: StepState, sigmas: Any, tokens: int) -> None:
    """Set the timesteps of the state's scheduler for an image of ``tokens`` tokens.

    Flow-matching schedulers with dynamic shifting move the noise levels by ``mu``, which grows linearly with the number
    of tokens between two points of the scheduler's configuration (Esser et al. 2024, arXiv 2403.03206, section 5.3.2).
    """
    scheduler = state.pipeline.scheduler
    get = scheduler.config.get
    low, high = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
    least, most = get("base_shift", 0.5), get("max_shift", 1.15)
    slope = (most - least) / (high - low)
    mu = tokens * slope + (least - slope * low)
    device = execution_device(state.pipeline)
    if sigmas is None:
        scheduler.set_timesteps(state.arguments["num_inference_steps"], device=device, mu=mu)
    else:
        scheduler.set_timesteps(sigmas=sigmas, device=device, mu=mu)
    state.timesteps = scheduler.timesteps
    scheduler.set_begin_index(0)


def linear_sigmas(steps: int) -> Any:
    """Return evenly spaced noise levels from 1 to ``1 / steps``, float64 [steps]."""
    return np.linspace(1.0, 1 / steps, steps)


def cache_context(transformer: Any, name: str) -> AbstractContextManager[Any]:
    """Tell caches of diffusers on the transformer which branch of guidance the next forward is."""
    context: AbstractContextManager[Any] = (
        transformer.cache_context(name) if hasattr(transformer, "cache_context") else nullcontext()
    )
    return context


def joined(parts: Sequence[Any]) -> Any:
    """Return tensors joined along the batch, one tensor alone untouched, ``None`` for none."""
    first = parts[0]
    if first is None or len(parts) == 1:
        return first
    return torch.cat(list(parts), dim=0)


def split(result: Tensor, states: Sequence[StepState]) -> Sequence[Tensor]:
    """Return each state's part of a result that ``joined`` inputs gave."""
    if len(states) == 1:
        return [result]
    parts: tuple[Tensor, ...] = torch.split(result, [len(state.latents) for state in states], dim=0)
    return parts
