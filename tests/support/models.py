"""Small random models of the families, and what tests do with them."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lowbit.quantization import Fp8Config, Int8Config, QuantizationConfig, build_quant_config, quantize_model
from lowbit.quantization.calibration.smoothing import watched_inputs
from lowbit.quantization.calibration.static import calibration
from tests.support.kernels import skip_if_refused


@dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    # One layer that takes the method, one that is kept.
    quantized: str
    kept: str
    # How many whose weights alone are quantized.
    weight_only: int = 0

    def run(self, model: Any) -> torch.Tensor:
        torch.manual_seed(7)
        with torch.no_grad():
            output = model(**self.inputs(model.dtype), return_dict=False)[0]
        return output[0] if isinstance(output, list) else output


def z_image() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 12, 12],
        axes_lens=[64, 32, 32],
    )


def z_image_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": [torch.randn(16, 1, 8, 8, dtype=dtype)],
        "t": torch.tensor([0.5], dtype=dtype),
        "cap_feats": [torch.randn(7, 32, dtype=dtype)],
    }


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )


def flux_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 8, 32, dtype=dtype),
        "pooled_projections": torch.randn(1, 32, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": torch.zeros(16, 3, dtype=dtype),
        "txt_ids": torch.zeros(8, 3, dtype=dtype),
    }


def qwen_image() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 12, 12),
    )


def qwen_image_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 8, 32, dtype=dtype),
        "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.long),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_shapes": [(1, 4, 4)],
    }


def wan() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=128,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


def wan_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, 32, dtype=dtype),
    }


FAMILIES = {
    "z-image": Family(z_image, z_image_inputs, "layers.0.attention.to_q", "layers.0.adaLN_modulation.0"),
    "flux": Family(flux, flux_inputs, "transformer_blocks.0.attn.to_q", "norm_out.linear", 3),
    "qwen-image": Family(qwen_image, qwen_image_inputs, "transformer_blocks.0.img_mlp.net.2", "norm_out.linear", 4),
    "wan": Family(wan, wan_inputs, "blocks.0.ffn.net.2", "condition_embedder.time_proj"),
}

CONFIGS = {
    "int8": Int8Config(),
    "int8-reference": Int8Config(kernel="reference"),
    "fp8": Fp8Config(),
    "fp8-reference": Fp8Config(kernel="reference"),
    "fp8-block": Fp8Config(weight_block_size=[128, 128]),
}

# Every method with the options that change what a layer holds or computes.
METHODS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "int8-onednn": {"method": "int8", "kernel": "onednn"},
    "int8-reference": {"method": "int8", "kernel": "reference"},
    "int8-smoothing-rotation": {"method": "int8", "smoothing": 0.5, "rotation": 16, "kernel": "reference"},
    "fp8": {"method": "fp8"},
    "fp8-reference": {"method": "fp8", "kernel": "reference"},
    "fp8-static": {"method": "fp8", "activation_scheme": "static", "kernel": "reference"},
    "fp8-block": {"method": "fp8", "weight_block_size": [32, 32]},
    "fp8-rotation": {"method": "fp8", "rotation": 16, "kernel": "reference"},
    "mxfp8": {"method": "mxfp8"},
    "mxfp8-reference": {"method": "mxfp8", "kernel": "reference"},
    "mxfp4": {"method": "mxfp4"},
    "mxfp4-rotation": {"method": "mxfp4", "rotation": 16, "kernel": "reference"},
    "mxfp4_dualscale": {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0, "kernel": "reference"},
    "nvfp4": {"method": "nvfp4"},
    "nvfp4-smoothing": {"method": "nvfp4", "smoothing": 0.5, "kernel": "reference"},
    "nvfp4-weight_only": {"method": "nvfp4", "weight_only": True},
    "gguf-Q8_0": {"method": "gguf", "gguf_type": "Q8_0"},
    "gguf-Q4_0": {"method": "gguf", "gguf_type": "Q4_0"},
    "auto-round": {"method": "auto-round", "group_size": 32},
    "auto-round-asymmetric": {"method": "auto-round", "group_size": 32, "sym": False, "bits": 8},
    "svdquant-nvfp4": {"method": "svdquant", "rank": 8},
    "svdquant-int4": {"method": "svdquant", "rank": 8, "precision": "int4"},
    "svdquant-smoothing": {"method": "svdquant", "rank": 8, "smoothing": 0.5, "kernel": "reference"},
    "modelopt-FP8": {"method": "modelopt", "quant_algo": "FP8", "kernel": "reference"},
    "modelopt-NVFP4": {"method": "modelopt", "quant_algo": "NVFP4"},
    "modelopt-MXFP8": {"method": "modelopt", "quant_algo": "MXFP8"},
    "comfyui": {"method": "comfyui"},
}
# Those whose activations have one scale, found beforehand.
STATIC = ("fp8-static", "modelopt-FP8", "modelopt-NVFP4")


def quantized_model(family: Family, method: str) -> Any:
    """A small model of the family, in BF16, quantized in memory with a method of ``METHODS``; skips what can't run."""
    skip_if_refused(METHODS[method])
    return copy.deepcopy(_quantized_model(family, method))


@functools.cache
def _quantized_model(family: Family, method: str) -> Any:
    torch.manual_seed(0)
    model = family.make().to(torch.bfloat16).eval().requires_grad_(False)
    config = build_quant_config(METHODS[method])
    assert isinstance(config, QuantizationConfig)
    seen = None
    if config.needs_calibration:
        with watched_inputs(model) as seen:
            family.run(model)
    quantize_model(model, config, seen_inputs=seen)
    if method in STATIC:
        with calibration(model):
            family.run(model)
    return model


def save(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def language_model(kind: str = "qwen3", **options: Any) -> Qwen3ForCausalLM | LlamaForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        **options,
    }
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**settings)).eval()
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def save_pipeline(folder: Path) -> Path:
    """Write a small Z-Image pipeline with random weights in BF16."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(latent_channels=16, block_out_channels=(32,), norm_num_groups=32),
        text_encoder=language_model(hidden_size=32).model,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]"),
        transformer=z_image(),
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def stored_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def same_bytes(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Whether two state dicts hold the same tensors, to the bit and whatever their dtypes."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
        for name, tensor in expected.items()
    )


def same_but_for_order(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether results are the same but for the order in which torch adds.

    In float32 and for one row it depends on the address of the weight (MKL on CPUs of AMD), which mapping changes.
    """
    return relative_error(found, expected) < 1e-4


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())
