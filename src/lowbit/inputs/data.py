"""Prompts and sampling parameters, under the path and names of vLLM-Omni."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowbit.errors import ConfigError

_POSITIVE = ("height", "width", "num_inference_steps", "num_outputs_per_prompt", "num_frames", "fps")


@dataclass(frozen=True, kw_only=True)
class OmniDiffusionSamplingParams:
    """How to generate. ``None`` means the model's own default.

    Attributes:
        num_inference_steps: denoising steps.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        seed: of the starting noise, drawn on the CPU whatever the device; picture i of a request takes ``seed + i``.
            ``None`` draws a seed, which the output tells.
        guidance_scale: of classifier-free guidance.
        num_outputs_per_prompt: pictures per prompt.
        negative_prompt: what to steer away from.
        num_frames: of a video.
        fps: frames per second of a video.
        extra_args: further arguments of the pipeline, by its own names.
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
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be from 0 to 2**63 - 1, not {self.seed!r}")
