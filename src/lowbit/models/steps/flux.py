"""FLUX.1 in steps, equal to diffusers' ``FluxPipeline.__call__``."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowbit.compat.parts.modules import execution_device, note_call
from lowbit.errors import ConfigError
from lowbit.models.steps.base import (
    StepState,
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


@dataclass(frozen=True)
class _Text:
    """Attributes: pooled: of the prompt [B, D]; ids: positions of its tokens [T, 3]."""

    pooled: Tensor
    ids: Tensor


@dataclass(frozen=True)
class _Inputs:
    """What is constant over steps.

    Attributes:
        size: height and width in pixels.
        image_ids: positions of the image's tokens [tokens, 3].
        text: beside the prompt's embeddings.
        negative: likewise of the negative prompt; ``None`` without a second forward.
        guidance: [B] for guidance-distilled models.
    """

    size: tuple[int, int]
    image_ids: Tensor
    text: _Text
    negative: _Text | None
    guidance: Tensor | None


class FluxSteps(PackedSteps):
    """Guidance-distilled; ``true_cfg_scale`` with a negative prompt adds a second forward."""

    def refusal(self, arguments: Mapping[str, Any]) -> str | None:
        """Image prompts stay with the pipeline's own ``__call__``."""
        given = [name for name, value in arguments.items() if "ip_adapter" in name and value is not None]
        return f"{', '.join(given)} has no step adapter" if given else None

    def prepare_encode(self, state: StepState) -> None:
        """Check, encode, draw noise and set the timesteps."""
        pipeline, arguments = state.pipeline, state.arguments
        height, width = default_size(pipeline, arguments)
        _check(pipeline, arguments, height, width)
        has_guidance = _has_guidance(arguments)
        state.prompt_embeds, text = _encode(state, "")
        negative = None
        if has_guidance:
            state.negative_prompt_embeds, negative = _encode(state, "negative_")
        state.latents, image_ids = draw_latents(state, height, width)
        sigmas = arguments["sigmas"]
        sigmas = linear_sigmas(arguments["num_inference_steps"]) if sigmas is None else sigmas
        if pipeline.scheduler.config.get("use_flow_sigmas"):
            sigmas = None
        set_timesteps(state, sigmas, state.latents.shape[1])
        note_call(
            pipeline,
            num_timesteps=len(state.timesteps),
            joint_attention_kwargs=arguments["joint_attention_kwargs"] or {},
        )
        state.inputs = _Inputs((height, width), image_ids, text, negative, embedded_guidance(state))

    def batch_key(self, state: StepState) -> Hashable:
        """Return shapes, dtype and guidance."""
        inputs: _Inputs = state.inputs
        texts = (state.prompt_embeds, state.negative_prompt_embeds if inputs.negative else None)
        return (
            tuple(state.latents.shape[1:]),
            state.latents.dtype,
            tuple(int(size) for size in inputs.image_ids.amax(dim=0)),
            tuple(None if text is None else (text.shape[1], text.dtype) for text in texts),
            str(state.pipeline.joint_attention_kwargs),
        )

    def _has_guidance(self, state: StepState) -> bool:
        return state.inputs.negative is not None

    def _forward_arguments(self, states: Sequence[StepState], negative: bool) -> dict[str, Any]:
        inputs: list[_Inputs] = [state.inputs for state in states]
        texts = [each.negative if negative and each.negative else each.text for each in inputs]
        return {
            "hidden_states": joined([state.latents for state in states]),
            "timestep": joined([model_time(state) for state in states]),
            "guidance": joined([each.guidance for each in inputs]),
            "pooled_projections": joined([text.pooled for text in texts]),
            "encoder_hidden_states": joined(
                [state.negative_prompt_embeds if negative else state.prompt_embeds for state in states]
            ),
            "txt_ids": texts[0].ids,
            "img_ids": inputs[0].image_ids,
            "joint_attention_kwargs": states[0].pipeline.joint_attention_kwargs,
        }

    def _guided(self, state: StepState, positive: Tensor, negative: Tensor) -> Tensor:
        guided: Tensor = negative + state.arguments["true_cfg_scale"] * (positive - negative)
        return guided

    def post_decode(self, state: StepState) -> Any:
        """Return the pictures."""
        pipeline, output_type = state.pipeline, state.arguments["output_type"]
        note_call(pipeline, current_timestep=None)
        if output_type == "latent":
            return state.latents
        config = pipeline.vae.config
        latents = (unpacked(state, *state.inputs.size) / config.scaling_factor) + config.shift_factor
        picture = pipeline.vae.decode(latents, return_dict=False)[0]
        return pipeline.image_processor.postprocess(picture, output_type=output_type)


def _check(pipeline: Any, arguments: Mapping[str, Any], height: int, width: int) -> None:
    names = (
        "negative_prompt",
        "negative_prompt_2",
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "callback_on_step_end_tensor_inputs",
        "max_sequence_length",
    )
    prompts = (arguments["prompt"], arguments["prompt_2"])
    try:
        pipeline.check_inputs(*prompts, height, width, **{name: arguments[name] for name in names})
    except ValueError as error:
        raise ConfigError(f"FLUX.1: {error}") from error
    positive, negative = arguments["prompt_embeds"], arguments["negative_prompt_embeds"]
    if _has_guidance(arguments) and positive is not None and negative is not None and positive.shape != negative.shape:
        raise ConfigError(
            f"FLUX.1: prompt_embeds {list(positive.shape)} and negative_prompt_embeds {list(negative.shape)}: expected"
            " equal shapes"
        )
    note_call(
        pipeline,
        guidance_scale=arguments["guidance_scale"],
        joint_attention_kwargs=arguments["joint_attention_kwargs"],
        current_timestep=None,
        interrupt=False,
    )


def _has_guidance(arguments: Mapping[str, Any]) -> bool:
    embeds = (arguments["negative_prompt_embeds"], arguments["negative_pooled_prompt_embeds"])
    has_negative = arguments["negative_prompt"] is not None or all(value is not None for value in embeds)
    return bool(has_negative and arguments["true_cfg_scale"] > 1)


def _encode(state: StepState, prefix: str) -> tuple[Tensor, _Text]:
    arguments = state.arguments
    embeds, pooled, ids = state.pipeline.encode_prompt(
        prompt=arguments[f"{prefix}prompt"],
        prompt_2=arguments[f"{prefix}prompt_2"],
        prompt_embeds=arguments[f"{prefix}prompt_embeds"],
        pooled_prompt_embeds=arguments[f"{prefix}pooled_prompt_embeds"],
        device=execution_device(state.pipeline),
        num_images_per_prompt=arguments["num_images_per_prompt"],
        max_sequence_length=arguments["max_sequence_length"],
        lora_scale=(arguments["joint_attention_kwargs"] or {}).get("scale"),
    )
    return embeds, _Text(pooled, ids)
