"""msModelSlim's checkpoints: written here from its published layouts, in float64; no tool of its own runs here."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowbit.checkpoints.external import load_component
from lowbit.checkpoints.msmodelslim.read import described, open_weights
from lowbit.engine.config import OmniDiffusionConfig
from lowbit.engine.load import load_pipeline
from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.models.embedded import embedded_model
from lowbit.models.reference_names import LAYOUTS, reference_tensors
from lowbit.ops.e2m1 import decode_e2m1_pairs
from lowbit.ops.int8 import quantize_int8_per_token
from lowbit.quantization import AscendConfig, build_quant_config
from lowbit.quantization.plan import quantized_layers
from tests.support.ascend_files import BIAS, E2M1, FLUX, LAYER, LAYERS, K, N, dynamic, mix, mxfp4, static, write
from tests.support.models import FAMILIES, stored_config, tensors


def load(folder: Path, dtype: torch.dtype = torch.float32, kernel: str = "auto") -> Any:
    config = described(folder / "transformer", AscendConfig(kernel=kernel))
    assert config is not None
    return load_component(str(folder), "transformer", "diffusers", "FluxTransformer2DModel", config, dtype=dtype)


@pytest.mark.parametrize("case", list(LAYERS))
@pytest.mark.parametrize("smoothed", [False, True])
def test_weights_decode_to_the_published_formula(case: str, smoothed: bool, tmp_path: Path) -> None:
    kind, make = LAYERS[case]
    parts, expected = make()
    mul_scale = torch.rand(K) + 0.5 if smoothed else None
    model = load(write(tmp_path, parts, kind, mul_scale=mul_scale))
    layer = quantized_layers(model)[LAYER]
    assert [record.name for record in model.lowbit_manifest.quantized] == [LAYER]
    layer.leave_kernel()  # which may have packed the weight
    weight = layer.method.dequantize_weight(layer).double()
    expected = expected if mul_scale is None else expected * mul_scale.double()
    torch.testing.assert_close(weight, expected, rtol=3e-7, atol=0)
    assert torch.equal(layer.bias, BIAS)
    # With activations that the type rounds, within the rounding.
    x = torch.randn(7, K)
    reference = x.double() @ expected.t() + BIAS.double()
    assert (layer(x).double() - reference).norm() < (0.2 if "4" in kind else 0.05) * reference.norm()


@pytest.mark.parametrize("mindie", [False, True])
@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_static_layers_compute_the_formula(mindie: bool, bits: bool, kernel: str, tmp_path: Path) -> None:
    parts, expected = static(BIAS, bits)
    model = load(write(tmp_path, parts, "W8A8", bias=BIAS if mindie else None, mindie=mindie), kernel=kernel)
    layer = quantized_layers(model)[LAYER]
    x = torch.randn(7, K)
    result = layer(x).double()
    reference = expected(x)
    torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))
    # The bias is in once: in the product, and again only for who dequantizes.
    torch.testing.assert_close(layer.bias, BIAS, rtol=0, atol=float(parts["input_scale"]) * 1e-3)
    weight = layer.method.dequantize_weight(layer).double()
    close = x.double() @ weight.t() + BIAS.double()
    assert (result - close).norm() < 0.05 * close.norm()


def test_smoothed_static_and_smoothed_float_layers(tmp_path: Path) -> None:
    mul_scale = torch.rand(K) + 0.5
    parts, expected = static(BIAS)
    layer = quantized_layers(load(write(tmp_path / "static", parts, "W8A8", bias=None, mul_scale=mul_scale)))[LAYER]
    x = torch.randn(7, K)
    reference = expected(x * mul_scale)
    torch.testing.assert_close(layer(x).double(), reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))
    float_weight = torch.randn(N, K)
    folder = write(tmp_path / "float", {"weight": float_weight}, "FLOAT", mul_scale=mul_scale)
    with pytest.raises(ConfigError, match="applies to no linear layer"):
        load(folder)
    parts, _ = dynamic()
    place = write(tmp_path / "both", {"weight": float_weight}, "FLOAT", mul_scale=mul_scale) / "transformer"
    other = "transformer_blocks.0.attn.to_q"
    content = tensors(place)
    content[f"{other}.weight"] = torch.ones(64, 64, dtype=torch.int8)
    content[f"{other}.weight_scale"] = torch.ones(64, 1)
    save_file(content, place / "quant_model_weights.safetensors")
    description = json.loads((place / "quant_model_description.json").read_text())
    types = {f"{other}.weight": "W8A8_DYNAMIC", f"{other}.weight_scale": "W8A8_DYNAMIC"}
    (place / "quant_model_description.json").write_text(json.dumps({**description, **types}))
    model = load(place.parent)
    assert torch.equal(model.get_submodule(LAYER).weight, float_weight * mul_scale)


@pytest.mark.parametrize("case", ["dynamic", "w8a16", "mxfp4", "static"])
def test_what_was_read_is_saved_and_loaded_alike(case: str, tmp_path: Path) -> None:
    kind, make = LAYERS.get(case, ("W8A8", lambda: static(BIAS)))
    bias = None if case == "static" else BIAS
    model = load(write(tmp_path, make()[0], kind, mul_scale=torch.rand(K) + 0.5, bias=bias), torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    assert stored_config(tmp_path / "saved")["layer_types"] == {LAYER: kind}
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert torch.equal(FLUX.run(model), FLUX.run(again))


def test_a_pipeline_finds_the_description(tmp_path: Path) -> None:
    source = embedded_model().folder
    for path in source.iterdir():
        if path.name != "transformer":
            (tmp_path / path.name).symlink_to(path)
    place, name = tmp_path / "transformer", "layers.0.attention.to_q"
    place.mkdir()
    (place / "config.json").symlink_to(source / "transformer" / "config.json")
    content = tensors(source / "transformer")
    codes, scale = quantize_int8_per_token(content[f"{name}.weight"])
    content |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
    save_file(content, place / "quant_model_weights.safetensors")
    types = {key: "W8A8_DYNAMIC" if key.startswith(f"{name}.weight") else "FLOAT" for key in content}
    (place / "quant_model_description.json").write_text(json.dumps(types))
    for quantization in (None, "ascend"):
        pipeline = load_pipeline(OmniDiffusionConfig(model=str(tmp_path), quantization_config=quantization))
        assert list(quantized_layers(pipeline.transformer)) == [name]
    elsewhere = {"transformer": {"method": "ascend", "weights_folder": str(place)}}
    pipeline = load_pipeline(OmniDiffusionConfig(model=None, quantization_config=elsewhere))
    assert list(quantized_layers(pipeline.transformer)) == [name]
    with pytest.raises(ConfigError, match="already quantized with 'ascend'.*'int8'"):
        load_pipeline(OmniDiffusionConfig(model=str(tmp_path), quantization_config="int8"))
    with pytest.raises(ConfigError, match="already quantized with 'ascend'.*'torchao'"):
        load_pipeline(OmniDiffusionConfig(model=str(tmp_path), quantization_config="torchao"))
    with pytest.raises(ConfigError, match="ascend is read, not made"):
        load_pipeline(OmniDiffusionConfig(model=None, quantization_config="ascend"))


def wan_export(folder: Path, image: bool) -> tuple[WanTransformer3DModel, dict[str, torch.Tensor]]:
    """Write a small Wan as msModelSlim does in MindIE's format: in the original names, two layers quantized.

    Returns:
        The model, and the weights of the two layers that their tensors stand for.
    """
    torch.manual_seed(0)
    model = FAMILIES["wan"].make()
    if image:
        model = WanTransformer3DModel.from_config({**model.config, "image_dim": 32, "added_kv_proj_dim": 64})
    (folder / "pipeline" / "transformer").mkdir(parents=True)
    model.save_config(folder / "pipeline" / "transformer")
    names = {
        name: fused.parts[0]
        for name, fused in reference_tensors(LAYOUTS["WanTransformer3DModel"], model.state_dict()).items()
    }
    content = {name: model.state_dict()[part] for name, part in names.items()}
    converted = convert_wan_transformer_to_diffusers({name: tensor.clone() for name, tensor in content.items()})
    assert all(torch.equal(converted[name], tensor) for name, tensor in model.state_dict().items())
    assert converted.keys() == model.state_dict().keys()
    types, expected = dict.fromkeys(content, "FLOAT"), {}
    for layer, wrapper, ours in [
        ("blocks.0.self_attn.q", ".linear", "blocks.0.attn1.to_q"),
        ("blocks.1.ffn.2", "", "blocks.1.ffn.net.2"),
    ]:
        weight, bias = content.pop(f"{layer}.weight"), content.pop(f"{layer}.bias")
        codes, scale = quantize_int8_per_token(weight)
        made = {"weight": codes, "weight_scale": scale, "weight_offset": torch.zeros_like(scale), "bias": bias}
        for name, tensor in made.items():
            content[f"{layer}{wrapper}.{name}"] = tensor
            types[f"{layer}{wrapper}.{name}"] = "FLOAT" if name == "bias" else "W8A8_DYNAMIC"
        types = {name: kind for name, kind in types.items() if name in content}
        expected[ours] = codes.double() * scale.double()
    content["blocks.0.self_attn.q.div.mul_scale"] = torch.rand(64) + 0.5
    types["blocks.0.self_attn.q.div.mul_scale"] = "FLOAT"
    expected["blocks.0.attn1.to_q"] *= content["blocks.0.self_attn.q.div.mul_scale"].double()
    place = folder / "export" / "high_noise_model"
    place.mkdir(parents=True)
    save_file(content, place / "quant_model_weight_w8a8_dynamic.safetensors")
    description = {"model_quant_type": "W8A8_DYNAMIC", **types}
    (place / "quant_model_description_w8a8_dynamic.json").write_text(json.dumps(description))
    return model, expected


def load_wan(folder: Path) -> Any:
    config = AscendConfig(weights_folder=str(folder / "export" / "high_noise_model"))
    return load_component(
        str(folder / "pipeline"), "transformer", "diffusers", "WanTransformer3DModel", config, dtype=torch.float32
    )


@pytest.mark.parametrize("image", [False, True])
def test_wan_in_its_original_names(image: bool, tmp_path: Path) -> None:
    model, expected = wan_export(tmp_path, image)
    loaded = load_wan(tmp_path)
    layers = quantized_layers(loaded)
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        layer.leave_kernel()
        torch.testing.assert_close(layer.method.dequantize_weight(layer).double(), expected[name], rtol=1e-6, atol=0)
    found = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(found[name], tensor), name


def test_both_kinds_of_names_at_once_are_refused(tmp_path: Path) -> None:
    wan_export(tmp_path, image=False)
    place = tmp_path / "export" / "high_noise_model"
    file, notes = place / "quant_model_weight_w8a8_dynamic.safetensors", next(place.glob("*.json"))
    content, types = load_file(file), json.loads(notes.read_text())
    content["blocks.0.attn1.to_k.weight"] = content["blocks.0.self_attn.k.weight"].clone()
    types["blocks.0.attn1.to_k.weight"] = "FLOAT"
    save_file(content, file)
    notes.write_text(json.dumps(types))
    with pytest.raises(CheckpointError, match=r"high_noise_model: .*blocks.0.attn1.to_k.weight, blocks.0.self_attn.k"):
        load_wan(tmp_path)


def broken(folder: Path, change: Any) -> Path:
    write(folder, dynamic()[0], "W8A8_DYNAMIC")
    place = folder / "transformer"
    content, file = tensors(place), place / "quant_model_description.json"
    description = json.loads(file.read_text())
    change(content, description)
    save_file(content, place / "quant_model_weights.safetensors")
    file.write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c, d: d.pop(f"{LAYER}.weight"), CheckpointError, f"1 tensors have no type: {LAYER}.weight"),
        (lambda c, d: c.pop(f"{LAYER}.weight_scale"), CheckpointError, f"1 tensors are missing: {LAYER}.weight_scale"),
        (
            lambda c, d: (c.pop(f"{LAYER}.weight_scale"), d.pop(f"{LAYER}.weight_scale")),
            CheckpointError,
            f"1 missing: {LAYER}.weight_scale",
        ),
        (lambda c, d: d.update({f"{LAYER}.weight": "W4A8_DYNAMIC"}), UnsupportedError, "W4A8_DYNAMIC is not supported"),
        (
            lambda c, d: d.update({"norm_out.linear.bias": "FLOAT", "proj_out.bias": "FLOAT", "x.weight": "W8A8"}),
            CheckpointError,
            "1 tensors are missing: x.weight",
        ),
        (
            lambda c, d: d.update({"transformer_blocks.0.attn.norm_q.weight": "W8A8"}),
            CheckpointError,
            "gives types to what is no linear layer of the model: transformer_blocks.0.attn.norm_q",
        ),
        (
            lambda c, d: c.update({f"{LAYER}.weight_offset": torch.ones(N, 1)}),
            UnsupportedError,
            "weight_offset is not zero",
        ),
        (lambda c, d: c.update({f"{LAYER}.weight": torch.ones(N, K)}), CheckpointError, "weight: found float32"),
        (lambda c, d: c.update({f"{LAYER}.weight": torch.ones(N, 8, dtype=torch.int8)}), CheckpointError, "1 wrong"),
    ],
)
def test_broken_checkpoints_are_named(change: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        load(broken(tmp_path, change))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight", torch.ones((), dtype=torch.int8)),
        ("weight", torch.ones(N, K)),
        ("input_offset", torch.ones(N)),
        ("quant_bias", torch.ones(1, dtype=torch.int32)),
        ("deq_scale", torch.ones(N, dtype=torch.float16)),
        ("deq_scale", torch.ones(1)),
    ],
)
def test_what_a_bias_is_worked_out_from_is_checked(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    write(tmp_path, {**mix(BIAS)[0], name: tensor}, "W8A8_MIX", bias=None)
    with pytest.raises(CheckpointError, match=rf"1 wrong:\n  {LAYER}.{name}: found"):
        load(tmp_path)


def test_a_packed_weight_without_extents(tmp_path: Path) -> None:
    write(tmp_path, {**mxfp4()[0], "weight": torch.ones((), dtype=torch.uint8)}, "W4A4_MXFP4")
    with pytest.raises(CheckpointError, match=rf"1 wrong:\n.*{LAYER}.weight: found U8 \[\]"):
        load(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("ascend"), dynamic()[0], "W8A8_DYNAMIC")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_mutated_descriptions_give_errors_of_lowbits_own(checkpoint: Path, data: st.DataObject) -> None:
    file = checkpoint / "transformer" / "quant_model_description.json"
    whole = file.read_bytes()
    content = json.loads(whole)
    for name in data.draw(st.lists(st.sampled_from(sorted(content)), max_size=3)):
        action = data.draw(st.sampled_from(["drop", "replace", "type", "rename"]))
        value = content.pop(name, None)
        if action == "replace":
            content[name] = data.draw(JSON)
        elif action == "type":
            content[name] = data.draw(st.sampled_from(["FLOAT", "W8A8", "W8A8_MIX", "W4A4_MXFP4", "W8A16", "W4A16"]))
        elif action == "rename":
            content[data.draw(st.text(max_size=8))] = value
    raw = json.dumps(content).encode()
    cut = data.draw(st.integers(0, len(raw)) | st.just(len(raw)) | st.just(len(raw)))
    file.write_bytes(raw[:cut])
    try:
        load(checkpoint)
    except (CheckpointError, ConfigError, UnsupportedError):
        pass
    finally:
        file.write_bytes(whole)


# The first text drawn takes seconds on a busy machine: hypothesis builds its tables of characters.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options=st.dictionaries(st.sampled_from(["layer_types", "smoothed_layers", "weights_folder", "x"]), JSON))
def test_mutated_configurations_give_errors_of_lowbits_own(options: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError, UnsupportedError):
        build_quant_config({"quant_method": "ascend", **options})


def test_quantized_layers_can_not_be_ignored(tmp_path: Path) -> None:
    folder = write(tmp_path, dynamic()[0], "W8A8_DYNAMIC")
    config = described(folder / "transformer", AscendConfig(ignored_layers=["ff.net.2"]))
    assert config is not None
    with pytest.raises(ConfigError, match=rf"ignored_layers can't keep what .*json has quantized: {LAYER}"):
        load_component(str(folder), "transformer", "diffusers", "FluxTransformer2DModel", config, dtype=torch.float32)


def test_a_folder_without_description(tmp_path: Path) -> None:
    assert described(tmp_path, None) is None
    with pytest.raises(CheckpointError, match="has no quant_model_description"):
        open_weights(AscendConfig(weights_folder=str(tmp_path)), torch.nn.Linear(2, 2))
    for name in ("a", "b"):
        (tmp_path / f"quant_model_description_{name}.json").write_text("{}")
    with pytest.raises(CheckpointError, match="several descriptions"):
        described(tmp_path, None)


def test_reference_of_packed_values() -> None:
    elements = torch.arange(16, dtype=torch.uint8).reshape(1, 16)
    packed = elements[:, 0::2] | (elements[:, 1::2] << 4)
    assert torch.equal(decode_e2m1_pairs(packed).flatten().double(), E2M1)
