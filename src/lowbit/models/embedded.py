"""The model that ships inside the package."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lowbit.models.generation_defaults import read_generation_defaults

EMBEDDED_NAME = "embedded"


@dataclass(frozen=True)
class EmbeddedModel:
    """Where the embedded model is and how it is meant to be run.

    Attributes:
        folder: in diffusers' format.
        height: it was trained for, in pixels.
        width: it was trained for, in pixels.
        num_inference_steps: its score was measured with.
        guidance_scale: its score was measured with.
    """

    folder: Path
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float


@cache
def embedded_model() -> EmbeddedModel:
    """Return the embedded model's facts, read from its folder."""
    folder = Path(__file__).resolve().parent.parent / "assets" / "embedded"
    return EmbeddedModel(folder, **read_generation_defaults(folder))
