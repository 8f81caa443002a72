"""Which picture sizes a pipeline can make."""

from __future__ import annotations

from typing import Any

from lowbit.errors import ConfigError
from lowbit.models import family_of


def size_multiple(pipeline: Any) -> int:
    """Return the number of pixels that height and width must be multiples of; 1 where only the pipeline knows."""
    transformer = getattr(pipeline, "transformer", None)
    family = family_of(type(transformer).__name__)
    scale = getattr(pipeline, "vae_scale_factor", None)
    if family is None or family.latent_patch is None or not isinstance(scale, int):
        return 1
    return scale * family.latent_patch


def check_size(pipeline: Any, height: int | None, width: int | None) -> None:
    """Raise ``ConfigError`` when a side is no multiple of what the pipeline's latents and patches need."""
    multiple = size_multiple(pipeline)
    wrong = {"height": height, "width": width}
    wrong = {name: size for name, size in wrong.items() if size is not None and size % multiple}
    if wrong:
        found = ", ".join(f"{name} {size}" for name, size in wrong.items())
        nearest = ", ".join(
            f"{name} {max(1, round((size or 0) / multiple)) * multiple}" for name, size in wrong.items()
        )
        raise ConfigError(
            f"{type(pipeline).__name__} makes sizes that are multiples of {multiple}, not {found}; try {nearest}"
        )
