"""The latent space: principal components of 8x8 patches, evened out.

Fixing the latents first keeps them simple for the transformer, and lets it and the autoencoder
be trained independently of each other, in any order or at once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import to_model

PATCH = 8
CHANNELS = 16
"""Five spatial patterns in three colours each, and one more."""
PICTURES = 1000
"""Pictures that the components are computed from."""


@dataclass(frozen=True)
class Basis:
    """``weight`` (CHANNELS, 3, PATCH, PATCH) and ``bias`` (CHANNELS,) of a strided convolution."""

    weight: Tensor
    bias: Tensor

    def encode(self, pictures: Tensor) -> Tensor:
        """uint8 pictures (N, 3, H, W) to latents (N, CHANNELS, H/8, W/8), float32."""
        parts = [F.conv2d(to_model(part), self.weight, self.bias, stride=PATCH) for part in pictures.split(256)]
        return torch.cat(parts)


def _patches(pictures: Tensor) -> Tensor:
    """uint8 pictures (N, 3, H, W) to float32 patches (M, 3 * PATCH * PATCH)."""
    columns = F.unfold(to_model(pictures), PATCH, stride=PATCH)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def compute_basis(pictures: Tensor) -> Basis:
    """Components of the patches that are not flat, in order of their variance.

    A component is divided by the square root of its deviation over all patches: halfway to
    white, so that edges weigh enough and colours still weigh more. Latents have zero mean in
    each channel and unit variance over all.
    """
    patches = _patches(pictures[:PICTURES]).double()
    lively = patches[patches.var(dim=1) > 1e-4]
    _, vectors = torch.linalg.eigh(torch.cov(lively.T))
    components = vectors.flip(1)[:, :CHANNELS]
    signs = components.gather(0, components.abs().argmax(0, keepdim=True)).sign()
    values = patches @ (components * signs)
    halfway = values.std(dim=0).rsqrt()
    overall = (values * halfway).var(dim=0).mean().rsqrt()
    weight = (components * signs * halfway * overall).T
    bias = -weight @ patches.mean(dim=0)
    return Basis(weight.reshape(CHANNELS, 3, PATCH, PATCH).float(), bias.float())
