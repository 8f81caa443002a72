"""From sampling parameters to the arguments of a pipeline's call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from lowbit.errors import ConfigError, expected_one_of
from lowbit.inputs.data import OmniDiffusionSamplingParams
from lowbit.inputs.prompts import Prompt

# Parameter -> the names pipelines have for it, of which a pipeline takes the first it knows.
NAMES: Mapping[str, tuple[str, ...]] = {
    "height": ("height",),
    "width": ("width",),
    "num_inference_steps": ("num_inference_steps",),
    "guidance_scale": ("guidance_scale",),
    "negative_prompt": ("negative_prompt",),
    "num_frames": ("num_frames", "video_length"),
    "num_outputs_per_prompt": ("num_images_per_prompt", "num_videos_per_prompt"),
    "fps": ("frame_rate", "fps"),
}

# Arguments of pipelines that lowbit gives itself -> where the user says what they follow from.
RESERVED: Mapping[str, str] = {
    "prompt": "the prompt of generate",
    "generator": "seed",
    "callback_on_step_end": "on_step of generate",
    "callback_on_step_end_tensor_inputs": "on_step of generate, which gets the latents",
    "return_dict": "nothing: lowbit reads the output by its names",
    **{argument: parameter for parameter, arguments in NAMES.items() for argument in arguments},
}

_CURES = {
    "fps": ": it has no effect on the frames. Give it where they are written, such as"
    " diffusers.utils.export_to_video(frames, fps=...)",
    "negative_prompt": ": leave it out",
}


def call_arguments(
    params: OmniDiffusionSamplingParams, defaults: Mapping[str, Any], known: Collection[str], pipeline: str
) -> dict[str, Any]:
    """Return the pipeline's arguments other than prompt and generator.

    Args:
        params: what the user gives.
        defaults: arguments that apply where ``params`` has ``None``.
        known: names of the arguments that the pipeline takes.
        pipeline: its class, for messages.

    Raises:
        ConfigError: a parameter that the pipeline does not take, or ``extra_args`` that it does not take or that a
            parameter stands for.
    """
    extra = params.extra_args
    reserved = [name for name in extra if name in RESERVED]
    if reserved:
        cures = "; ".join(f"{name} is given by {RESERVED[name]}" for name in reserved)
        raise ConfigError(f"extra_args can't hold {', '.join(reserved)}: {cures}")
    unknown = [name for name in extra if name not in known]
    if unknown:
        raise ConfigError(f"extra_args: {pipeline} takes no {', '.join(unknown)}. {expected_one_of(known)}")
    arguments = {**defaults, **_asked(params, known, pipeline), **extra}
    left = [name for name in arguments if name not in known]
    if left:
        raise ConfigError(f"The model's generation defaults hold {', '.join(left)}, which {pipeline} does not take")
    if "num_frames" in known and "output_type" in known:  # videos are arrays unless asked for otherwise
        arguments.setdefault("output_type", "pil")
    return arguments


def for_prompt(params: OmniDiffusionSamplingParams, prompt: Prompt) -> OmniDiffusionSamplingParams:
    """Return ``params`` with the negative prompt that ``prompt`` brings; raises ``ConfigError`` where both have one."""
    if prompt.negative is None:
        return params
    if params.negative_prompt is not None:
        raise ConfigError("negative_prompt: given in the prompt and in the parameters; give it once")
    return replace(params, negative_prompt=prompt.negative)


def _asked(params: OmniDiffusionSamplingParams, known: Collection[str], pipeline: str) -> dict[str, Any]:
    """Return the arguments for the parameters that are set."""
    found: dict[str, Any] = {}
    for parameter, names in NAMES.items():
        value = getattr(params, parameter)
        if value is None or (parameter == "num_outputs_per_prompt" and value == 1):
            continue
        name = next((name for name in names if name in known), None)
        if name is None:
            raise ConfigError(f"{parameter}: {pipeline} takes no {' or '.join(names)}{_CURES.get(parameter, '')}")
        found[name] = value
    return found
