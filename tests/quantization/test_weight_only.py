"""Layers whose weights alone are quantized."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from lowbit.errors import ConfigError
from lowbit.quantization import build_quant_config, quantize_model
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.calibration.smoothing import SeenInput
from lowbit.quantization.plan import plan_layers, quantized_layers

MODULATION = {f"transformer_blocks.{block}.{stream}.1" for block in range(2) for stream in ("img_mod", "txt_mod")}


@pytest.fixture(scope="module")
def source() -> QwenImageTransformer2DModel:
    torch.manual_seed(3)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    return model.bfloat16().eval()


def chosen(model: torch.nn.Module, options: dict[str, Any]) -> set[str]:
    config = build_quant_config(options)
    assert isinstance(config, QuantizationConfig)
    plan = plan_layers(model, config)
    return {name for name, decision in plan.items() if decision.method is not None and decision.method.weight_only}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "int8"},
        {"method": "int8", "kernel": "reference", "rotation": 64},
        {"method": "fp8"},
        {"method": "fp8", "activation_scheme": "static"},
        {"method": "fp8", "weight_block_size": [64, 64]},
    ],
    ids=str,
)
def test_modulation_is_stored_in_8_bits_and_nothing_of_its_input_is_rounded(
    source: QwenImageTransformer2DModel, options: dict[str, Any]
) -> None:
    model = copy.deepcopy(source)
    manifest = quantize_model(model, options)
    method = f"{options['method']}_weight_only"
    records = {record.name: record for record in manifest.quantized if record.method == method}
    assert records.keys() == MODULATION
    assert {record.kernel for record in records.values()} == {"weight_only"}
    assert all(record.bytes_after < 0.6 * record.bytes_before for record in records.values())
    x = torch.randn(1, 64).bfloat16()
    for name in MODULATION:
        layer, original = model.get_submodule(name), source.get_submodule(name)
        weight = layer.method.dequantize_weight(layer).double()
        exact = x.double() @ weight.t() + original.bias.double()
        magnitude = x.double().abs() @ weight.abs().t() + original.bias.double().abs()
        assert ((layer(x).double() - exact).abs() <= 2**-7 * magnitude).all()
        assert not {"input_scale", "mul_scale"} & set(dict(layer.named_parameters()))


def test_options_go_before_the_familys(source: QwenImageTransformer2DModel) -> None:
    assert chosen(source, {"method": "int8"}) == MODULATION
    assert chosen(source, {"method": "int8", "weight_only_layers": []}) == set()
    images = {name for name in MODULATION if "img" in name}
    assert chosen(source, {"method": "int8", "ignored_layers": ["txt_mod"]}) == images
    assert chosen(source, {"method": "int8", "weight_only_layers": ["img_mod"]}) == images
    # What the family would keep, and what it would round, can both be named.
    assert chosen(source, {"method": "int8", "weight_only_layers": ["norm_out"]}) == {"norm_out.linear"}
    assert len(chosen(source, {"method": "int8", "weight_only_layers": ["img_mlp"]})) == 4


def test_a_checkpoint_says_itself_what_it_did(source: QwenImageTransformer2DModel) -> None:
    flag = {"method": "int8", "is_checkpoint_int8_serialized": True}
    assert chosen(source, flag) == set()
    name = "transformer_blocks.0.img_mod.1"
    assert chosen(source, {**flag, "weight_only_layers": [name]}) == {name}


def test_wrong_patterns_are_refused(source: QwenImageTransformer2DModel) -> None:
    with pytest.raises(ConfigError, match="weight_only_layers .*'nothing'.* match no layer"):
        chosen(source, {"method": "int8", "weight_only_layers": ["nothing"]})
    with pytest.raises(ConfigError, match="weight_only_layers must be a list"):
        build_quant_config({"method": "fp8", "weight_only_layers": "img_mod"})


def test_smoothing_leaves_them_alone(source: QwenImageTransformer2DModel) -> None:
    model = copy.deepcopy(source)
    names = [name for name, layer in source.named_modules() if type(layer) is torch.nn.Linear]
    rows = {name: torch.randn(8, source.get_submodule(name).in_features) for name in names}
    seen = {name: SeenInput(x.abs().amax(dim=0), x) for name, x in rows.items()}
    quantize_model(model, {"method": "int8", "smoothing": 0.5}, seen_inputs=seen)
    layers = quantized_layers(model)
    assert {name for name, layer in layers.items() if not hasattr(layer, "mul_scale")} == MODULATION
