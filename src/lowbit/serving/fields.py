"""Fields of requests that the server knows and does not act upon: which values it takes, and why no others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.serving.errors import invalid


@dataclass(frozen=True)
class Refusal:
    """Why a field is not supported.

    Attributes:
        reason: in a sentence without a full stop, with the cure.
        neutral: values that ask for nothing and are therefore taken, beside ``null``.
    """

    reason: str
    neutral: tuple[Any, ...] = ()


_NO_ADAPTERS = Refusal("adapters per request are not supported: load the LoRA into the model before serving it")
_ONLY_TEXT = "it concerns language models, this server makes pictures"

IMAGES: Mapping[str, Refusal] = {
    # OpenAI's
    "background": Refusal("pictures are opaque", ("auto", "opaque")),
    "moderation": Refusal("the server filters nothing", ("auto", "low")),
    "quality": Refusal("the model has one quality: num_inference_steps and size set the effort", ("auto", "standard")),
    "style": Refusal("say the style in the prompt"),
    "complexity": Refusal("the model plans nothing: num_inference_steps sets the effort"),
    "frame_count": Refusal("gif is not supported"),
    "frame_duration_ms": Refusal("gif is not supported"),
    "svg": Refusal("svg is not supported"),
    "input_fidelity": Refusal("the model has one fidelity: strength sets how far it departs from the picture"),
    "markup": Refusal("markup is not supported: give a mask"),
    # vLLM-Omni's
    "lora": _NO_ADAPTERS,
    "flow_shift": Refusal("the scheduler's configuration sets it"),
    "generator_device": Refusal("noise is drawn on the CPU, so that a seed gives the same on every device", ("cpu",)),
    "layers": Refusal("layered pictures are not supported"),
    "vae_use_slicing": Refusal("the operator sets it: lowbit serve --vae-use-slicing", (False,)),
    "vae_use_tiling": Refusal("the operator sets it: lowbit serve --vae-use-tiling", (False,)),
    "bot_task": Refusal("thinking before drawing is not supported"),
    "system_prompt": Refusal("diffusion models take one prompt"),
    "use_system_prompt": Refusal("diffusion models take one prompt"),
    "infer_align_image_size": Refusal("size sets the size"),
}

CHAT: Mapping[str, Refusal] = {
    "tools": Refusal("a diffusion model calls no tools", ([],)),
    "tool_choice": Refusal("a diffusion model calls no tools", ("none", "auto")),
    "parallel_tool_calls": Refusal("a diffusion model calls no tools", (True, False)),
    "functions": Refusal("a diffusion model calls no functions", ([],)),
    "function_call": Refusal("a diffusion model calls no functions", ("none", "auto")),
    "response_format": Refusal("a picture follows no schema", ({"type": "text"},)),
    "audio": Refusal("a diffusion model does not speak"),
    "n": Refusal("num_outputs_per_prompt sets the number of pictures in the message", (1,)),
    "store": Refusal("the server stores no conversation", (False,)),
    "logprobs": Refusal("pictures have no log-probabilities", (False,)),
    "top_logprobs": Refusal("pictures have no log-probabilities", (0,)),
    "temperature": Refusal(_ONLY_TEXT),
    "top_p": Refusal(_ONLY_TEXT),
    "top_k": Refusal(_ONLY_TEXT),
    "min_p": Refusal(_ONLY_TEXT),
    "repetition_penalty": Refusal(_ONLY_TEXT, (1, 1.0)),
    "max_tokens": Refusal(_ONLY_TEXT),
    "max_completion_tokens": Refusal(_ONLY_TEXT),
    "frequency_penalty": Refusal(_ONLY_TEXT, (0, 0.0)),
    "presence_penalty": Refusal(_ONLY_TEXT, (0, 0.0)),
    "stop": Refusal(_ONLY_TEXT, ([],)),
    "logit_bias": Refusal(_ONLY_TEXT, ({},)),
    "prediction": Refusal(_ONLY_TEXT),
    "reasoning_effort": Refusal(_ONLY_TEXT),
    "verbosity": Refusal(_ONLY_TEXT),
    "web_search_options": Refusal("the server searches nothing"),
    "moderation": Refusal("the server filters nothing"),
    "service_tier": Refusal("there is one tier", ("auto", "default")),
    "prompt_cache_key": Refusal(_ONLY_TEXT),
    "prompt_cache_options": Refusal(_ONLY_TEXT),
    "prompt_cache_retention": Refusal(_ONLY_TEXT),
    "use_audio_in_video": Refusal("videos are not supported as input", (False,)),
    **{name: IMAGES[name] for name in IMAGES if name not in {"moderation", "style", "background", "svg"}},
}


def without_refused(
    data: Mapping[str, Any], refused: Mapping[str, Refusal], ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Return a request's fields other than those of ``refused``.

    Args:
        data: the request.
        refused: fields that the server does not act upon.
        ignored: fields that the operator lets clients send for nothing.

    Raises:
        ApiError: a field of ``refused`` asks for something.
    """
    kept = {}
    for name, value in data.items():
        if name in ignored:
            continue
        refusal = refused.get(name)
        if refusal is None:
            kept[name] = value
        elif value is not None and not _is_neutral(value, refusal):
            takes = f". Accepted: {', '.join(map(repr, refusal.neutral))}" if refusal.neutral else ""
            raise invalid(f"{name} is not supported: {refusal.reason}{takes}", name, "unsupported_parameter")
    return kept


def _is_neutral(value: Any, refusal: Refusal) -> bool:
    return any(type(value) is type(each) and value == each for each in refusal.neutral)
