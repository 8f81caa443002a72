"""The MX and NVFP4 methods: options, checkpoints in vLLM-Omni's and msModelSlim's layouts, and broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError, ConfigError
from lowbit.hosts.routing import claims
from lowbit.ops import mx, nvfp4
from lowbit.ops.e2m1 import decode_e2m1, unpack_nibbles
from lowbit.quantization import Mxfp4DualScaleConfig, build_quant_config, quantize_model
from lowbit.quantization.plan import plan_layers, quantized_layers
from tests.support.models import FAMILIES, relative_error, save, stored_config, tensors

METHODS: dict[str, dict[str, Any]] = {
    "mxfp8": {"method": "mxfp8"},
    "mxfp4": {"method": "mxfp4"},
    "mxfp4 packed": {"method": "mxfp4", "pack_weights": True},
    "mxfp4_dualscale": {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0},
    "nvfp4": {"method": "nvfp4"},
    "nvfp4 W4A16": {"method": "nvfp4", "weight_only": True},
}
# Of the output of a small random model; the worst of the families, measured, and a quarter more.
ERRORS = {"mxfp8": 0.04, "mxfp4": 0.2, "nvfp4": 0.15}
FAMILY = FAMILIES["wan"]


def unquantized(folder: Path) -> Path:
    torch.manual_seed(0)
    return save(FAMILY.make(), folder)


def load(folder: Path, **options: Any) -> Any:
    return type(FAMILY.make()).from_pretrained(folder, torch_dtype=torch.bfloat16, **options)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_written_loads_bit_identically(name: str, tmp_path: Path) -> None:
    source = unquantized(tmp_path / "source")
    reference = FAMILY.run(load(source))
    model = load(source, quantization_config=build_quant_config(METHODS[name]))
    output = FAMILY.run(model)
    assert relative_error(output, reference) < next(v for k, v in ERRORS.items() if name.startswith(k))
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized")
    assert torch.equal(FAMILY.run(again), output)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(bytes_of(before[key]), bytes_of(after[key])) for key in before)
    assert claims(stored_config(tmp_path / "quantized"), {METHODS[name]["method"]})


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4 packed", "mxfp4_dualscale"])
def test_files_have_vllm_omnis_tensors(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILY.make().to(torch.bfloat16)
    weight = model.get_submodule(FAMILY.quantized).weight.detach().clone()
    quantize_model(model, METHODS[name]["method"], **{k: v for k, v in METHODS[name].items() if k != "method"})
    model.save_pretrained(tmp_path / "quantized")
    found = {
        key.removeprefix(f"{FAMILY.quantized}."): (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for key, tensor in tensors(tmp_path / "quantized").items()
        if key.startswith(f"{FAMILY.quantized}.")
    }
    rows, columns = weight.shape
    expected: dict[str, Any] = {"bias": ("bfloat16", (rows,)), "weight_scale": ("uint8", (rows, columns // 32))}
    packed = name == "mxfp4 packed"
    expected["weight"] = ("uint8", (rows, columns // 2)) if packed else ("float8_e4m3fn", (rows, columns))
    if name == "mxfp4_dualscale":
        expected["weight_dual_scale"] = ("float32", (rows, -(-columns // 512), 1))
        expected["mul_scale"] = ("float32", (columns,))
    assert found == expected


def serialized(folder: Path, method: str, change: Any = None) -> Path:
    """A checkpoint as vLLM-Omni describes it, made with the references."""
    source = unquantized(folder / "source")
    config = json.loads((source / "config.json").read_text())
    layer = FAMILY.quantized
    content = tensors(source)
    weight = content[f"{layer}.weight"].float()
    if method == "mxfp4":
        codes, content[f"{layer}.weight_scale"] = mx.quantize_mxfp4(weight)
        content[f"{layer}.weight"] = decode_e2m1(unpack_nibbles(codes)).to(torch.float8_e4m3fn)
        flag = "is_checkpoint_mxfp4_serialized"
    elif method == "mxfp4_dualscale":
        codes, content[f"{layer}.weight_scale"], dual = mx.quantize_mxfp4_dualscale(weight)
        content[f"{layer}.weight"] = decode_e2m1(unpack_nibbles(codes)).to(torch.float8_e4m3fn)
        content[f"{layer}.weight_dual_scale"] = dual.unsqueeze(-1)
        content[f"{layer}.mul_scale"] = torch.full((weight.shape[1],), 2.0)
        flag = "is_checkpoint_serialized"
    else:
        content[f"{layer}.weight"], content[f"{layer}.weight_scale"] = mx.quantize_mxfp8(weight)
        flag = "is_checkpoint_mxfp8_serialized"
    linear = [name for name, module in FAMILY.make().named_modules() if type(module) is torch.nn.Linear]
    kept = [name for name in linear if name != layer]
    config["quantization_config"] = {"quant_method": method, flag: True, "ignored_layers": kept}
    if change is not None:
        change(content, layer)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(config))
    save_file(content, folder / "model" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder / "model"


@pytest.mark.parametrize("method", ["mxfp8", "mxfp4", "mxfp4_dualscale"])
def test_reads_vllm_omnis_layout(method: str, tmp_path: Path) -> None:
    folder = serialized(tmp_path, method)
    content = load_file(folder / "diffusion_pytorch_model.safetensors")
    model = load(folder)
    (layer,) = quantized_layers(model).values()
    prefix = f"{layer.prefix}."
    scale = mx.decode_e8m0(content[f"{prefix}weight_scale"]).repeat_interleave(32, dim=1)
    expected = content[f"{prefix}weight"].float() * scale
    if method == "mxfp4_dualscale":
        expected = (
            expected
            * content[f"{prefix}weight_dual_scale"].squeeze(-1).repeat_interleave(512, 1)[:, : expected.shape[1]]
        )
        expected = expected * 2.0  # the input is multiplied by mul_scale
    assert torch.equal(layer.method.dequantize_weight(layer), expected)
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(
        layer(x), torch.nn.functional.linear(x, expected, layer.bias.float()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["fp8r", "nvfp4"])
def test_reads_bfls_layout(kind: str, tmp_path: Path) -> None:
    """Black Forest Labs' tensors, made and decoded by diffusers, under lowbit's configuration."""
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    restored: dict[str, torch.Tensor] = {}

    def change(content: dict[str, torch.Tensor], layer: str) -> None:
        source = load_file(tmp_path / "source" / "diffusion_pytorch_model.safetensors")[f"{layer}.weight"]
        if kind == "fp8r":
            weight, scale = utils.quantize_fp8r(source)
            restored[layer] = utils.dequantize_fp8r(weight, scale)
            content.update({f"{layer}.weight": weight, f"{layer}.weight_scale": scale})
        else:
            weight, scale, outer = utils.quantize_nvfp4(source)
            restored[layer] = utils.dequantize_nvfp4(weight, scale, outer)
            scales = {"weight_scale": scale, "weight_scale_2": outer, "input_scale": torch.tensor(0.01)}
            content.update({f"{layer}.weight": weight, **{f"{layer}.{k}": v for k, v in scales.items()}})

    folder = serialized(tmp_path, "mxfp8", change)
    config = json.loads((folder / "config.json").read_text())
    ignored = config["quantization_config"]["ignored_layers"]
    method = {"fp8r": {"quant_method": "fp8"}, "nvfp4": {"quant_method": "nvfp4", "activation_scheme": "static"}}[kind]
    flag = {f"is_checkpoint_{method['quant_method']}_serialized": True}
    config["quantization_config"] = {**method, **flag, "ignored_layers": ignored}
    (folder / "config.json").write_text(json.dumps(config))
    (layer,) = quantized_layers(load(folder)).values()
    assert torch.equal(layer.method.dequantize_weight(layer), restored[layer.prefix])


def test_mul_scale_is_optional(tmp_path: Path) -> None:
    model = load(serialized(tmp_path, "mxfp4_dualscale", lambda content, layer: content.pop(f"{layer}.mul_scale")))
    (layer,) = quantized_layers(model).values()
    assert "mul_scale" not in layer.state_dict()
    assert layer(torch.randn(2, layer.in_features).bfloat16()).isfinite().all()


def test_e8m0_and_wider_dtypes_are_understood(tmp_path: Path) -> None:
    def widen(content: dict[str, torch.Tensor], layer: str) -> None:
        content[f"{layer}.weight"] = content[f"{layer}.weight"].to(torch.bfloat16)
        content[f"{layer}.weight_scale"] = content[f"{layer}.weight_scale"].view(torch.float8_e8m0fnu)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for method, place in (("mxfp8", "a"), ("mxfp4", "b")):
        (layer,) = quantized_layers(load(serialized(tmp_path / place, method, widen))).values()
        assert layer.state_dict()["weight_scale"].dtype == torch.uint8


def replaced(name: str, make: Any) -> Any:
    return lambda content, layer: content.update({f"{layer}.{name}": make(content[f"{layer}.{name}"])})


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (
            "mxfp8",
            lambda content, layer: content.pop(f"{layer}.weight_scale"),
            "1 missing: blocks.0.ffn.net.2.weight_scale",
        ),
        (
            "mxfp8",
            replaced("weight_scale", lambda t: torch.full_like(t, 255)),
            "diffusion_pytorch_model.*must not be NaN",
        ),
        (
            "mxfp8",
            replaced("weight_scale", lambda t: t.float()),
            r"weight_scale: found float32 .* needs uint8 \[64, 4\]",
        ),
        ("mxfp8", replaced("weight", lambda t: t.to(torch.float8_e5m2)), "weight: found float8_e5m2"),
        ("mxfp8", replaced("weight", lambda t: t.float() + 0.001), "values that e4m3 does not have"),
        ("mxfp4", replaced("weight", lambda t: (t.float() * 5).to(t.dtype)), "values other than 0, 0.5, 1"),
        ("mxfp4", replaced("weight", lambda t: t[:, :-2].clone()), r"weight: found float8_e4m3fn \[64, 126\]"),
        (
            "mxfp4_dualscale",
            replaced("weight_dual_scale", lambda t: t * 0),
            "weight_dual_scale: 64 of 64 values must be",
        ),
        (
            "mxfp4_dualscale",
            replaced("mul_scale", lambda t: -t),
            "mul_scale: 128 of 128 values must be finite and above",
        ),
    ],
)
def test_broken_checkpoints_name_file_and_tensor(method: str, change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load(serialized(tmp_path, method, change))
    assert "diffusion_pytorch_model.safetensors" in str(error.value) or "missing" in message


def test_leading_blocks_stay_as_they_are() -> None:
    model = FAMILIES["flux"].make()
    plan = plan_layers(model, Mxfp4DualScaleConfig(num_bf16_fallback_layers=1))
    reasons = {name: decision.reason for name, decision in plan.items()}
    assert reasons["transformer_blocks.0.attn.to_q"] == "num_bf16_fallback_layers"
    assert plan["single_transformer_blocks.0.attn.to_q"].method is not None
    config = Mxfp4DualScaleConfig()
    assert config.num_bf16_fallback_layers == 5
    assert [config.is_leading_block(f"blocks.{place}.ffn") for place in (0, 4, 5, 40)] == [True, True, False, False]
    assert config.is_leading_block("model.layers.2.mlp.up_proj")
    assert not config.as_serialized([]).is_leading_block("blocks.0.ffn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mxfp4_dualscale", "num_bf16_fallback_layers": -1}, "num_bf16_fallback_layers must be"),
        ({"method": "mxfp4", "w4a8_fallback_steps": [1]}, "w4a8_fallback_steps=.* is not supported"),
        ({"method": "mxfp4", "require_smooth_scale": True}, "require_smooth_scale is of checkpoints"),
        ({"method": "mxfp4", "pack_weights": "yes"}, "pack_weights must be true or false"),
        ({"method": "nvfp4", "activation_scheme": "none"}, "nvfp4 has no activation_scheme 'none'"),
        ({"method": "nvfp4", "weight_only": True, "activation_scheme": "static"}, "need activation_scheme 'dynamic'"),
        ({"method": "mxfp8", "group_size": 16}, "Unknown option 'group_size'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_quant_config(options)


def test_names_may_be_spelled_with_hyphens_and_options_at_rest_given() -> None:
    spec = {"method": "MXFP4-DualScale", "is_checkpoint_serialized": True, "w4a8_fallback_layers": []}
    assert build_quant_config(spec).get_name() == "mxfp4_dualscale"


def test_layers_with_odd_widths_are_kept() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(33, 8), torch.nn.Linear(8, 8))
    manifest = quantize_model(model, "nvfp4")
    assert manifest.by_reason() == {"an odd number of input channels": 1}


def test_nvfp4_scales_leave_room_for_the_search() -> None:
    weight = torch.randn(32, 64)
    tensors_ = build_quant_config("nvfp4").linear_method().quantize_weight(weight)
    assert tensors_["weight_scale"].float().max() <= 448
    restored = nvfp4.dequantize_nvfp4(tensors_["weight"], tensors_["weight_scale"], tensors_["weight_scale_2"])
    plain_scale = nvfp4.global_scale_of(weight.abs().amax())
    plain = nvfp4.dequantize_nvfp4(*nvfp4.quantize_nvfp4(weight, plain_scale), plain_scale)
    assert (restored - weight).norm() < 0.92 * (plain - weight).norm()
