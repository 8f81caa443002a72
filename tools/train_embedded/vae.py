"""The autoencoder: 128x128 pictures to 16 latent channels at an eighth of the resolution."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._inductor.config
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .data import to_model
from .drawing import CANVAS
from .latents import CHANNELS as LATENT_CHANNELS
from .latents import Basis
from .training import SHARDS, Loop, Loss, Modules, Schedule, shard_generator

CHANNELS = (16, 32, 64, 64)
NORM_GROUPS = 1
"""Few groups: normalization in small groups would hide a plain background's absolute colour."""


@dataclass(frozen=True)
class VaePlan:
    """How the autoencoder is trained, on whole pictures; ``latent_noise`` is in latent units.

    Every ``encoder_every``-th step trains the encoder too: a linear map, it needs little. The ``refine_steps`` after
    ``steps`` are on pictures of captions too: crowds have few large objects, whose fills stay uneven.
    """

    steps: int = 6500
    batch: int = 4
    encoder_every: int = 4
    rate: float = 2e-3
    refine_steps: int = 2500
    refine_rate: float = 1e-3
    decay: float = 0.996
    latent_noise: float = 0.1
    edge_weight: float = 6.0
    encoder_weight: float = 0.2


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder of about a million parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=NORM_GROUPS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=CANVAS,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )


def edge_weight(pictures: Tensor) -> Tensor:
    """How much outlines weigh: (B, 3, H, W) in [-1, 1] to (B, 1, H, W).

    Zero more than two pixels from an outline; else one over the square root of its contrast, the
    distance in RGB across it, so that outlines between close colours become no softer.
    """
    high = F.max_pool2d(pictures, 3, stride=1, padding=1)
    low = -F.max_pool2d(-pictures, 3, stride=1, padding=1)
    contrast = (high - low).square().sum(dim=1, keepdim=True).sqrt()
    weight = (contrast > 0.05).float() * contrast.clamp_min(0.3).rsqrt()
    return F.max_pool2d(weight, 3, stride=1, padding=1)


def decoder_loss(
    vae: AutoencoderKL, batch: Tensor, latents: Tensor, plan: VaePlan, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Error of pictures decoded from noisy latents, heavier on edges."""
    noise = torch.randn(latents.shape, generator=generator).to(batch.device)
    level = plan.latent_noise * torch.rand((len(batch), 1, 1, 1), generator=generator)
    error = vae.decode(latents + level.to(batch.device) * noise).sample - batch
    weight = 1.0 + plan.edge_weight * edge_weight(batch)
    psnr = -10 * (error.detach().square().mean() / 4).log10()
    return ((error.abs() + error.square()) * weight).mean(), {"psnr": psnr.item()}


def prepare(modules: Modules) -> None:
    """Compile the decoder where PyTorch can on this machine."""
    torch._inductor.config.cpp.threads = 1  # the loop's shards are the threads
    vae = modules["vae"]
    assert isinstance(vae, AutoencoderKL)
    if shutil.which("c++") or shutil.which("g++"):
        vae.decoder.compile(dynamic=False)


def make_vae_loop(path: Path, seed: int, plan: VaePlan, device: torch.device) -> Loop:
    """Build the autoencoder with its loop, resumed from ``path`` where it exists."""
    torch.manual_seed(seed)
    vae = build_vae().to(device=device, memory_format=torch.channels_last)
    schedule = Schedule(plan.steps, plan.rate, plan.refine_steps, plan.refine_rate, decay=plan.decay)
    loop = Loop({"vae": vae}, schedule, path)
    loop.prepare = prepare
    loop.resume()
    return loop


def make_vae_loss(
    crowds: Tensor, refining: Tensor, basis: Basis, plan: VaePlan, seed: int, device: torch.device
) -> Loss:
    """The loss for ``Loop.run``: on ``crowds`` at first, on ``refining`` in the last steps.

    Its randomness comes from the seed, the step, the shard.
    """

    def loss(modules: Modules, step: int, shard: int) -> tuple[Tensor, dict[str, float]]:
        generator = shard_generator(seed, step, shard)
        pictures = crowds if step < plan.steps else refining
        which = torch.randint(len(pictures), (plan.batch // SHARDS,), generator=generator)
        latents = basis.encode(pictures[which]).to(device)
        batch = to_model(pictures[which]).to(device, memory_format=torch.channels_last)
        vae = modules["vae"]
        assert isinstance(vae, AutoencoderKL)
        value, shown = decoder_loss(vae, batch, latents, plan, generator)
        if step % plan.encoder_every == 0:
            encoded = vae.encode(batch).latent_dist.mean
            value = value + plan.encoder_weight * (encoded - latents).square().mean()
        return value, shown

    return loss


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean PSNR in dB over uint8 pictures (N, 3, H, W), through the rounded 8-bit output."""
    values = []
    for part in pictures.split(16):
        latents = vae.encode(to_model(part).to(vae.dtype)).latent_dist.mean
        decoded = vae.decode(latents).sample.float()
        rounded = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
        squared = (rounded - part.float()).square().mean(dim=(1, 2, 3)).clamp_min(1e-2)
        values.append(10 * (255.0**2 / squared).log10())
    return torch.cat(values).mean().item()
