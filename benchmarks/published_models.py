"""Four published models, as their configurations describe them: what the GPU benchmark and the memory plan compute on.

Configurations are those of the repositories' ``config.json``: Qwen/Qwen-Image, Tongyi-MAI/Z-Image-Turbo,
black-forest-labs/FLUX.1-dev and Wan-AI/Wan2.2-T2V-A14B-Diffusers. The transformers' are in
``lowbit.models.published``; of the rest diffusers 0.42 has them as its classes' defaults, but for what is given here.
The text encoders are those of Qwen2.5-VL-7B-Instruct, Qwen3-4B, T5 v1.1 XXL with CLIP ViT-L/14, and UMT5-XXL. Nothing
is downloaded: every model is built on the meta device.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.models.patterns import matches_any
from lowbit.models.published import published_transformer
from lowbit.quantization.plan import plan_layers

IMAGE_TOKENS = 4096
"""Of a picture of 1024x1024 pixels: latents of 128x128 in patches of 2x2; of Wan, one frame of latents."""


@dataclass(frozen=True)
class Component:
    """A component of a pipeline.

    Attributes:
        library: ``"diffusers"`` or ``"transformers"``.
        class_name: of the model.
        config: what differs from the class's defaults.
        config_class: of a transformers model.
    """

    library: str
    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    config_class: str = ""

    def build(self, **changes: Any) -> nn.Module:
        """Return the model on the meta device in bfloat16, with ``changes`` to its configuration (fewer layers)."""
        library = importlib.import_module(self.library)
        options = {**self.config, **changes}
        with torch.device("meta"):
            if self.library == "diffusers":
                model: nn.Module = getattr(library, self.class_name)(**options)
            else:
                model = getattr(library, self.class_name)(getattr(library, self.config_class)(**options))
        return model.to(torch.bfloat16).eval().requires_grad_(False)


@dataclass(frozen=True)
class PublishedModel:
    """A pipeline.

    Attributes:
        name: for the command line.
        title: for people.
        parameters: of one transformer, in billions, as published.
        pipeline: its class in diffusers.
        components: by their names in the pipeline.
        text_tokens: that a benchmark's step sees.
        text_layers: patterns of the layers whose rows are the text's.
        joint_layers: patterns of the layers whose rows are the picture's and the text's.
        heads, head_dim, attention_layers: of the attention, over the picture and (``joint_attention``) the text.
        few_layers: what to change for a model of few layers.
    """

    name: str
    title: str
    parameters: float
    pipeline: str
    components: Mapping[str, Component]
    text_tokens: int
    text_layers: tuple[str, ...]
    joint_layers: tuple[str, ...]
    heads: int
    attention_layers: int
    few_layers: Mapping[str, int]
    head_dim: int = 128
    joint_attention: bool = True

    def rows(self, layer: str) -> int:
        """Return M of the transformer's linear layer called ``layer``."""
        if matches_any(self.text_layers, layer):
            return self.text_tokens
        return IMAGE_TOKENS + (self.text_tokens if matches_any(self.joint_layers, layer) else 0)

    @property
    def attention_tokens(self) -> int:
        """Tokens of the attention over the picture."""
        return IMAGE_TOKENS + (self.text_tokens if self.joint_attention else 0)


QWEN25_VL_7B = Component(
    "transformers",
    "Qwen2_5_VLForConditionalGeneration",
    {
        "tie_word_embeddings": False,
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
    },
    "Qwen2_5_VLConfig",
)
QWEN3_4B = Component(
    "transformers",
    "Qwen3Model",
    {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Qwen3Config",
)
_T5 = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
T5_XXL = Component("transformers", "T5EncoderModel", {**_T5, "vocab_size": 32128}, "T5Config")
UMT5_XXL = Component("transformers", "UMT5EncoderModel", {**_T5, "vocab_size": 256384}, "UMT5Config")
CLIP_L = Component(
    "transformers",
    "CLIPTextModel",
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
     "projection_dim": 768},
    "CLIPTextConfig",
)  # fmt: skip
FLUX_VAE = Component(
    "diffusers",
    "AutoencoderKL",
    {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 16,
        "layers_per_block": 2,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
)


def transformer(name: str) -> Component:
    """Return the diffusion transformer that ``lowbit bench`` calls ``name``."""
    found = published_transformer(name)
    assert found is not None
    return Component("diffusers", found.class_name, found.config)


MODELS = {
    model.name: model
    for model in (
        PublishedModel(
            "qwen-image",
            "Qwen-Image",
            20.4,
            "QwenImagePipeline",
            {
                "transformer": transformer("qwen-image"),
                "text_encoder": QWEN25_VL_7B,
                "vae": Component("diffusers", "AutoencoderKLQwenImage"),
            },
            text_tokens=256,
            text_layers=("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "txt_mlp"),
            joint_layers=(),
            heads=24,
            attention_layers=60,
            few_layers={"num_layers": 2},
        ),
        PublishedModel(
            "z-image",
            "Z-Image",
            6.15,
            "ZImagePipeline",
            {
                "transformer": transformer("z-image"),
                "text_encoder": QWEN3_4B,
                "vae": FLUX_VAE,
            },
            text_tokens=128,
            text_layers=("context_refiner",),
            joint_layers=("layers",),
            heads=30,
            attention_layers=32,
            few_layers={"n_layers": 2, "n_refiner_layers": 1},
        ),
        PublishedModel(
            "flux",
            "FLUX.1-dev",
            11.9,
            "FluxPipeline",
            {
                "transformer": transformer("flux"),
                "text_encoder": CLIP_L,
                "text_encoder_2": T5_XXL,
                "vae": FLUX_VAE,
            },
            text_tokens=512,
            text_layers=("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context"),
            joint_layers=("single_transformer_blocks",),
            heads=24,
            attention_layers=57,
            few_layers={"num_layers": 1, "num_single_layers": 2},
        ),
        PublishedModel(
            "wan",
            "Wan2.2 T2V-A14B",
            14.3,
            "WanPipeline",
            {
                "transformer": transformer("wan"),
                "transformer_2": transformer("wan"),
                "text_encoder": UMT5_XXL,
                "vae": Component("diffusers", "AutoencoderKLWan"),
            },
            text_tokens=512,
            text_layers=("attn2.to_k", "attn2.to_v"),
            joint_layers=(),
            heads=40,
            attention_layers=40,
            few_layers={"num_layers": 2},
            joint_attention=False,
        ),
    )
}


def quantized_layers(model: PublishedModel, method: str) -> Iterator[tuple[str, nn.Linear]]:
    """Yield name and layer of those that ``method`` quantizes with its activations, on the meta device."""
    from lowbit.quantization.factory import config_class

    transformer = model.components["transformer"].build()
    for name, decision in plan_layers(transformer, config_class(method)()).items():
        if decision.method is not None and not decision.method.weight_only:
            layer = transformer.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            yield name, layer


def gemm_shapes(model: PublishedModel, method: str = "int8") -> Counter[tuple[int, int, int]]:
    """Count the products of one step by (M, K, N) over the layers that ``method`` quantizes with its activations."""
    layers = quantized_layers(model, method)
    return Counter((model.rows(name), layer.in_features, layer.out_features) for name, layer in layers)


# Layers of a module that have one input, which is quantized once for all of them.
SHARING = {
    **dict.fromkeys(("to_q", "to_k", "to_v"), "to_qkv"),
    **dict.fromkeys(("add_q_proj", "add_k_proj", "add_v_proj"), "add_qkv_proj"),
    **dict.fromkeys(("w1", "w3"), "w13"),
}


def quantized_inputs(model: PublishedModel, method: str = "int8") -> Counter[tuple[int, int]]:
    """Count what is quantized in one step by (M, K): the inputs of the layers that ``gemm_shapes`` counts."""
    inputs: set[tuple[str, str, int, int]] = set()
    for name, layer in quantized_layers(model, method):
        parent, _, leaf = name.rpartition(".")
        inputs.add((parent, SHARING.get(leaf, leaf), model.rows(name), layer.in_features))
    return Counter((m, k) for _, _, m, k in inputs)


def weight_only_weights(model: PublishedModel) -> int:
    """Return the number of weights in the layers whose weights alone are quantized."""
    from lowbit.quantization.methods.int8 import Int8Config

    transformer = model.components["transformer"].build()
    plan = plan_layers(transformer, Int8Config())
    chosen = (name for name, decision in plan.items() if decision.method is not None and decision.method.weight_only)
    return sum(transformer.get_submodule(name).get_parameter("weight").numel() for name in chosen)
