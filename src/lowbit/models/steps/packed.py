"""What Qwen-Image and FLUX.1 share: latents packed to tokens, branches of guidance in forwards of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.compat.parts.modules import execution_device, note_call
from lowbit.models.steps.base import StepModel, StepState, batch_size, cache_context, split


class PackedSteps(StepModel):
    """The sample is tokens [B, H/16 * W/16, C * 4] in the text encoder's dtype, 2 x 2 latent pixels to a token."""

    def denoise_step(self, states: Sequence[StepState]) -> None:
        """Predict [B, tokens, C * 4] for each state: one forward per branch of guidance."""
        first = states[0]
        for state in states:
            note_call(state.pipeline, current_timestep=state.timesteps[state.step])
        transformer = first.pipeline.transformer
        with cache_context(transformer, "cond"):
            positive = transformer(**self._forward_arguments(states, False), return_dict=False)[0]
        results = split(positive, states)
        if self._has_guidance(first):
            with cache_context(transformer, "uncond"):
                negative = transformer(**self._forward_arguments(states, True), return_dict=False)[0]
            pairs = zip(states, results, split(negative, states), strict=True)
            results = [self._guided(state, own, other) for state, own, other in pairs]
        for state, result in zip(states, results, strict=True):
            state.prediction = result

    @abstractmethod
    def _has_guidance(self, state: StepState) -> bool:
        """Tell whether each step has a second forward with the negative prompt."""

    @abstractmethod
    def _forward_arguments(self, states: Sequence[StepState], negative: bool) -> dict[str, Any]:
        """Return the transformer's arguments for one branch."""

    @abstractmethod
    def _guided(self, state: StepState, positive: Tensor, negative: Tensor) -> Tensor:
        """Return the prediction with guidance from the prompt's and the negative prompt's."""


def default_size(pipeline: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width in pixels, the model's own where none is given."""
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    return arguments["height"] or side, arguments["width"] or side


def draw_latents(state: StepState, height: int, width: int) -> Any:
    """Return what the pipeline's ``prepare_latents`` gives for the request."""
    pipeline, arguments = state.pipeline, state.arguments
    return pipeline.prepare_latents(
        batch_size(arguments) * arguments["num_images_per_prompt"],
        pipeline.transformer.config.in_channels // 4,
        height,
        width,
        state.prompt_embeds.dtype,
        execution_device(pipeline),
        arguments["generator"],
        arguments["latents"],
    )


def unpacked(state: StepState, height: int, width: int) -> Tensor:
    """Return tokens [B, h/2 * w/2, C * 4] as latents [B, C, h, w]; h and w are even numbers of latent pixels."""
    scale = state.pipeline.vae_scale_factor * 2
    rows, columns = height // scale, width // scale
    count, _, channels = state.latents.shape
    latents = state.latents.view(count, rows, columns, channels // 4, 2, 2)
    return latents.permute(0, 3, 1, 4, 2, 5).reshape(count, channels // 4, rows * 2, columns * 2)


def model_time(state: StepState) -> Tensor:
    """Return the current timestep of each picture [B] in the sample's dtype, from 0 to 1."""
    timestep = state.timesteps[state.step].expand(state.latents.shape[0]).to(state.latents.dtype)
    return timestep / 1000


def embedded_guidance(state: StepState) -> Tensor | None:
    """Return the guidance scale [B] in float32 for models that take it as an input, ``None`` for others."""
    if not state.pipeline.transformer.config.guidance_embeds:
        return None
    scale, device = state.arguments["guidance_scale"], execution_device(state.pipeline)
    return torch.full([1], scale, device=device, dtype=torch.float32).expand(state.latents.shape[0])
