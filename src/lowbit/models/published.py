"""Diffusion transformers in their published shapes, as data: to measure or plan with before any download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedTransformer:
    """A transformer's configuration.

    Attributes:
        name: as the user types it.
        class_name: of the transformer in diffusers.
        config: what its constructor takes, where it differs from the constructor's defaults or sets the shape.
        depth: the keys of ``config`` that count blocks, the main list first.
        text_tokens: of a prompt: those the pipeline pads to, or about a sentence where it doesn't pad.
        num_frames: of a picture or video as the model makes it.
        source: where the configuration is published.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    depth: tuple[str, ...]
    text_tokens: int
    source: str
    num_frames: int = 1

    def with_layers(self, layers: int | None) -> dict[str, Any]:
        """Return the configuration with the main list cut to ``layers`` blocks and the others in proportion.

        Args:
            layers: blocks of the main list, at most the published number; ``None`` leaves all as published.
        """
        if layers is None:
            return dict(self.config)
        published = self.config[self.depth[0]]
        share = min(1.0, layers / published)
        return {**self.config, **{key: max(1, round(share * self.config[key])) for key in self.depth}}


PUBLISHED: tuple[PublishedTransformer, ...] = (
    PublishedTransformer(
        "z-image",
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "cap_feat_dim": 2560,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
        },
        depth=("n_layers", "n_refiner_layers"),
        text_tokens=64,
        source="Tongyi-MAI/Z-Image-Turbo",
    ),
    PublishedTransformer(
        "qwen-image",
        "QwenImageTransformer2DModel",
        {
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "in_channels": 64,
            "out_channels": 16,
        },
        depth=("num_layers",),
        text_tokens=64,
        source="Qwen/Qwen-Image",
    ),
    PublishedTransformer(
        "flux",
        "FluxTransformer2DModel",
        {
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "in_channels": 64,
            "guidance_embeds": True,
        },
        depth=("num_layers", "num_single_layers"),
        text_tokens=512,
        source="black-forest-labs/FLUX.1-dev",
    ),
    PublishedTransformer(
        "wan",
        "WanTransformer3DModel",
        {
            "num_layers": 40,
            "num_attention_heads": 40,
            "attention_head_dim": 128,
            "ffn_dim": 13824,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 4096,
        },
        depth=("num_layers",),
        text_tokens=512,
        source="Wan-AI/Wan2.2-T2V-A14B-Diffusers, one of its two transformers",
        num_frames=81,
    ),
)


def published_transformer(name: str) -> PublishedTransformer | None:
    """Return the transformer that the user calls ``name``, or ``None``; case and ``_`` for ``-`` don't matter."""
    wanted = name.lower().replace("_", "-")
    return next((entry for entry in PUBLISHED if entry.name == wanted), None)
