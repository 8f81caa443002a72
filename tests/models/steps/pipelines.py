"""Small random pipelines of the families that have step adapters."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from tests.support.models import language_model, z_image

WORDS = ("a", "red", "blue", "star", "circle", "of", "small", "large", "blur", "user")
CHAT = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }}{% endfor %}"


def tokenizer(length: int = 64) -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, "[PAD]": 1, **{word: index + 2 for index, word in enumerate(WORDS)}}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=built, unk_token="[UNK]", pad_token="[PAD]", model_max_length=length, padding_side="right"
    )
    made.chat_template = CHAT
    return made


def scheduler(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)


def image_autoencoder(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=channels,
        scaling_factor=0.36,
        shift_factor=0.12,
    )


def z_image_pipeline() -> Any:
    return ZImagePipeline(
        scheduler=scheduler(),
        vae=image_autoencoder(16),
        text_encoder=language_model(hidden_size=32).model,
        tokenizer=tokenizer(),
        transformer=z_image(),
    )


def qwen_image_pipeline(guidance_embeds: bool = False) -> Any:
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
        "fullatt_block_indexes": [0], "window_size": 16,
    }  # fmt: skip
    pipeline = QwenImagePipeline(
        scheduler=scheduler(shift_terminal=0.02),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 2.5, 0.7, 1.1],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer(),
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 12, 12),
            guidance_embeds=guidance_embeds,
        ),
    )
    pipeline.prompt_template_encode_start_idx = 20
    return pipeline


def flux_pipeline(guidance_embeds: bool = True) -> Any:
    clip = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    t5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return FluxPipeline(
        scheduler=scheduler(),
        vae=image_autoencoder(4),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer(16),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer(64),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(8, 12, 12),
            guidance_embeds=guidance_embeds,
        ),
    )


MAKERS = {
    "z-image": z_image_pipeline,
    "qwen-image": qwen_image_pipeline,
    "qwen-image-distilled": lambda: qwen_image_pipeline(True),
    "flux": flux_pipeline,
    "flux-undistilled": lambda: flux_pipeline(False),
}


def make(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A pipeline of the family with random weights of a size that shows every error."""
    torch.manual_seed(0)
    maker: Any = MAKERS[name]
    pipeline = maker()
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipeline.to(dtype)
