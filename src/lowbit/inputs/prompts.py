"""Prompts: text, or a dictionary of the text and what goes with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.errors import ConfigError, expected_one_of

KEYS = ("prompt", "negative_prompt")

# Of vLLM's prompts, what lowbit does not read.
_UNSUPPORTED = {
    "multi_modal_data": "images, video and audio are not supported as input",
    "multi_modal_uuids": "images, video and audio are not supported as input",
    "mm_processor_kwargs": "images, video and audio are not supported as input",
    "prompt_token_ids": "tokens are not supported as input: give the text",
    "prompt_embeds": "embeddings of a prompt go into extra_args, by the pipeline's name for them",
    "negative_prompt_embeds": "embeddings of a prompt go into extra_args, by the pipeline's name for them",
}


@dataclass(frozen=True)
class Prompt:
    """What a picture is to show.

    Attributes:
        text: not empty.
        negative: text to steer away from, ``None`` where the sampling parameters say.
    """

    text: str
    negative: str | None = None


def is_single(prompts: Any) -> bool:
    """Whether ``prompts`` is one prompt, not several."""
    return isinstance(prompts, str | Mapping | Prompt)


def parse_prompts(prompts: Any) -> list[Prompt]:
    """Return one or more prompts, each text or ``{"prompt": ..., "negative_prompt": ...}``.

    Raises:
        ConfigError: none, an empty one, another type, or a key that is not read.
    """
    if is_single(prompts):
        return [parse_prompt(prompts)]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise ConfigError(f"prompts: expected text, a dictionary, or a list of these, got {prompts!r}")
    found = [parse_prompt(each) for each in prompts]
    if not found:
        raise ConfigError("prompts: expected at least one, got an empty list")
    return found


def parse_prompt(prompt: Any) -> Prompt:
    """Return one prompt; raises ``ConfigError`` as ``parse_prompts`` does."""
    if isinstance(prompt, Prompt):
        return prompt
    if not isinstance(prompt, Mapping):
        return Prompt(_text("prompt", prompt))
    for name in prompt:
        if name in _UNSUPPORTED:
            raise ConfigError(f"{name} of a prompt: {_UNSUPPORTED[name]}")
        if name not in KEYS:
            raise ConfigError(f"Unknown key of a prompt: {name!r}. {expected_one_of(KEYS)}")
    negative = prompt.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise ConfigError(f"negative_prompt of a prompt: expected text, got {negative!r}")
    return Prompt(_text("prompt in a dictionary", prompt.get("prompt")), negative)


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{what}: expected text that is not empty, got {value!r}")
    return value
