"""Bringing the scales of checkpoints to the shapes that the methods hold."""

from __future__ import annotations

import torch


def per_channel_scale(scale: torch.Tensor, out_features: int) -> torch.Tensor:
    """Return a scale as float32 [N, 1] where its shape says so: from [N, 1], [N], [1] or []; else unchanged."""
    if scale.is_floating_point() and scale.dtype != torch.float32:
        scale = scale.float()
    if scale.shape == (out_features,):
        return scale.reshape(out_features, 1)
    if scale.numel() == 1 and out_features != 1:
        return scale.reshape(1, 1).expand(out_features, 1).contiguous()
    return scale.reshape(1, 1) if scale.numel() == 1 else scale


def per_tensor_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return a scale of one element as float32 []; else unchanged."""
    return scale.float().reshape(()) if scale.numel() == 1 else scale
