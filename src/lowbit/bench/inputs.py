"""What a transformer sees in one denoising step, made at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.errors import ConfigError, UnsupportedError, expected_one_of

PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT = 4
PIXELS_PER_TOKEN = 16  # a latent has 8 pixels along a side, a patch 2 latents


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One step's work.

    Attributes:
        height: of the picture, in pixels, a multiple of 16.
        width: likewise.
        text_tokens: of the prompt.
        batch: pictures at once.
        num_frames: of a video, one more than a multiple of 4; 1 for a picture.
    """

    height: int
    width: int
    text_tokens: int
    batch: int = 1
    num_frames: int = 1

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < PIXELS_PER_TOKEN or value % PIXELS_PER_TOKEN:
                raise ConfigError(f"{name} must be a multiple of {PIXELS_PER_TOKEN} pixels, not {value}")
        if self.batch < 1 or self.text_tokens < 1:
            raise ConfigError(f"batch and text_tokens must be at least 1, not {self.batch} and {self.text_tokens}")
        if self.num_frames < 1 or self.num_frames % FRAMES_PER_LATENT != 1:
            raise ConfigError(f"num_frames must be one more than a multiple of 4, not {self.num_frames}")

    @property
    def latent_frames(self) -> int:
        """Frames of the latents."""
        return 1 + (self.num_frames - 1) // FRAMES_PER_LATENT

    @property
    def patches(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.height // PIXELS_PER_TOKEN, self.width // PIXELS_PER_TOKEN

    @property
    def image_tokens(self) -> int:
        """Tokens of one picture or video."""
        rows, columns = self.patches
        return self.latent_frames * rows * columns


class _Random:
    """Draws normal values on the CPU, so that every device and dtype sees the same."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, device="meta", dtype=self.dtype)
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def full(self, count: int, value: float) -> torch.Tensor:
        return torch.full((count,), value, device=self.device, dtype=self.dtype)


def _latents(workload: Workload) -> tuple[int, int]:
    return workload.height // PIXELS_PER_LATENT, workload.width // PIXELS_PER_LATENT


def _z_image(config: Mapping[str, Any], workload: Workload, random: _Random) -> dict[str, Any]:
    pictures = [random(config["in_channels"], 1, *_latents(workload)) for _ in range(workload.batch)]
    texts = [random(workload.text_tokens, config["cap_feat_dim"]) for _ in range(workload.batch)]
    return {"x": pictures, "t": random.full(workload.batch, 0.5), "cap_feats": texts}


def _qwen_image(config: Mapping[str, Any], workload: Workload, random: _Random) -> dict[str, Any]:
    return {
        "hidden_states": random(workload.batch, workload.image_tokens, config["in_channels"]),
        "encoder_hidden_states": random(workload.batch, workload.text_tokens, config["joint_attention_dim"]),
        "timestep": random.full(workload.batch, 0.5),
        "img_shapes": [[(1, *workload.patches)]] * workload.batch,
    }


def _flux(config: Mapping[str, Any], workload: Workload, random: _Random) -> dict[str, Any]:
    rows, columns = workload.patches
    positions = torch.zeros(rows, columns, 3)
    positions[..., 1] += torch.arange(rows)[:, None]
    positions[..., 2] += torch.arange(columns)[None, :]
    inputs = {
        "hidden_states": random(workload.batch, workload.image_tokens, config["in_channels"]),
        "encoder_hidden_states": random(workload.batch, workload.text_tokens, config["joint_attention_dim"]),
        "pooled_projections": random(workload.batch, config["pooled_projection_dim"]),
        "timestep": random.full(workload.batch, 0.5),
        "img_ids": positions.flatten(0, 1).to(random.device, random.dtype),
        "txt_ids": torch.zeros(workload.text_tokens, 3).to(random.device, random.dtype),
    }
    return {**inputs, "guidance": random.full(workload.batch, 3.5)} if config["guidance_embeds"] else inputs


def _wan(config: Mapping[str, Any], workload: Workload, random: _Random) -> dict[str, Any]:
    latents = (config["in_channels"], workload.latent_frames, *_latents(workload))
    return {
        "hidden_states": random(workload.batch, *latents),
        "encoder_hidden_states": random(workload.batch, workload.text_tokens, config["text_dim"]),
        "timestep": random.full(workload.batch, 500.0),
    }


_MAKERS: Mapping[str, Callable[[Mapping[str, Any], Workload, _Random], dict[str, Any]]] = {
    "ZImageTransformer2DModel": _z_image,
    "QwenImageTransformer2DModel": _qwen_image,
    "FluxTransformer2DModel": _flux,
    "WanTransformer3DModel": _wan,
}
VIDEO_CLASSES = frozenset({"WanTransformer3DModel"})


def step_inputs(model: nn.Module, workload: Workload, dtype: torch.dtype) -> dict[str, Any]:
    """Return keyword arguments for one call of a transformer of diffusers.

    Args:
        model: the transformer; the inputs are made for its device, which may be meta.
        workload: what to make.
        dtype: of the inputs.

    Raises:
        UnsupportedError: nobody wrote down what a model of this class sees.
        ConfigError: several frames for a model of pictures.
    """
    class_name = type(model).__name__
    maker = _MAKERS.get(class_name)
    if maker is None:
        raise UnsupportedError(f"The inputs of {class_name} are not known. {expected_one_of(_MAKERS)}")
    if workload.num_frames > 1 and class_name not in VIDEO_CLASSES:
        raise ConfigError(f"{class_name} makes pictures: num_frames must be 1, not {workload.num_frames}")
    device = next(model.parameters()).device
    return maker(model.config, workload, _Random(device, dtype))  # type: ignore[arg-type]
