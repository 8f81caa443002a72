"""Small models for the tests."""

from __future__ import annotations

import torch
from diffusers import ZImageTransformer2DModel


def small_transformer(dtype: torch.dtype = torch.bfloat16) -> ZImageTransformer2DModel:
    """Return a random Z-Image transformer of 2 layers and width 128."""
    torch.manual_seed(1)
    model = ZImageTransformer2DModel(
        in_channels=16,
        dim=128,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=64,
        axes_dims=[8, 12, 12],
        axes_lens=[128, 64, 64],
    )
    return model.to(dtype).eval()


def run_transformer(model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Run one step on fixed inputs; returns [16, 1, 8, 8] in float32."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(16, 1, 8, 8, generator=generator).to(dtype)
    caption = torch.randn(9, 64, generator=generator).to(dtype)
    with torch.no_grad():
        return model([latents], torch.tensor([0.5]), [caption], return_dict=False)[0][0].float()
