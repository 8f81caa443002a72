"""Which picture sizes a pipeline can make, and a device's memory hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from lowbit.errors import ConfigError
from lowbit.models import family_of
from lowbit.models.positions import hidden_width, position_limits

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_SIDES = ("height", "width")


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


def check_limits(pipeline: Any, arguments: Mapping[str, Any], device: torch.device) -> None:
    """Raise ``ConfigError`` for sizes past the model's positions, or that the device's memory can't hold.

    Args:
        pipeline: of diffusers.
        arguments: of its ``__call__``; a side that is not given is the model's own and always fits.
        device: it computes on.
    """
    transformer = getattr(pipeline, "transformer", None)
    if isinstance(transformer, torch.nn.Module):
        _check_positions(pipeline, transformer, arguments)
    _check_memory(pipeline, transformer, arguments, total_memory(device))


def _check_positions(pipeline: Any, transformer: Any, arguments: Mapping[str, Any]) -> None:
    limits = position_limits(transformer, int(arguments.get("max_sequence_length") or 512))
    steps = dict.fromkeys(_SIDES, pixels_per_token(pipeline)) | {"num_frames": frames_per_token(pipeline)}
    for name, limit in limits.items():
        size, step = arguments.get(name), steps[name]
        most = limit * step if name in _SIDES else (limit - 1) * step + 1
        if size is not None and size > most:
            raise ConfigError(
                f"{name} {size}: {type(transformer).__name__} has positions for {limit} tokens along it, which is"
                f" {name} {most} at most"
            )


def _check_memory(pipeline: Any, transformer: Any, arguments: Mapping[str, Any], total: int) -> None:
    height, width = (arguments.get(name) for name in _SIDES)
    count = int(arguments.get("num_images_per_prompt") or arguments.get("num_videos_per_prompt") or 1)
    frames = int(arguments.get("num_frames") or 1)
    side = pixels_per_token(pipeline)  # a side that is not given: at least one token
    need = count * least_bytes(pipeline, transformer, height or side, width or side, frames)
    if need <= total:
        return
    asked = {
        "height": height,
        "width": width,
        "num_frames": arguments.get("num_frames"),
        "num_outputs_per_prompt": count if count > 1 else None,
    }
    named = ", ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
    raise ConfigError(
        f"{named}: needs at least {need / 1e9:,.1f} GB of memory, of which there are {total / 1e9:,.1f} GB. Divide the"
        f" number of pixels by {math.ceil(need / total)} or more"
    )


def least_bytes(pipeline: Any, transformer: Any, height: int, width: int, frames: int) -> int:
    """Return bytes that a picture or video takes at least, beside the weights: the larger of two moments.

    A block of the transformer holds hidden states, query, key and value; the autoencoder's last layer without tiling
    holds its input and its output; the finished pixels are float32.
    """
    side, time = pixels_per_token(pipeline), frames_per_token(pipeline)
    tokens = math.ceil(height / side) * math.ceil(width / side) * math.ceil(frames / time)
    itemsize = getattr(transformer, "dtype", torch.bfloat16).itemsize
    hidden = 4 * tokens * (hidden_width(transformer) if isinstance(transformer, torch.nn.Module) else 0) * itemsize
    pixels = 4 * 3 * height * width * frames
    autoencoder = getattr(pipeline, "vae", None)
    channels = getattr(getattr(autoencoder, "config", None), "block_out_channels", None)
    if autoencoder is not None and channels and frames == 1 and not getattr(autoencoder, "use_tiling", False):
        pixels = max(pixels, 2 * int(channels[0]) * height * width * autoencoder.dtype.itemsize)
    return max(hidden, pixels)


def pixels_per_token(pipeline: Any) -> int:
    """Return the pixels along a token's side, 1 where only the pipeline knows."""
    multiple = size_multiple(pipeline)
    if multiple > 1:
        return multiple
    scale = getattr(pipeline, "vae_scale_factor_spatial", None) or getattr(pipeline, "vae_scale_factor", None)
    config = getattr(getattr(pipeline, "transformer", None), "config", {})
    patch = config.get("patch_size")
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    return scale * patch if isinstance(scale, int) and isinstance(patch, int) else 1


def frames_per_token(pipeline: Any) -> int:
    """Return the frames of a video that a latent frame stands for, 1 where only the pipeline knows."""
    scale = getattr(pipeline, "vae_scale_factor_temporal", None)
    return scale if isinstance(scale, int) else 1


def total_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory, on a CPU the machine's or the container's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    total = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):  # "max": no limit
        total = min(total, int(_CONTAINER_LIMIT.read_text()))
    return total
