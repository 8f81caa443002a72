"""Prompts and sampling parameters, under the path and names of vLLM-Omni."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any

from lowbit.errors import ConfigError, expected_one_of

SEED_END = 2**63
"""Seeds are smaller: torch's generators take no larger ones."""

_COUNTS = ("height", "width", "num_inference_steps", "num_outputs_per_prompt", "num_frames", "fps")


@dataclass(frozen=True, kw_only=True)
class OmniDiffusionSamplingParams:
    """How to generate. ``None`` means the model's own default.

    Attributes:
        num_inference_steps: denoising steps, at least 1.
        height: image height in pixels.
        width: image width in pixels.
        seed: of the starting noise, from 0 to 2**63 - 1, drawn on the CPU whatever the device; picture i of a request
            takes ``seed + i``. ``None`` draws a seed, which the output tells.
        guidance_scale: of classifier-free guidance: finite, at least 0.
        num_outputs_per_prompt: pictures or videos per prompt.
        negative_prompt: text to steer away from.
        num_frames: of a video.
        fps: frames per second, for pipelines that are conditioned on it; others refuse it.
        extra_args: further arguments of the pipeline, by its own names; none that a parameter above stands for.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    num_inference_steps: int | None = None
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    num_outputs_per_prompt: int = 1
    negative_prompt: str | None = None
    num_frames: int | None = None
    fps: int | None = None
    extra_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_outputs_per_prompt is None:
            raise ConfigError("num_outputs_per_prompt: expected a whole number of at least 1, got None")
        # numpy's numbers become Python's, so that a result can be written as JSON.
        for name in _COUNTS:
            self._set(name, _whole(name, getattr(self, name), 1, None))
        self._set("seed", _whole("seed", self.seed, 0, SEED_END - 1))
        self._set("guidance_scale", _finite("guidance_scale", self.guidance_scale))
        if self.seed is not None and self.seed + self.num_outputs_per_prompt > SEED_END:
            raise ConfigError(
                f"seed: {self.seed} and {self.num_outputs_per_prompt} outputs, whose seeds count up, go past 2**63 - 1:"
                " take a smaller seed"
            )
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise ConfigError(f"negative_prompt: expected text, got {self.negative_prompt!r}")
        if not isinstance(self.extra_args, Mapping) or not all(isinstance(name, str) for name in self.extra_args):
            raise ConfigError(f"extra_args: expected a dictionary from argument names, got {self.extra_args!r}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def merge_params(params: OmniDiffusionSamplingParams | None, given: Mapping[str, Any]) -> OmniDiffusionSamplingParams:
    """Return ``params`` with parameters that are given one by one, or the defaults with these.

    Raises:
        ConfigError: an unknown parameter, one that ``params`` sets too, or a value that can't be.
    """
    if params is not None and not isinstance(params, OmniDiffusionSamplingParams):
        raise ConfigError(f"sampling_params: expected OmniDiffusionSamplingParams, got {params!r}")
    defaults = {each.name: each for each in fields(OmniDiffusionSamplingParams)}
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise ConfigError(
            f"Unknown parameter: {', '.join(map(repr, unknown))}. {expected_one_of(defaults)}. Arguments of the"
            " pipeline's own go into extra_args"
        )
    plain = OmniDiffusionSamplingParams()
    params = params or plain
    twice = [name for name in given if getattr(params, name) != getattr(plain, name)]
    if twice:
        raise ConfigError(f"{', '.join(twice)}: given in sampling_params and by itself; give it once")
    return replace(params, **given)


def _whole(name: str, value: Any, least: int, most: int | None) -> int | None:
    if value is None:
        return None
    wanted = f"at least {least}" if most is None else f"from {least} to 2**{(most + 1).bit_length() - 1} - 1"
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise ConfigError(f"{name}: expected a whole number, {wanted}, got {value!r}")
    return number


def _finite(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name}: expected a finite number, at least 0, got {value!r}")
    return float(value)
