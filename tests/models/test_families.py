"""The defaults of each family, checked on its real classes."""

from __future__ import annotations

import functools
import warnings

import diffusers
import pytest
import torch
from torch import nn

from lowbit.models import FAMILIES, Family, is_diffusion_transformer, kept_layers, weight_only_layers
from lowbit.models.patterns import matches_any


@functools.cache
def linear_layers(class_name: str) -> dict[str, nn.Linear]:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own classes use what it calls deprecated
        model = getattr(diffusers, class_name)()
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_kept_share_is_what_the_table_says(family: Family) -> None:
    for class_name in family.classes:
        layers = linear_layers(class_name)
        patterns = [pattern for group in kept_layers(class_name).values() for pattern in group]
        weight_only = {name for name in layers if matches_any(weight_only_layers(class_name), name)}
        kept = {name for name in layers if matches_any(patterns, name)} - weight_only
        total = sum(layer.weight.numel() for layer in layers.values())
        for names, share in ((kept, family.kept_share), (weight_only, family.weight_only_share)):
            assert sum(layers[name].weight.numel() for name in names) / total == pytest.approx(share, abs=0.001)
        ordinary = [name for name in layers if "attn" in name or "attention" in name or "mlp.net" in name]
        in_blocks = [name for name in ordinary if "embedder" not in name and "proj_mlp" not in name]
        assert in_blocks
        assert not (kept | weight_only).intersection(in_blocks)
        assert all(matches_any(patterns, name) for name in weight_only)  # what W8A8 must not touch, and no more


def test_modulation_and_ends_are_kept() -> None:
    patterns = [pattern for group in kept_layers("QwenImageTransformer2DModel").values() for pattern in group]
    for name in ("img_in", "txt_in", "proj_out", "norm_out.linear", "transformer_blocks.0.img_mod.1"):
        assert matches_any(patterns, name), name


@pytest.mark.parametrize(
    ("library", "class_name", "expected"),
    [
        ("diffusers", "ZImageTransformer2DModel", True),
        ("diffusers", "WanTransformer3DModel", True),
        ("diffusers", "AutoencoderKL", False),
        ("transformers", "Qwen3Model", False),
    ],
)
def test_diffusion_transformers(library: str, class_name: str, expected: bool) -> None:
    assert is_diffusion_transformer(library, class_name) is expected


TRANSFORMERS = [name for name in dir(diffusers) if "Transformer" in name and name.endswith("Model")]


@pytest.mark.parametrize("class_name", TRANSFORMERS)
def test_every_class_of_diffusers_keeps_its_ends_and_quantizes_its_blocks(class_name: str) -> None:
    try:
        linear_layers(class_name)
    except (TypeError, ValueError) as error:
        pytest.skip(f"{class_name} can't be made without arguments: {error}")
    layers = linear_layers(class_name)
    patterns = [pattern for group in kept_layers(class_name).values() for pattern in group]
    weight_only = {name for name in layers if matches_any(weight_only_layers(class_name), name)}
    kept = {name for name in layers if matches_any(patterns, name)} - weight_only
    outside = {name for name in layers if not any(part.isdigit() for part in name.split("."))}
    assert outside <= kept
    total = sum(layer.weight.numel() for layer in layers.values())
    assert sum(layers[name].weight.numel() for name in kept) <= MOST_KEPT.get(class_name, 0.08) * total


# Those whose modulation has other names than AdaLayerNormZero's, or that are small by default.
MOST_KEPT = {
    "CogVideoXTransformer3DModel": 0.12,
    "ConsisIDTransformer3DModel": 0.12,
    "Kandinsky5Transformer3DModel": 0.16,
    "Kandinsky6SRTransformer3DModel": 0.13,
    "Kandinsky6Transformer3DModel": 0.14,
    "MiniMaxH3Transformer3DModel": 0.4,
    "NucleusMoEImageTransformer2DModel": 0.3,
    "PRXTransformer2DModel": 0.28,
}


@pytest.mark.parametrize(
    "name", ["lm_head", "thinker.lm_head", "talker.codec_head", "talker.code_predictor.lm_head.3", "audio_proj_out"]
)
def test_heads_are_kept_wherever_they_are(name: str) -> None:
    patterns = [pattern for group in kept_layers("LTX2VideoTransformer3DModel").values() for pattern in group]
    assert matches_any(patterns, name)
