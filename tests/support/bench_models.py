"""The families' transformers, small enough for tests."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "ZImageTransformer2DModel": {
        "in_channels": 4,
        "dim": 96,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": 48,
        "axes_dims": [8, 12, 12],
        "axes_lens": [64, 32, 32],
    },
    "QwenImageTransformer2DModel": {
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "in_channels": 16,
        "out_channels": 4,
        "axes_dims_rope": (8, 12, 12),
    },
    "FluxTransformer2DModel": {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 40,
        "in_channels": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (8, 12, 12),
    },
    "WanTransformer3DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "ffn_dim": 128,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 48,
    },
}
