"""Z-Image in steps, equal to diffusers' ``ZImagePipeline.__call__``."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.compat.parts.modules import execution_device, note_call, noted
from lowbit.errors import ConfigError
from lowbit.models.steps.base import StepModel, StepState, batch_size, set_timesteps

_DEFAULT_SIDE = 1024
_TEXT_MULTIPLE = 32
"""The transformer pads captions to a multiple of this number of tokens."""


@dataclass(frozen=True)
class _Inputs:
    """What is constant over steps.

    Attributes:
        done: share of the generation that is done before each step, 0 to 1; ``None`` where guidance is not truncated.
    """

    done: tuple[float, ...] | None


class ZImageSteps(StepModel):
    """The transformer takes lists: one latent [C, 1, H, W] and one caption [T, D] per picture and branch.

    Both branches of guidance share a forward. The sample is float32; the transformer predicts the negated velocity.
    """

    callback_tensors: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def prepare_encode(self, state: StepState) -> None:
        """Check, encode, draw noise [B, C, H/8, W/8] in float32 and set the timesteps."""
        pipeline, arguments = state.pipeline, state.arguments
        self._check_callback_tensors(arguments)
        height, width = self._size(state)
        _announce(pipeline, arguments)
        device, has_guidance = execution_device(pipeline), arguments["guidance_scale"] > 0
        self._encode(state, device, has_guidance)
        _check_text(state)
        copies = arguments["num_images_per_prompt"]
        state.latents = pipeline.prepare_latents(
            batch_size(arguments) * copies,
            pipeline.transformer.in_channels,
            height,
            width,
            torch.float32,
            device,
            arguments["generator"],
            arguments["latents"],
        )
        if copies > 1:
            state.prompt_embeds = [text for text in state.prompt_embeds for _ in range(copies)]
            state.negative_prompt_embeds = [text for text in state.negative_prompt_embeds or () for _ in range(copies)]
        sigmas, steps = arguments["sigmas"], arguments["num_inference_steps"]
        if sigmas is None:
            sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
        set_timesteps(state, sigmas, (state.latents.shape[2] // 2) * (state.latents.shape[3] // 2))
        note_call(pipeline, num_timesteps=len(state.timesteps))
        state.inputs = _Inputs(_share_done(state) if has_guidance else None)

    def _size(self, state: StepState) -> tuple[int, int]:
        sizes = {name: state.arguments[name] or _DEFAULT_SIDE for name in ("height", "width")}
        multiple = state.pipeline.vae_scale_factor * 2
        wrong = [f"{name} {size}" for name, size in sizes.items() if size % multiple]
        if wrong:
            raise ConfigError(f"Z-Image: {', '.join(wrong)}: expected a multiple of {multiple}")
        return sizes["height"], sizes["width"]

    def _encode(self, state: StepState, device: torch.device, has_guidance: bool) -> None:
        arguments = state.arguments
        given, negative = arguments["prompt_embeds"], arguments["negative_prompt_embeds"]
        if given is not None and arguments["prompt"] is None:
            if has_guidance and negative is None:
                raise ConfigError("prompt_embeds without prompt: guidance needs negative_prompt_embeds, too")
            state.prompt_embeds, state.negative_prompt_embeds = given, negative
            return
        # The pipeline writes the chat template into the lists it is given.
        prompts = {name: _copied(arguments[name]) for name in ("prompt", "negative_prompt")}
        state.prompt_embeds, state.negative_prompt_embeds = state.pipeline.encode_prompt(
            **prompts,
            do_classifier_free_guidance=has_guidance,
            prompt_embeds=given,
            negative_prompt_embeds=negative,
            device=device,
            max_sequence_length=arguments["max_sequence_length"],
        )

    def batch_key(self, state: StepState) -> Hashable:
        """Return shape, dtype, guidance and the captions' padded lengths: a longer neighbour would add padding."""
        texts = [*state.prompt_embeds, *(state.negative_prompt_embeds or ())]
        lengths = {_padded(text) for text in texts}
        # Captions of several lengths in one request: it is padded to the longest, which only it may decide.
        alone = id(state) if len(lengths) > 1 else None
        options = str(state.arguments["joint_attention_kwargs"])
        return tuple(state.latents.shape[1:]), _guidance_scale(state) > 0, max(lengths), options, alone

    def denoise_step(self, states: Sequence[StepState]) -> None:
        """Predict [B, C, H, W] in float32 for each state."""
        transformer = states[0].pipeline.transformer
        has_guidance = _guidance_scale(states[0]) > 0
        branches = 2 if has_guidance else 1
        latents: list[Tensor] = []
        times: list[Tensor] = []
        texts: list[Tensor] = []
        for state in states:
            time = (1000 - state.timesteps[state.step].expand(len(state.latents))) / 1000
            latents += state.latents.to(transformer.dtype).repeat(branches, 1, 1, 1).unsqueeze(2).unbind(dim=0)
            times.append(time.repeat(branches))
            texts += [*state.prompt_embeds, *(state.negative_prompt_embeds if has_guidance else ())]
        outputs = transformer(
            latents,
            times[0] if len(times) == 1 else torch.cat(times),
            texts,
            joint_attention_kwargs=states[0].arguments["joint_attention_kwargs"],
            return_dict=False,
        )[0]
        for state in states:
            count = branches * len(state.latents)
            own, outputs = outputs[:count], outputs[count:]
            parts = _guided(own, state) if has_guidance else [part.float() for part in own]
            state.prediction = (-torch.stack(parts, dim=0).squeeze(2)).to(torch.float32)

    def post_decode(self, state: StepState) -> Any:
        """Return the pictures."""
        pipeline, output_type = state.pipeline, state.arguments["output_type"]
        if output_type == "latent":
            return state.latents
        config = pipeline.vae.config
        latents = state.latents.to(pipeline.vae.dtype)
        latents = (latents / config.scaling_factor) + config.shift_factor
        picture = pipeline.vae.decode(latents, return_dict=False)[0]
        return pipeline.image_processor.postprocess(picture, output_type=output_type)


def _padded(text: Tensor) -> int:
    return -(-len(text) // _TEXT_MULTIPLE) * _TEXT_MULTIPLE


def _check_text(state: StepState) -> None:
    """Raise where a caption and the picture behind it take more positions than the transformer has."""
    longest = max(_padded(text) for text in [*state.prompt_embeds, *(state.negative_prompt_embeds or ())])
    most = state.pipeline.transformer.config.axes_lens[0] - 2  # the first is padding's, the last the picture's
    if longest > most:
        raise ConfigError(
            f"prompt: {longest} tokens, of which the transformer has positions for {most}: shorten it, or set"
            f" max_sequence_length to {most // _TEXT_MULTIPLE * _TEXT_MULTIPLE} or less"
        )


def _copied(prompt: Any) -> Any:
    return list(prompt) if isinstance(prompt, list) else prompt


def _announce(pipeline: Any, arguments: Any) -> None:
    """Set what callbacks read of the pipeline."""
    note_call(
        pipeline,
        guidance_scale=arguments["guidance_scale"],
        joint_attention_kwargs=arguments["joint_attention_kwargs"],
        interrupt=False,
        cfg_normalization=arguments["cfg_normalization"],
        cfg_truncation=arguments["cfg_truncation"],
    )


def _share_done(state: StepState) -> tuple[float, ...] | None:
    truncation = state.arguments["cfg_truncation"]
    if truncation is None or float(truncation) > 1:
        return None
    return tuple(((1000 - state.timesteps.float()) / 1000).tolist())


def _guidance_scale(state: StepState) -> float:
    """Return the next step's guidance scale: 0 past ``cfg_truncation``. Callbacks may change the pipeline's."""
    pipeline, done = state.pipeline, state.inputs.done
    is_truncated = done is not None and done[state.step] > noted(pipeline, "cfg_truncation")
    return 0.0 if is_truncated else float(pipeline.guidance_scale)


def _guided(outputs: Sequence[Tensor], state: StepState) -> list[Tensor]:
    """Return the guided predictions, float32, of one state's outputs: all with the prompt, then all with the negative.

    ``cfg_normalization`` bounds the norm of each by that multiple of the norm it has with the prompt alone.
    """
    count, scale = len(state.latents), _guidance_scale(state)
    bound = float(noted(state.pipeline, "cfg_normalization") or 0.0)
    results = []
    for positive, negative in zip(outputs[:count], outputs[count:], strict=True):
        own, other = positive.float(), negative.float()
        guided = own + scale * (own - other)
        if bound > 0.0:
            norm, most = torch.linalg.vector_norm(guided), torch.linalg.vector_norm(own) * bound
            if norm > most:
                guided = guided * (most / norm)
        results.append(guided)
    return results
