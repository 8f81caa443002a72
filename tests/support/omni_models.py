"""Small random models of transformers with experts: Qwen3-MoE, and Qwen3-Omni with all its stages."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
)

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}


def qwen3_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT)).eval()


def qwen3_omni_config() -> Qwen3OmniMoeConfig:
    audio = {
        "num_mel_bins": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "d_model": 64,
        "output_dim": 64,
        "downsample_hidden_size": 16,
    }
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    code_predictor = {**{k: v for k, v in TEXT.items() if "experts" not in k and "moe" not in k}, "num_code_groups": 4}
    tokens = {"audio_token_id": 100, "image_token_id": 101, "video_token_id": 102, "audio_start_token_id": 103}
    tokens["vision_start_token_id"] = 104  # the published configuration has it, the class has no default
    talker = {
        "text_config": {**TEXT, **_MROPE, "shared_expert_intermediate_size": 32},
        "code_predictor_config": code_predictor,
        "num_code_groups": 4,
        "thinker_hidden_size": 64,
        "accept_hidden_layer": 1,
        "spatial_merge_size": 2,
        **tokens,
    }
    code2wav = {
        "codebook_size": 128,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_quantizers": 4,
        "upsample_rates": [2, 2],
        "upsampling_ratios": [2],
        "decoder_dim": 64,
    }
    thinker = {"audio_config": audio, "vision_config": vision, "text_config": {**TEXT, **_MROPE}, **tokens}
    return Qwen3OmniMoeConfig(thinker_config=thinker, talker_config=talker, code2wav_config=code2wav)


def qwen3_omni() -> Qwen3OmniMoeForConditionalGeneration:
    torch.manual_seed(0)
    return Qwen3OmniMoeForConditionalGeneration(qwen3_omni_config()).eval()
