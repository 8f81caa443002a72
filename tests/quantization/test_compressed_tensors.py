"""compressed-tensors: checkpoints that the package of that name wrote, and what lowbit writes for it to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.quantization import SUPPORTED_QUANTIZATION_METHODS, build_quant_config, quantize_model
from lowbit.quantization.linear import QuantizedLinear
from lowbit.quantization.methods.compressed_tensors.packing import pack_codes, unpack_codes
from lowbit.quantization.methods.compressed_tensors.presets import PRESETS
from lowbit.quantization.plan import quantized_layers
from tests.support.models import FAMILIES, language_model, same_but_for_order, save, stored_config, tensors

files = pytest.importorskip("tests.support.compressed_tensors_files")
pytest.importorskip("compressed_tensors", minversion="0.20")

FAMILY = FAMILIES["qwen-image"]
LAYERS = [
    "transformer_blocks.0.img_mlp.net.2",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_k",
    "transformer_blocks.1.attn.to_out.0",
]


def written(tmp_path: Path, name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = FAMILY.make()
    folder = save(model, tmp_path / "model", torch.float32)
    return folder, files.write(model, folder, name, LAYERS)


def load(folder: Path, **options: Any) -> Any:
    return type(FAMILY.make()).from_pretrained(folder, torch_dtype=torch.float32, **options)


@pytest.mark.parametrize("name", files.SCHEMES)
def test_weights_decode_as_the_package_decodes_them_and_are_written_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder, expected = written(tmp_path, name)
    model = load(folder)
    layers = quantized_layers(model)
    assert sorted(layers) == sorted(LAYERS)
    for layer, weight in expected.items():
        found = layers[layer].method.dequantize_weight(layers[layer].canonical())
        if name.startswith("NVFP4"):  # the package divides by the global scale first, lowbit multiplies last
            torch.testing.assert_close(found, weight.float(), rtol=3e-7, atol=0)
        else:
            assert torch.equal(found.to(weight.dtype), weight), layer
    model.save_pretrained(tmp_path / "again")
    before, after = tensors(folder), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for key in (key for key in before if key.rpartition(".")[0] in LAYERS and not key.endswith("bias")):
        assert (before[key].dtype, before[key].shape) == (after[key].dtype, after[key].shape), key
        assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)), key
    ours, theirs = stored_config(tmp_path / "again"), stored_config(folder)
    for key in ("quant_method", "format", "config_groups", "quantization_status", "ignore"):
        assert ours[key] == theirs[key], key
    again = load(tmp_path / "again")
    assert same_but_for_order(FAMILY.run(again), FAMILY.run(model))


@pytest.mark.parametrize("name", files.SCHEMES)
def test_layers_compute_with_the_decoded_weight(name: str, tmp_path: Path) -> None:
    folder, _ = written(tmp_path, name)
    layers = quantized_layers(load(folder))
    keeps_activations = files.SCHEMES[name][1] is None
    for layer in layers.values():
        layer.requires_grad_(False)
        x = torch.randn(5, layer.in_features)
        weight = layer.dequantized().double()
        bias = 0 if layer.bias is None else layer.bias.double()
        found = layer(x).double()
        if name.startswith("W8A8 static"):
            zero = -7 if "asymmetric" in name else 0
            codes = ((x.double() / 0.03125).round() + zero).clamp(-128, 127) - zero
            assert relative(found, 0.03125 * codes @ weight.t() + bias) < 1e-5
        assert relative(found, x.double() @ weight.t() + bias) < (1e-5 if keeps_activations else 0.15)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", PRESETS)
def test_the_package_reads_what_is_quantized_here(scheme: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    torch.manual_seed(0)
    wide = FAMILIES["qwen-image"].make()
    for block in wide.transformer_blocks:  # inputs that 128 divides
        block.img_mlp.net[2] = torch.nn.Linear(256, 64)
    quantize_model(wide, "compressed-tensors", scheme=scheme, ignored_layers=["re:(?!.*img_mlp.net.2)"])
    wide.save_pretrained(tmp_path)
    config = QuantizationConfig.model_validate(stored_config(tmp_path))
    found = config.config_groups["group_0"]
    for operand in ("weights", "input_activations"):
        ours, theirs = (getattr(each, operand) for each in (found, preset_name_to_scheme(scheme, ["Linear"])))
        # Zero points, of which there are none, may be of another type.
        same = [each and each.model_dump(exclude={"zp_dtype", "observer"}) for each in (ours, theirs)]
        assert same[0] == same[1], operand
    compressor: Any = BaseCompressor.get_value_from_registry(config.format)
    stored = tensors(tmp_path)
    layers = quantized_layers(wide)
    assert len(layers) == len(wide.transformer_blocks)
    for name, layer in layers.items():
        state = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        state.pop("bias")
        assert set(state) >= set(compressor.compression_param_names(found))
        theirs = files.decompressed(state, compressor, found)
        ours = layer.dequantized()
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=3e-7, atol=0)
    assert same_but_for_order(FAMILY.run(load(tmp_path)), FAMILY.run(wide))


def test_codes_of_every_width_pack_as_the_package_packs_them() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    for bits in range(1, 9):
        for columns in (1, 7, 31, 32, 33, 64, 100):
            codes = torch.randint(0, 1 << bits, (5, columns), dtype=torch.uint8)
            signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
            packed = pack_codes(codes, bits)
            assert torch.equal(packed, pack_to_int32(signed, bits)), (bits, columns)
            assert torch.equal(unpack_codes(packed, bits, columns), codes)
            assert torch.equal(unpack_from_int32(packed, bits, torch.Size(codes.shape)), signed)


GROUP = {"targets": ["Linear"], "weights": files.groups(4)}


def config(**changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": GROUP},
        "format": "pack-quantized",
        **changes,
    }


def test_layers_are_chosen_as_the_package_chooses_them() -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    eight = {**GROUP, "targets": ["re:.*attn.to_[qk]$"], "weights": files.groups(8)}
    five = {**GROUP, "targets": ["transformer_blocks.1.attn.to_q", "re:.*net.0.*"], "weights": files.groups(5)}
    given = config(
        config_groups={"a": eight, "b": GROUP, "c": five},
        ignore=["re:transformer_blocks.0.txt", "img_in", "proj_out", "transformer_blocks.1.attn.to_v", "to_k"],
        quantization_status="compressed",
    )
    ours = build_quant_config(given)
    plain, theirs = FAMILY.make(), FAMILY.make()
    apply_quantization_config(theirs, QuantizationConfig.model_validate(given))
    for name, module in plain.named_modules():
        if type(module) is torch.nn.Linear:
            scheme = getattr(theirs.get_submodule(name), "quantization_scheme", None)
            _, found = ours.scheme_of(module, name)
            assert (found and found.weights.num_bits) == (scheme and scheme.weights.num_bits), name
    inner = torch.nn.Linear(64, 64)
    assert ours.without_prefix("transformer_blocks.").scheme_of(inner, "1.attn.to_q")[0] == "c"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quantization_status": "frozen"}, ConfigError, "the weights are not compressed"),
        ({"format": "dense"}, ConfigError, "the weights are not compressed"),
        ({"format": "int-quantized"}, UnsupportedError, "format 'int-quantized' with integers"),
        ({"kv_cache_scheme": {"num_bits": 8}}, UnsupportedError, "kv_cache_scheme: a quantized cache"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, UnsupportedError, "sparse weights"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, UnsupportedError, "transformed weights"),
        ({"other": 1}, ConfigError, "Unknown option 'other'"),
        ({"config_groups": []}, ConfigError, "config_groups must map"),
        ({"config_groups": {"a": 3}}, ConfigError, "config_groups.a must be a dictionary"),
        (
            {"config_groups": {"a": {**GROUP, "targets": "Linear"}}},
            ConfigError,
            "a.targets must be a list",
        ),
        ({"config_groups": {"a": {**GROUP, "targets": ["re:("]}}}, ConfigError, "is no regular expression"),
        ({"config_groups": {"a": {**GROUP, "bits": 3}}}, ConfigError, "config_groups.a has no key 'bits'"),
        ({"config_groups": {"a": {**GROUP, "weights": {"bits": 3}}}}, ConfigError, "a.weights has no key 'bits'"),
        ({"config_groups": {"a": {**GROUP, "weights": {"type": "uint"}}}}, ConfigError, "type int or float"),
        ({"config_groups": {"a": {**GROUP, "weights": {"strategy": "row"}}}}, ConfigError, "no strategy 'row'"),
        ({"config_groups": {"a": {**GROUP, "weights": files.groups(9)}}}, UnsupportedError, "no kernel computes"),
        ({"config_groups": {"a": {**GROUP, "weights": files.groups(4, 16)}}}, UnsupportedError, "no kernel computes"),
        (
            {"config_groups": {"a": {**GROUP, "input_activations": files.operand(8, "int", **files.TOKEN)}}},
            UnsupportedError,
            "no kernel computes",
        ),
        ({"config_groups": {"a": {**GROUP, "output_activations": {}}}}, UnsupportedError, "outputs are not quantized"),
        ({"config_groups": {"W4A4": ["Linear"]}}, UnsupportedError, "is no preset"),
        ({"ignore": "lm_head"}, ConfigError, "ignore must be a list"),
    ],
)
def test_what_can_not_be_read_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_quant_config(config(**changes))


def broken(tmp_path: Path, name: str, change: Any) -> Path:
    folder, _ = written(tmp_path, name)
    (file,) = folder.glob("*.safetensors")
    content = load_file(file)
    change(content)
    save_file(content, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "tensor", "value", "message"),
    [
        ("W4A16 groups", "weight_shape", torch.tensor([64, 32]), "weight_shape: found .64, 32., the model's layer is"),
        ("W4A16 groups", "weight_packed", torch.zeros(64, 3, dtype=torch.int32), "weight_packed: found int32 .64, 3."),
        ("W4A16 groups", "weight_scale", torch.full((64, 2), float("nan")), "weight_scale: 128 of 128 values must be"),
        (
            "W4A16 groups",
            "weight_g_idx",
            torch.arange(64, dtype=torch.int32) % 2,
            "weight_g_idx: inputs in another order",
        ),
        ("W8A8", "weight_scale", torch.zeros(64, 1), "weight_scale: 64 of 64 values must be finite and above zero"),
        ("W8A8", "weight", torch.zeros(64, 64), "weight: found float32"),
        ("W8A8 static", "input_scale", torch.zeros(1), "input_scale: 1 of 1 values must be"),
        ("FP8_BLOCK", "weight_scale", torch.ones(3, 2), "weight_scale: found float32 .3, 2."),
        ("NVFP4", "weight_global_scale", torch.zeros(1), "weight_global_scale: 1 of 1 values"),
        (
            "MXFP4",
            "weight_scale",
            torch.full((64, 2), 255, dtype=torch.uint8),
            "weight_scale: 128 of 128 values must not be NaN",
        ),
    ],
)
def test_wrong_tensors_are_named(name: str, tensor: str, value: torch.Tensor, message: str, tmp_path: Path) -> None:
    folder = broken(tmp_path, name, lambda content: content.update({f"{LAYERS[1]}.{tensor}": value}))
    with pytest.raises(CheckpointError, match=f"{LAYERS[1]}.{message}"):
        load(folder)


@pytest.mark.parametrize("name", ["W4A16 asymmetric", "W8A8 static asymmetric", "FP8", "NVFP4", "MXFP8"])
def test_missing_tensors_are_named(name: str, tmp_path: Path) -> None:
    folder, _ = written(tmp_path, name)
    stored = [key for key in tensors(folder) if key.startswith(f"{LAYERS[1]}.") and not key.endswith("bias")]
    for index, key in enumerate(stored):
        broken_folder = broken(tmp_path / str(index), name, lambda content, key=key: content.pop(key))
        with pytest.raises(CheckpointError, match=key):
            load(broken_folder)


def test_a_trivial_order_of_inputs_is_kept(tmp_path: Path) -> None:
    order = torch.arange(64, dtype=torch.int32) // 32
    key = f"{LAYERS[1]}.weight_g_idx"
    folder = broken(tmp_path, "W4A16 groups", lambda content: content.update({key: order}))
    load(folder).save_pretrained(tmp_path / "again")
    assert torch.equal(tensors(tmp_path / "again")[key], order)


@pytest.mark.parametrize("name", ["W4A16 asymmetric", "W8A8", "FP8_BLOCK", "NVFP4"])
def test_language_models_are_read(name: str, tmp_path: Path) -> None:
    """Of the whole model and of its base model alone, whose names lack a prefix."""
    folder = save(language_model(), tmp_path / "model", torch.float32)
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    expected = files.write(language_model(), folder, name, layers)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    for model, prefix in ((whole, ""), (base, "model.")):
        found = quantized_layers(model)
        assert sorted(f"{prefix}{layer}" for layer in found) == layers
        for layer, module in found.items():
            weight = expected[f"{prefix}{layer}"]
            torch.testing.assert_close(module.dequantized().to(weight.dtype), weight, rtol=3e-7, atol=0)
    whole.save_pretrained(tmp_path / "again")
    assert stored_config(tmp_path / "again")["config_groups"] == stored_config(folder)["config_groups"]
    before, after = tensors(folder), tensors(tmp_path / "again")
    for key in (key for key in before if key.startswith(tuple(layers))):
        assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)), key


def test_it_is_listed_and_its_schemes_are(tmp_path: Path) -> None:
    assert "compressed-tensors" in SUPPORTED_QUANTIZATION_METHODS
    with pytest.raises(ConfigError, match=r"no scheme 'W4A4' to quantize with\. Expected one of: .*W4A16_ASYM"):
        build_quant_config("compressed-tensors", scheme="W4A4")
    assert json.loads(json.dumps(build_quant_config("compressed-tensors", scheme="w8a8").to_dict()))["scheme"] == "W8A8"
    assert isinstance(QuantizedLinear, type)
