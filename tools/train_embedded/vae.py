"""The autoencoder: 128x128 pictures to 16 latent channels at an eighth of the resolution."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from .data import to_model
from .drawing import CANVAS
from .training import SHARDS, Loop, Modules, Schedule, shard_generator

CHANNELS = (16, 32, 64, 64)
LATENT_CHANNELS = 16


@dataclass(frozen=True)
class VaePlan:
    """Two phases: crops, which hold more edges per pixel, then whole pictures.

    Whole pictures come last because group normalization sees the picture's statistics.
    """

    crop_steps: int = 2000
    crop_batch: int = 10
    crop_size: int = 64
    whole_steps: int = 800
    whole_batch: int = 4
    rate: float = 1.5e-3
    kl_weight: float = 3e-4
    latent_noise: float = 0.15
    edge_weight: float = 6.0

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.crop_steps + self.whole_steps


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder of about a million parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=CANVAS,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )


def edge_map(pictures: Tensor) -> Tensor:
    """1.0 where a pixel's 3x3 surroundings are not of one colour: (B, 3, H, W) to (B, 1, H, W)."""
    high = F.max_pool2d(pictures, 3, stride=1, padding=1)
    low = -F.max_pool2d(-pictures, 3, stride=1, padding=1)
    return ((high - low).amax(dim=1, keepdim=True) > 0.05).float()


def _crops(pictures: Tensor, size: int, count: int, generator: torch.Generator) -> Tensor:
    """Random crops; of four candidates for each, the one with the most edges is kept."""
    candidates = 4
    which = torch.randint(len(pictures), (count,), generator=generator).tolist()
    room = pictures.shape[-1] - size + 1
    corners = torch.randint(room, (count, candidates, 2), generator=generator).tolist()
    chosen = []
    for index, options in zip(which, corners, strict=True):
        crops = torch.stack([pictures[index, :, y : y + size, x : x + size] for y, x in options])
        crops = to_model(crops)
        chosen.append(crops[edge_map(crops).mean(dim=(1, 2, 3)).argmax()])
    return torch.stack(chosen)


def _batch(pictures: Tensor, plan: VaePlan, step: int, generator: torch.Generator) -> Tensor:
    if step < plan.crop_steps:
        return _crops(pictures, plan.crop_size, plan.crop_batch // SHARDS, generator)
    which = torch.randint(len(pictures), (plan.whole_batch // SHARDS,), generator=generator)
    return to_model(pictures[which])


def vae_loss(
    vae: AutoencoderKL, batch: Tensor, plan: VaePlan, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Reconstruction error, heavier on edges, plus the weighted KL term (mean per latent)."""
    posterior = vae.encode(batch).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(batch.device)
    extra = torch.rand((len(batch), 1, 1, 1), generator=generator).to(batch.device)
    deviation = (posterior.var + (extra * plan.latent_noise) ** 2).sqrt()
    decoded = vae.decode(posterior.mean + deviation * noise).sample
    error = decoded - batch
    weight = 1.0 + plan.edge_weight * edge_map(batch)
    pixels = ((error.abs() + error.square()) * weight).mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    psnr = -10 * (error.detach().square().mean() / 4).log10()
    return pixels + plan.kl_weight * kl, {"psnr": psnr.item(), "kl": kl.item()}


def train_vae(
    pictures: Tensor, path: Path, seed: int, plan: VaePlan, device: torch.device
) -> AutoencoderKL:
    """Train, or continue from the checkpoint at ``path``; returns the averaged weights."""
    torch.manual_seed(seed)
    vae = build_vae().to(device=device, memory_format=torch.channels_last)
    loop = Loop({"vae": vae}, Schedule(plan.steps, plan.rate, decay=0.997), path)
    loop.resume()

    def loss(modules: Modules, step: int, shard: int) -> tuple[Tensor, dict[str, float]]:
        generator = shard_generator(seed, step, shard)
        batch = _batch(pictures, plan, step, generator).to(device)
        return vae_loss(
            modules["vae"], batch.to(memory_format=torch.channels_last), plan, generator
        )

    loop.run(loss)
    loop.average.swap()
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, batch: int = 32) -> Tensor:
    """Means of the latents before normalization: (N, 3, H, W) uint8 to (N, 16, H/8, W/8)."""
    device = next(vae.parameters()).device
    means = []
    for part in tqdm(pictures.split(batch), mininterval=5.0, desc="encoding"):
        scaled = to_model(part).to(device=device, memory_format=torch.channels_last)
        means.append(vae.encode(scaled).latent_dist.mean.contiguous().cpu())
    return torch.cat(means)


def set_normalization(vae: AutoencoderKL, latents: Tensor) -> None:
    """Record shift and scale in the config so that normalized latents have unit variance."""
    shift = latents.mean().item()
    scale = 1.0 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)


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
