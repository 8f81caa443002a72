"""The defaults of each family, checked on its real classes."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

from lowbit.models import FAMILIES, Family, is_diffusion_transformer, kept_layers, weight_only_layers
from lowbit.models.patterns import matches_any


def linear_layers(class_name: str) -> dict[str, nn.Linear]:
    with torch.device("meta"):
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
