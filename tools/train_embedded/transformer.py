"""The transformer and its text encoder, trained together by flow matching on latents."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from transformers import Qwen3Model

from . import text
from .latents import CHANNELS as LATENT_CHANNELS
from .training import SHARDS, Loop, Loss, Modules, Schedule, shard_generator

WIDTH = 288
"""Three times a multiple of 32, so that the feed-forward's 8/3 * WIDTH = 768 suits every format."""
CAPTION_TOKENS = 32
"""ZImageTransformer2DModel pads captions to a multiple of this."""
PATCH = 2
PATCH_KEY = "2-1"


@dataclass(frozen=True)
class FlowPlan:
    """How the transformer is trained; ``dropped`` is the share of captions replaced by "".

    After the first ``steps`` 198 of 200 held-out captions are followed, after ``refine_steps`` more all.

    ``sigma_mean`` and ``sigma_deviation`` are of the logit-normal noise levels; ``uniform_share`` of the levels
    are uniform in (0, 1) instead, ``high_share`` uniform in (0.9, 1). Only there a picture on fixed places does
    not yet tell by itself what it shows, so that the caption is needed, and there sampling begins.
    """

    steps: int = 2400
    batch: int = 32
    rate: float = 1e-3
    refine_steps: int = 1600
    refine_rate: float = 6e-4
    decay: float = 0.995
    dropped: float = 0.06
    uniform_share: float = 0.2
    high_share: float = 0.3
    sigma_mean: float = 0.4
    sigma_deviation: float = 1.1


@dataclass(frozen=True)
class LatentData:
    """Normalized latents (N, 16, H, W) with their captions' ids and mask, both (N, L)."""

    latents: Tensor
    ids: Tensor
    mask: Tensor
    empty_ids: Tensor
    empty_mask: Tensor


def build_transformer() -> ZImageTransformer2DModel:
    """An untrained transformer of about nine million parameters."""
    return ZImageTransformer2DModel(
        all_patch_size=(PATCH,),
        all_f_patch_size=(1,),
        in_channels=LATENT_CHANNELS,
        dim=WIDTH,
        n_layers=5,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=text.WIDTH,
        axes_dims=[8, 20, 20],
        axes_lens=[640, 64, 64],
    )


def initialize(transformer: ZImageTransformer2DModel) -> None:
    """Start every block as the identity and the output at zero, as is usual for AdaLN."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 2 and "pad_token" not in name:
                torch.nn.init.xavier_uniform_(parameter)
            elif name.endswith(".bias"):
                parameter.zero_()
            if "adaLN_modulation" in name:
                parameter.zero_()
        for block in [*transformer.noise_refiner, *transformer.layers]:
            gates = block.adaLN_modulation[0].bias.view(4, -1)
            gates[1].fill_(0.3)
            gates[3].fill_(0.3)
        transformer.all_final_layer[PATCH_KEY].linear.weight.zero_()
        transformer.cap_pad_token.normal_(std=0.02)
        transformer.x_pad_token.normal_(std=0.02)


class RealRotation:
    """The stock attention processor, its rotation in real numbers, which compilers can fuse.

    ``freqs_cis`` is the pair (cosines, sines), each (1, tokens, 1, head_dim / 2).
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Self-attention over (B, tokens, WIDTH) without a mask."""
        assert freqs_cis is not None
        assert attention_mask is None
        shape = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, shape))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, shape))
        value = attn.to_v(hidden_states).unflatten(-1, shape)
        query, key = (_rotate(tensor, *freqs_cis).transpose(1, 2) for tensor in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value.transpose(1, 2))
        result: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2, 3))
        return result


def _rotate(tensor: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last dimension."""
    even, odd = tensor.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = (even * cosines - odd * sines, even * sines + odd * cosines)
    return torch.stack(pairs, dim=-1).flatten(-2)


def prepare(modules: Modules) -> None:
    """Make the blocks compilable, and compile them where PyTorch can on this machine."""
    transformer = modules["transformer"]
    assert isinstance(transformer, ZImageTransformer2DModel)
    torch._inductor.config.cpp.threads = 1  # the loop's shards are the threads
    for block in _blocks(transformer):
        attention: Any = block.attention
        attention.set_processor(RealRotation())
        if shutil.which("c++") or shutil.which("g++"):
            block.compile(dynamic=False)


def _blocks(model: ZImageTransformer2DModel) -> list[torch.nn.Module]:
    return [*model.noise_refiner, *model.context_refiner, *model.layers]


def _rotation(model: ZImageTransformer2DModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for ``RealRotation`` at position ids (tokens, 3)."""
    angles = model.rope_embedder(ids)[None, :, None]
    return angles.real.contiguous(), angles.imag.contiguous()


def _positions(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Position ids (frame, row, column) of image and caption tokens, as the model gives them."""
    caption = torch.zeros((CAPTION_TOKENS, 3), dtype=torch.int64)
    caption[:, 0] = torch.arange(1, CAPTION_TOKENS + 1)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frame = torch.full_like(rows, CAPTION_TOKENS + 1)
    return torch.stack([frame, rows, columns], dim=-1).reshape(-1, 3), caption


def _patchify(latents: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H/2 * W/2, 4 * C)."""
    batch, channels, height, width = latents.shape
    tiles = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, PATCH * PATCH * channels)


def _unpatchify(patches: Tensor, height: int, width: int) -> Tensor:
    """(B, H/2 * W/2, 4 * C) to (B, C, H, W)."""
    rows, columns = height // PATCH, width // PATCH
    tiles = patches.view(len(patches), rows, columns, PATCH, PATCH, -1)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height, width)


def forward_batch(
    model: ZImageTransformer2DModel, latents: Tensor, time: Tensor, features: Tensor, mask: Tensor
) -> Tensor:
    """The model's own forward for equal shapes, without its lists: same result, less overhead.

    The blocks must have been through ``prepare``. latents (B, C, H, W); time (B,), 1 at the
    clean end; features (B, L, D) with L <= 32; mask (B, L), true on tokens. Returns
    (B, C, H, W).
    """
    height, width = latents.shape[-2:]
    image_ids, caption_ids = _positions(height // PATCH, width // PATCH)
    image_rope = _rotation(model, image_ids.to(latents.device))
    caption_rope = _rotation(model, caption_ids.to(latents.device))
    condition = model.t_embedder(time * model.t_scale)
    image = model.all_x_embedder[PATCH_KEY](_patchify(latents))
    for layer in model.noise_refiner:
        image = layer(image, None, image_rope, condition)
    spare = CAPTION_TOKENS - features.shape[1]
    caption = F.pad(model.cap_embedder(features), (0, 0, 0, spare))
    present = F.pad(mask.bool(), (0, spare)).unsqueeze(-1)
    caption = torch.where(present, caption, model.cap_pad_token)
    for layer in model.context_refiner:
        caption = layer(caption, None, caption_rope)
    tokens = torch.cat([image, caption], dim=1)
    rope = tuple(torch.cat(pair, dim=1) for pair in zip(image_rope, caption_rope, strict=True))
    for layer in model.layers:
        tokens = layer(tokens, None, rope, condition)
    patches = model.all_final_layer[PATCH_KEY](tokens[:, : image.shape[1]], c=condition)
    return _unpatchify(patches, height, width)


def _sigmas(plan: FlowPlan, count: int, generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1) as the plan distributes them."""
    normal = torch.randn(count, generator=generator) * plan.sigma_deviation + plan.sigma_mean
    uniform = torch.rand(count, generator=generator)
    pick = torch.rand(count, generator=generator)
    levels = torch.where(pick < plan.uniform_share, uniform, normal.sigmoid())
    return torch.where(pick > 1 - plan.high_share, 1 - 0.1 * uniform, levels)


def flow_loss(
    modules: Modules, data: LatentData, plan: FlowPlan, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Mean squared error of the velocity towards the clean latents, on one shard's batch."""
    model, encoder = modules["transformer"], modules["text_encoder"]
    assert isinstance(model, ZImageTransformer2DModel)
    assert isinstance(encoder, Qwen3Model)
    device, count = model.device, plan.batch // SHARDS
    which = torch.randint(len(data.latents), (count,), generator=generator)
    drop = torch.rand(count, generator=generator) < plan.dropped
    noise = torch.randn((count, *data.latents.shape[1:]), generator=generator).to(device)
    sigma = _sigmas(plan, count, generator).to(device)
    ids = torch.where(drop[:, None], data.empty_ids, data.ids[which]).to(device)
    mask = torch.where(drop[:, None], data.empty_mask, data.mask[which]).to(device)
    clean = data.latents[which].float().to(device)
    level = sigma.view(-1, 1, 1, 1)
    noisy = torch.lerp(clean, noise, level)
    features = text.encode_text(encoder, ids, mask)
    predicted = forward_batch(model, noisy, 1.0 - sigma, features, mask)
    loss = F.mse_loss(predicted, clean - noise)
    return loss, {"loss": loss.item()}


def make_loop(path: Path, seed: int, plan: FlowPlan, device: torch.device) -> Loop:
    """Build both models, on ``device``, with their loop resumed from ``path`` where it exists."""
    torch.manual_seed(seed)
    transformer, encoder = build_transformer(), text.build_text_encoder()
    initialize(transformer)
    modules = {"transformer": transformer.to(device), "text_encoder": encoder.to(device)}
    schedule = Schedule(plan.steps, plan.rate, plan.refine_steps, plan.refine_rate, warmup=200, decay=plan.decay)
    loop = Loop(modules, schedule, path)
    loop.prepare = prepare
    loop.resume()
    return loop


def make_loss(data: LatentData, plan: FlowPlan, seed: int) -> Loss:
    """The loss for ``Loop.run``; all its randomness comes from the seed, the step, the shard."""

    def loss(modules: Modules, step: int, shard: int) -> tuple[Tensor, dict[str, float]]:
        return flow_loss(modules, data, plan, shard_generator(seed + 1, step, shard))

    return loss
