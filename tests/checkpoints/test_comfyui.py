"""ComfyUI's single files: written here, and with tensors as comfy-kitchen makes them, as weights of small models."""

from __future__ import annotations

import copy
import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lowbit.checkpoints.comfyui.write import export_comfyui
from lowbit.checkpoints.external import load_component
from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.ops import nvfp4
from lowbit.ops.comfyui import comfyui_dequantize
from lowbit.ops.fp8 import E4M3
from lowbit.quantization import ComfyUiConfig, QuantizedLinear
from tests.support.comfyui_files import FORMATS, METADATA, fp8_layer
from tests.support.models import FAMILIES, relative_error, same_but_for_order, same_bytes, save


class Model:
    """A model in float32 in its folder; ``load`` gives it the weights of a file."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.family = FAMILIES[name]
        self.model = self.family.make()
        self.class_name = type(self.model).__name__
        self.folder = save(self.model, folder / "transformer", torch.float32)
        self.path = folder / "model.safetensors"

    def load(self, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        config = ComfyUiConfig(comfyui_model=str(self.path), **options)
        source = str(self.folder.parent)
        return load_component(source, "transformer", "diffusers", self.class_name, config, dtype=dtype)


def decoded(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            layer.leave_kernel()
            found[f"{name}.weight"] = layer.method.dequantize_weight(layer)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    made = Model(name, tmp_path)
    manifest = export_comfyui(made.folder, made.class_name, ComfyUiConfig(), made.path)
    stored = load_file(made.path)
    with safe_open(str(made.path), framework="pt") as opened:
        metadata = json.loads(opened.metadata()[METADATA])
    assert metadata["format_version"] == "1.0"
    assert set(metadata["layers"]) == {
        key.removesuffix("_scale").removesuffix(".weight") for key in stored if key.endswith("_scale")
    }
    for layer, values in metadata["layers"].items():
        assert values == {"format": "float8_e4m3fn"}
        assert stored[f"{layer}.weight"].dtype == E4M3
        assert stored[f"{layer}.weight_scale"].shape == ()
    loaded = made.load()
    quantized = {record.name for record in loaded.lowbit_manifest.quantized}
    assert quantized == {record.name for record in manifest.quantized}
    found, original = decoded(loaded), made.model.state_dict()
    assert found.keys() - {key for key in found if key.endswith("_scale")} == original.keys()
    # Every file weight is the e4m3 rounding of the rows that the layers of the model have, under one scale.
    for key in original:
        layer = key.removesuffix(".weight")
        if layer not in quantized:
            assert torch.equal(found[key], original[key].float()), key
            continue
        scale = loaded.state_dict()[f"{layer}.weight_scale"]
        assert len(scale.unique()) == 1
        expected = (original[key].float() / scale).to(E4M3).float() * scale
        assert torch.equal(found[key], expected), key
        assert any(torch.equal(scale[0, 0], stored[name]) for name in stored if name.endswith("weight_scale"))
    loaded.save_pretrained(tmp_path / "saved")
    again = type(loaded).from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    assert same_bytes(again.state_dict(), loaded.state_dict())
    assert same_but_for_order(made.family.run(again), made.family.run(made.load()))


LAYERS = ("transformer_blocks.0.img_mlp.net.2", "transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2")
PREFIX = "model.diffusion_model."


def write(made: Model, kind: str, how: str = "metadata", prefix: str = PREFIX) -> None:
    """Write the model with some layers in a format, said in the header's metadata or in markers."""
    quantize, config = FORMATS[kind]
    found = {f"{prefix}{name}": tensor.contiguous() for name, tensor in made.model.state_dict().items()}
    for layer in LAYERS:
        for tensor, value in quantize(found.pop(f"{prefix}{layer}.weight")).items():
            found[f"{prefix}{layer}.{tensor}"] = value.contiguous()
        if how == "markers":
            found[f"{prefix}{layer}.comfy_quant"] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    if prefix:
        found["vae.decoder.weight"] = torch.zeros(2)  # of another model
    layers = {f"{prefix}{layer}": config for layer in LAYERS}
    metadata = {METADATA: json.dumps({"format_version": "1.0", "layers": layers})} if how == "metadata" else {}
    save_file(found, made.path, metadata)


@pytest.mark.parametrize("how", ["metadata", "markers"])
@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_read(kind: str, how: str, tmp_path: Path) -> None:
    made = Model("qwen-image", tmp_path)
    write(made, kind, how, PREFIX if how == "metadata" else "")
    loaded = made.load()
    quantized = {record.name: record.method for record in loaded.lowbit_manifest.quantized}
    assert set(quantized) == set(LAYERS)
    bound = 0.2 if "nvfp4" in kind else 0.05
    original = made.model.state_dict()
    output = made.family.run(loaded)
    found = decoded(loaded)
    for layer in LAYERS:
        assert 1e-4 < relative_error(found[f"{layer}.weight"], original[f"{layer}.weight"].detach()) < bound
    ignored = made.load(ignored_layers=["img_mlp"])
    assert len(ignored.lowbit_manifest.quantized) == 1
    dense = ignored.state_dict()[f"{LAYERS[0]}.weight"]
    assert torch.allclose(dense, found[f"{LAYERS[0]}.weight"], rtol=1e-5, atol=1e-7)
    reference = made.family.make().float()
    reference.load_state_dict({name: tensor for name, tensor in found.items() if name in original})
    # Activations are rounded too, except by weight-only kernels.
    assert relative_error(output, made.family.run(reference.eval())) < 0.1
    loaded.save_pretrained(tmp_path / "saved")
    again = type(loaded).from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    assert same_bytes(again.state_dict(), loaded.state_dict())
    assert same_but_for_order(made.family.run(again), output)


def test_layers_that_nothing_names_are_told_by_their_tensors(tmp_path: Path) -> None:
    """Plain e4m3, scaled e4m3 of earlier files, and Black Forest Labs' two layouts."""
    from diffusers.quantizers.bfl import utils as bfl

    made = Model("qwen-image", tmp_path)
    found = dict(made.model.state_dict())
    plain, scaled, fourth = LAYERS
    fp8r = "transformer_blocks.1.attn.to_q"
    weights = {layer: found.pop(f"{layer}.weight") for layer in (*LAYERS, fp8r)}
    found[f"{plain}.weight"] = weights[plain].to(E4M3)
    old = fp8_layer(weights[scaled])
    found.update({f"{scaled}.weight": old["weight"], f"{scaled}.scale_weight": old["weight_scale"]})
    found["scaled_fp8"] = torch.zeros(2).to(E4M3)
    rows = bfl.quantize_fp8r(weights[fp8r])
    found.update({f"{fp8r}.weight": rows[0], f"{fp8r}.weight_scale": rows[1]})
    packed = bfl.quantize_nvfp4(weights[fourth])
    found.update(
        dict(zip((f"{fourth}.weight", f"{fourth}.weight_scale", f"{fourth}.weight_scale_2"), packed, strict=True))
    )
    found[f"{fourth}.input_scale"] = torch.tensor(0.001)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, made.path)
    loaded = made.load()
    result = decoded(loaded)
    assert torch.equal(result[f"{plain}.weight"], weights[plain].to(E4M3).float())
    assert torch.equal(result[f"{scaled}.weight"], old["weight"].float() * old["weight_scale"])
    assert torch.equal(result[f"{fp8r}.weight"], bfl.dequantize_fp8r(*rows))
    assert torch.equal(result[f"{fourth}.weight"], nvfp4.dequantize_nvfp4(*packed))
    assert loaded.get_submodule(fourth).method.activation_scheme == "static"


def test_fused_layers_are_split(tmp_path: Path) -> None:
    """Z-Image's reference has one qkv layer; scales per row and blocked ones are cut like the rows."""
    made = Model("z-image", tmp_path)
    export_comfyui(made.folder, made.class_name, ComfyUiConfig(), made.path)
    found = load_file(made.path)
    layers, original = {}, made.model.state_dict()
    fused = {
        name: torch.cat([original[f"layers.0.attention.to_{part}.weight"] for part in "qkv"]) for name in ["layers.0"]
    }
    for kind in ("int8 rows", "nvfp4", "mxfp8"):
        quantize, config = FORMATS[kind]
        key = "layers.0.attention.qkv"
        tensors = {name: tensor for name, tensor in found.items() if not name.startswith(f"{key}.weight")}
        tensors.update({f"{key}.{name}": tensor for name, tensor in quantize(fused["layers.0"]).items()})
        layers = {n.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for n in found if n.endswith("_scale")}
        layers[key] = config
        save_file(tensors, made.path, {METADATA: json.dumps({"layers": layers})})
        loaded = made.load()
        whole = comfyui_dequantize(
            config["format"],
            tensors[f"{key}.weight"],
            tensors[f"{key}.weight_scale"],
            tensors.get(f"{key}.weight_scale_2"),
        )
        result = decoded(loaded)
        parts = torch.cat([result[f"layers.0.attention.to_{part}.weight"] for part in "qkv"])
        assert torch.equal(parts, whole[:, : parts.shape[1]]), kind


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": "int8_blockwise"}, UnsupportedError, "'int8_blockwise' is not read; those read are float8_e4m3fn"),
        ({"format": "svdquant_w4a4"}, UnsupportedError, "'svdquant_w4a4' is not read"),
        ({}, UnsupportedError, "format 'None' is not read"),
        ({"format": "nvfp4"}, CheckpointError, "net.2.weight: found I8"),
        (
            {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 100},
            UnsupportedError,
            "convrot_groupsize",
        ),
        ({"format": "int8_tensorwise", "convrot": True}, CheckpointError, "can't have been rotated in groups of 256"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": "x"}, UnsupportedError, "whole number"),
    ],
)
def test_formats_that_make_no_sense_are_named(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    made = Model("qwen-image", tmp_path)
    write(made, "int8 rows", "none", "")
    # Attention's 64 input channels are no multiple of 256.
    layers = {
        layer: change if layer == LAYERS[1] or "convrot" not in change else {"format": "int8_tensorwise"}
        for layer in LAYERS
    }
    save_file(load_file(made.path), made.path, {METADATA: json.dumps({"layers": layers})})
    with pytest.raises(error, match=message):
        made.load()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
        ("[" * 5000, "is not JSON"),
        ('{"layers": [1]}', "no object of objects"),
        ('{"layers": {"nothing": {"format": "nvfp4"}}}', "names nothing, which the file lacks"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(metadata: str, message: str, tmp_path: Path) -> None:
    made = Model("qwen-image", tmp_path)
    write(made, "fp8", "none", "")
    save_file(load_file(made.path), made.path, {METADATA: metadata})
    with pytest.raises(CheckpointError, match=message):
        made.load()


def test_other_mistakes(tmp_path: Path) -> None:
    made = Model("qwen-image", tmp_path)
    with pytest.raises(ConfigError, match="there is no file"):
        made.load()
    write(made, "nvfp4", "metadata", "")
    found = load_file(made.path)
    del found[f"{LAYERS[0]}.weight_scale_2"]
    found[f"{LAYERS[1]}.weight_scale"] = torch.zeros(3, dtype=torch.uint8)
    with safe_open(str(made.path), framework="pt") as opened:
        metadata = opened.metadata()
    save_file(found, made.path, metadata)
    with pytest.raises(CheckpointError, match=r"(?s)2 problems.*weight_scale: found U8 .3.*weight_scale_2 is missing"):
        made.load()
    with pytest.raises(ConfigError, match="leave comfyui_model"):
        export_comfyui(made.folder, made.class_name, ComfyUiConfig(comfyui_model="x"), tmp_path / "y.safetensors")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    made = Model("qwen-image", tmp_path_factory.mktemp("fuzz"))
    write(made, "convrot", "markers", "")
    save_file(load_file(made.path), made.path, {METADATA: json.dumps({"layers": {LAYERS[0]: FORMATS["convrot"][1]}})})
    return made


def header_of(path: Path) -> tuple[bytes, bytes]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return data[8 : 8 + size], data[8 + size :]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_mutated_headers_give_an_error_of_ours_or_load(small: Model, data: st.DataObject) -> None:
    header, body = header_of(small.path)
    changed = bytearray(header)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place] = data.draw(st.sampled_from([*b'0123456789"{}[],:FUI_x', 0, 255]))
    self_made = copy.copy(small)
    self_made.path = small.path.with_name("mutated.safetensors")
    self_made.path.write_bytes(struct.pack("<Q", len(changed)) + bytes(changed) + body)
    with suppress(CheckpointError, UnsupportedError, ConfigError):
        self_made.load()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["int8_tensorwise", "nvfp4", "mxfp8", "float8_e4m3fn", LAYERS[0]]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["layers", "format", "convrot", "convrot_groupsize", "params", *LAYERS])
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=30, deadline=None)
@given(metadata=json_values, marker=json_values)
def test_any_json_gives_an_error_of_ours_or_loads(small: Model, metadata: Any, marker: Any) -> None:
    self_made = copy.copy(small)
    self_made.path = small.path.with_name("json.safetensors")
    found = load_file(small.path)
    found[f"{LAYERS[0]}.comfy_quant"] = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
    save_file(found, self_made.path, {METADATA: json.dumps(metadata)})
    with suppress(CheckpointError, UnsupportedError, ConfigError):
        self_made.load()


@pytest.mark.parametrize("how", ["metadata", "nothing"])
@pytest.mark.parametrize("spelling", ["weight_scale", "scale_weight"])
def test_a_layer_that_lost_its_scale_is_named(how: str, spelling: str, tmp_path: Path) -> None:
    made = Model("qwen-image", tmp_path)
    write(made, "fp8", "markers" if how == "nothing" else how, "")
    with safe_open(str(made.path), framework="pt") as opened:
        metadata = opened.metadata() or {}
    found = {name: tensor for name, tensor in load_file(made.path).items() if not name.endswith("comfy_quant")}
    found = {name.replace("weight_scale", spelling): tensor for name, tensor in found.items()}
    del found[f"{LAYERS[1]}.{spelling}"]
    save_file(found, made.path, metadata if how == "metadata" else {})
    with pytest.raises(CheckpointError, match=rf"{LAYERS[1]}(\.weight_scale is missing|\.weight \(.*without a scale)"):
        made.load()


def test_a_cast_layer_among_scaled_ones_is_read(tmp_path: Path) -> None:
    """Its magnitudes say that its codes are values."""
    made = Model("qwen-image", tmp_path)
    write(made, "fp8", "markers", "")
    found = {name: tensor for name, tensor in load_file(made.path).items() if not name.endswith("comfy_quant")}
    original = made.model.state_dict()[f"{LAYERS[1]}.weight"]
    found[f"{LAYERS[1]}.weight"] = original.to(E4M3)
    del found[f"{LAYERS[1]}.weight_scale"]
    save_file(found, made.path)
    assert torch.equal(decoded(made.load())[f"{LAYERS[1]}.weight"], original.to(E4M3).float())


def test_a_file_without_any_scale_that_was_scaled_is_refused(tmp_path: Path) -> None:
    made = Model("qwen-image", tmp_path)
    write(made, "fp8", "markers", "")
    kept = ("comfy_quant", "weight_scale")
    save_file({name: tensor for name, tensor in load_file(made.path).items() if not name.endswith(kept)}, made.path)
    with pytest.raises(CheckpointError, match=r"no tensor has a scale, and weights reach 448"):
        made.load()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_file_that_was_cast_is_read(name: str, tmp_path: Path) -> None:
    """Norms, biases, embeddings and Wan's convolution in five dimensions as well."""
    made = Model(name, tmp_path)
    original = made.model.state_dict()
    save_file({name: tensor.to(E4M3).contiguous() for name, tensor in original.items()}, made.path)
    found = decoded(made.load())
    for key, tensor in original.items():
        assert torch.equal(found[key], tensor.to(E4M3).float()), key


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_integers_that_are_no_weight_are_not_taken_for_values(dtype: torch.dtype, tmp_path: Path) -> None:
    made = Model("qwen-image", tmp_path)
    write(made, "fp8", "metadata", "")
    with safe_open(str(made.path), framework="pt") as opened:
        metadata = opened.metadata()
    found = load_file(made.path)
    found[f"{LAYERS[1]}.bias"] = torch.ones_like(found[f"{LAYERS[1]}.bias"]).to(dtype)
    save_file(found, made.path, metadata)
    with pytest.raises(CheckpointError, match=rf"1 tensors are codes and not values: {LAYERS[1]}\.bias"):
        made.load()


SPELLINGS = ("weight_scale", "scale_weight", "weight_scale_inv", "scale", "weight.scale", "scale_inv")
# Rows and columns that share a scale; None: all.
BLOCKS = {
    "tensor": None,
    "row": (1, 1 << 20),
    "128": (128, 128),
    "32": (32, 32),
    "groups": (1, 32),
    "columns": (64, 16),
}


def in_blocks(
    weight: torch.Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return e4m3 codes, scales as a file has them, and the values they stand for, exact but for one rounding."""
    rows, columns = weight.shape if block is None else (min(block[0], len(weight)), min(block[1], weight.shape[1]))
    tiles = weight.double().unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    scale = (tiles.abs().amax((1, 3)) / 448).to(dtype)
    wide = scale.double()[:, None, :, None]
    elements = (tiles / wide).float().clamp(-448, 448).to(E4M3)
    values = (elements.double() * wide).reshape(weight.shape)
    return elements.reshape(weight.shape), scale[0, 0] if block is None else scale, values.float()


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("shape", BLOCKS)
def test_every_spelling_and_shape_of_a_scale(spelling: str, shape: str, tmp_path: Path) -> None:
    made = Model("qwen-image", tmp_path)
    found = {name: tensor.contiguous() for name, tensor in made.model.state_dict().items()}
    expected = {}
    for layer, dtype in zip(LAYERS, (torch.float32, torch.bfloat16, torch.float16), strict=True):
        weight = 100 * found[f"{layer}.weight"]  # scales that float16 has
        codes, scale, values = in_blocks(weight, BLOCKS[shape], dtype)
        found.update({f"{layer}.weight": codes, f"{layer}.{spelling}": scale})
        expected[f"{layer}.weight"] = values
    save_file(found, made.path)
    loaded = made.load()
    for name, values in expected.items():
        assert isinstance(loaded.get_submodule(name.removesuffix(".weight")), QuantizedLinear)
        assert torch.equal(decoded(loaded)[name], values), name
    made.model.load_state_dict({**made.model.state_dict(), **expected})
    assert relative_error(made.family.run(made.load()), made.family.run(made.model)) < 0.1
    loaded.save_pretrained(tmp_path / "saved")
    again = type(loaded).from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    assert same_bytes(again.state_dict(), loaded.state_dict())


def test_scales_that_fit_no_block_and_two_spellings_are_named(tmp_path: Path) -> None:
    made = Model("qwen-image", tmp_path)
    layer = LAYERS[0]
    found = {name: tensor.contiguous() for name, tensor in made.model.state_dict().items()}
    found[f"{layer}.weight"] = found[f"{layer}.weight"].to(E4M3)
    for shape in ((3, 2), (64, 3), (2, 64)):
        save_file({**found, f"{layer}.weight_scale": torch.ones(shape)}, made.path)
        with pytest.raises(UnsupportedError, match=rf"{layer}: F32 .* is no scale of blocks"):
            made.load()
    save_file({**found, f"{layer}.weight_scale": torch.ones(()), f"{layer}.scale_weight": torch.ones(())}, made.path)
    with pytest.raises(
        CheckpointError, match=r"scale_weight and .*weight_scale are both|weight_scale and .*scale_weight are both"
    ):
        made.load()


@pytest.mark.parametrize("scaled", [False, True])
def test_e5m2_is_decoded_and_said(scaled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Model("qwen-image", tmp_path)
    original = made.model.state_dict()
    found = {name: tensor.to(torch.float8_e5m2).contiguous() for name, tensor in original.items()}
    expected = {name: tensor.float() for name, tensor in found.items()}
    if scaled:
        for layer in LAYERS:
            found[f"{layer}.scale_weight"] = torch.tensor(3.0)
            expected[f"{layer}.weight"] = 3 * expected[f"{layer}.weight"]
    save_file(found, made.path)
    loaded = made.load()
    assert same_bytes(dict(loaded.state_dict()), expected)
    assert "in float8_e5m2 are decoded" in caplog.text


def test_a_file_in_which_nothing_is_quantized_loads_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Model("qwen-image", tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in made.model.state_dict().items()}, made.path)
    assert same_bytes(dict(made.load().state_dict()), dict(made.model.state_dict()))
    assert f"{made.path}: no layer is quantized" in caplog.text
    with pytest.raises(ConfigError, match="applies to no linear layer"):
        made.load(ignored_layers=["transformer_blocks"])


def test_a_scale_beside_values_is_applied(tmp_path: Path) -> None:
    made = Model("qwen-image", tmp_path)
    write(made, "fp8", "metadata", "")
    layer, found = "transformer_blocks.0.attn.to_k", load_file(made.path)
    with safe_open(str(made.path), framework="pt") as opened:
        metadata = opened.metadata()
    weight = found[f"{layer}.weight"] = found[f"{layer}.weight"].to(torch.bfloat16)
    found[f"{layer}.scale_weight"] = torch.tensor([0.5])
    save_file(found, made.path, metadata)
    assert torch.equal(made.load().state_dict()[f"{layer}.weight"], weight.float() / 2)


@pytest.mark.parametrize("prefix", ["net.", "transformer.", "model.diffusion_model." * 2, "diffusion_model.net."])
def test_prefixes(prefix: str, tmp_path: Path) -> None:
    made = Model("qwen-image", tmp_path)
    write(made, "fp8", "markers", "")
    plain = made.load().state_dict()
    save_file({f"{prefix}{name}": tensor for name, tensor in load_file(made.path).items()}, made.path)
    assert same_bytes(made.load().state_dict(), plain)


def test_markers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One says how references are modulated; others are named, unless they might be a scale that lost its layer."""
    made = Model("qwen-image", tmp_path)
    write(made, "fp8", "markers")
    found = load_file(made.path)
    assert not made.load().config.zero_cond_t
    save_file({**found, f"{PREFIX}__index_timestep_zero__": torch.zeros(0)}, made.path)
    loaded = made.load()
    assert loaded.config.zero_cond_t
    assert loaded.zero_cond_t
    assert all(block.zero_cond_t for block in loaded.transformer_blocks)
    assert not caplog.records or "hold nothing" not in caplog.text
    save_file({**found, f"{PREFIX}made_by": torch.zeros(()), f"{PREFIX}other": torch.zeros(0, 3)}, made.path)
    made.load()
    assert "hold nothing, such as markers: made_by, other" in caplog.text
    save_file({**found, f"{PREFIX}lost.weight_scale": torch.ones(())}, made.path)
    with pytest.raises(CheckpointError, match="1 unexpected: lost.weight_scale"):
        made.load()


def test_a_marker_of_another_model_is_refused(tmp_path: Path) -> None:
    made = Model("z-image", tmp_path)
    found = {name: tensor.to(E4M3).contiguous() for name, tensor in made.model.state_dict().items()}
    save_file({**found, "__index_timestep_zero__": torch.zeros(0)}, made.path)
    with pytest.raises(
        CheckpointError, match="made for a model with zero_cond_t, which ZImageTransformer2DModel has not"
    ):
        made.load()
