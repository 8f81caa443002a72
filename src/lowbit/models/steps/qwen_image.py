"""Qwen-Image in steps, equal to diffusers' ``QwenImagePipeline.__call__``."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.compat.parts.modules import execution_device, note_call
from lowbit.errors import ConfigError
from lowbit.models.steps.base import (
    StepState,
    batch_size,
    joined,
    linear_sigmas,
    set_timesteps,
)
from lowbit.models.steps.packed import (
    PackedSteps,
    default_size,
    draw_latents,
    embedded_guidance,
    model_time,
    unpacked,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Inputs:
    """What is constant over steps.

    Attributes:
        size: height and width in pixels.
        shapes: per prompt: one image of (frames, rows, columns) tokens.
        mask: of the prompt's padding [B, T], ``None`` where there is none.
        negative_mask: likewise.
        guidance: [B] for guidance-distilled models.
        has_guidance: a second forward with the negative prompt.
    """

    size: tuple[int, int]
    shapes: list[list[tuple[int, int, int]]]
    mask: Tensor | None
    negative_mask: Tensor | None
    guidance: Tensor | None
    has_guidance: bool


class QwenImageSteps(PackedSteps):
    """``true_cfg_scale`` with a negative prompt guides; the result keeps the norm it has with the prompt alone."""

    def prepare_encode(self, state: StepState) -> None:
        """Check, encode, draw noise and set the timesteps."""
        pipeline, arguments = state.pipeline, state.arguments
        height, width = default_size(pipeline, arguments)
        _check(pipeline, arguments, height, width)
        has_guidance = _has_guidance(arguments)
        state.prompt_embeds, mask = _encode(state, "")
        negative_mask = None
        if has_guidance:
            state.negative_prompt_embeds, negative_mask = _encode(state, "negative_")
        state.latents = draw_latents(state, height, width)
        sigmas = arguments["sigmas"]
        sigmas = linear_sigmas(arguments["num_inference_steps"]) if sigmas is None else sigmas
        set_timesteps(state, sigmas, state.latents.shape[1])
        note_call(
            pipeline,
            num_timesteps=len(state.timesteps),
            attention_kwargs=arguments["attention_kwargs"] or {},
        )
        scale = pipeline.vae_scale_factor
        state.inputs = _Inputs(
            size=(height, width),
            shapes=[[(1, height // scale // 2, width // scale // 2)]] * batch_size(arguments),
            mask=mask,
            negative_mask=negative_mask,
            guidance=embedded_guidance(state),
            has_guidance=has_guidance,
        )

    def batch_key(self, state: StepState) -> Hashable:
        """Return shapes, dtype and guidance; a request whose prompts are padded goes alone."""
        inputs: _Inputs = state.inputs
        texts = (state.prompt_embeds, state.negative_prompt_embeds if inputs.has_guidance else None)
        is_masked = inputs.mask is not None or inputs.negative_mask is not None
        return (
            tuple(state.latents.shape[1:]),
            state.latents.dtype,
            inputs.shapes[0][0],
            tuple(None if text is None else (text.shape[1], text.dtype) for text in texts),
            str(state.pipeline.attention_kwargs),
            id(state) if is_masked else None,
        )

    def _has_guidance(self, state: StepState) -> bool:
        return bool(state.inputs.has_guidance)

    def _forward_arguments(self, states: Sequence[StepState], negative: bool) -> dict[str, Any]:
        inputs: list[_Inputs] = [state.inputs for state in states]
        return {
            "hidden_states": joined([state.latents for state in states]),
            "timestep": joined([model_time(state) for state in states]),
            "guidance": joined([each.guidance for each in inputs]),
            "encoder_hidden_states": joined(
                [state.negative_prompt_embeds if negative else state.prompt_embeds for state in states]
            ),
            "encoder_hidden_states_mask": inputs[0].negative_mask if negative else inputs[0].mask,
            "img_shapes": [shape for each in inputs for shape in each.shapes],
            "attention_kwargs": states[0].pipeline.attention_kwargs,
        }

    def _guided(self, state: StepState, positive: Tensor, negative: Tensor) -> Tensor:
        combined = negative + state.arguments["true_cfg_scale"] * (positive - negative)
        norm = torch.norm(positive, dim=-1, keepdim=True)
        guided: Tensor = combined * (norm / torch.norm(combined, dim=-1, keepdim=True))
        return guided

    def post_decode(self, state: StepState) -> Any:
        """Return the pictures: the only frame that the video autoencoder gives."""
        pipeline, output_type = state.pipeline, state.arguments["output_type"]
        note_call(pipeline, current_timestep=None)
        if output_type == "latent":
            return state.latents
        latents = unpacked(state, *state.inputs.size).unsqueeze(2).to(pipeline.vae.dtype)
        config = pipeline.vae.config
        shape = (1, config.z_dim, 1, 1, 1)
        mean = torch.tensor(config.latents_mean).view(shape).to(latents.device, latents.dtype)
        # The inverse is rounded to the autoencoder's dtype before the division, as in diffusers.
        inverse = 1.0 / torch.tensor(config.latents_std).view(shape).to(latents.device, latents.dtype)
        picture = pipeline.vae.decode(latents / inverse + mean, return_dict=False)[0][:, :, 0]
        return pipeline.image_processor.postprocess(picture, output_type=output_type)


def _check(pipeline: Any, arguments: Any, height: int, width: int) -> None:
    names = (
        "negative_prompt",
        "prompt_embeds",
        "negative_prompt_embeds",
        "prompt_embeds_mask",
        "negative_prompt_embeds_mask",
        "callback_on_step_end_tensor_inputs",
        "max_sequence_length",
    )
    try:
        pipeline.check_inputs(arguments["prompt"], height, width, **{name: arguments[name] for name in names})
    except ValueError as error:
        raise ConfigError(f"Qwen-Image: {error}") from error
    if pipeline.transformer.config.guidance_embeds:
        if arguments["guidance_scale"] is None:
            raise ConfigError("Qwen-Image: this model is guidance-distilled: give guidance_scale")
    elif arguments["guidance_scale"] is not None:
        logger.warning(
            "guidance_scale %s has no effect: this model is not guidance-distilled; true_cfg_scale with a"
            " negative_prompt guides it",
            arguments["guidance_scale"],
        )
    note_call(
        pipeline,
        guidance_scale=arguments["guidance_scale"],
        attention_kwargs=arguments["attention_kwargs"],
        current_timestep=None,
        interrupt=False,
    )


def _has_guidance(arguments: Any) -> bool:
    has_negative = arguments["negative_prompt"] is not None or arguments["negative_prompt_embeds"] is not None
    scale = arguments["true_cfg_scale"]
    if has_negative and scale <= 1:
        logger.warning("negative_prompt has no effect with true_cfg_scale %s: it needs more than 1", scale)
    elif scale > 1 and not has_negative:
        logger.warning("true_cfg_scale %s has no effect without a negative_prompt", scale)
    return has_negative and scale > 1


def _encode(state: StepState, prefix: str) -> tuple[Tensor, Tensor | None]:
    arguments = state.arguments
    embeds: tuple[Tensor, Tensor | None] = state.pipeline.encode_prompt(
        prompt=arguments[f"{prefix}prompt"],
        prompt_embeds=arguments[f"{prefix}prompt_embeds"],
        prompt_embeds_mask=arguments[f"{prefix}prompt_embeds_mask"],
        device=execution_device(state.pipeline),
        num_images_per_prompt=arguments["num_images_per_prompt"],
        max_sequence_length=arguments["max_sequence_length"],
    )
    return embeds
