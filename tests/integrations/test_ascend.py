"""msModelSlim's checkpoints: written here from its published layouts, in float64; no tool of its own runs here."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lowbit.engine.config import OmniDiffusionConfig
from lowbit.engine.loading import load_pipeline
from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.integrations.ascend import described, open_weights
from lowbit.integrations.foreign import load_component
from lowbit.models.embedded import embedded_model
from lowbit.ops.e2m1 import decode_e2m1_pairs
from lowbit.ops.int8 import quantize_int8_per_token
from lowbit.quantization import AscendConfig, build_quant_config
from lowbit.quantization.plan import quantized_layers
from tests.integrations.models import FAMILIES, stored_config, tensors

FLUX = FAMILIES["flux"]
LAYER = "transformer_blocks.0.ff.net.2"  # [64, 256]
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
N, K = 64, 256


def scales(groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """E8M0 codes uint8 [N, groups] and their values per group."""
    codes = torch.randint(118, 124, (N, groups), dtype=torch.uint8)
    return codes, torch.exp2(codes.double() - 127)


def per_channel() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N, 1) * 1e-3 + 1e-4


def dynamic() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    weight, scale = per_channel()
    return (
        {"weight": weight, "weight_scale": scale, "weight_offset": torch.zeros(N, 1)},
        weight.double() * scale.double(),
    )


def static(bias: torch.Tensor, bits: bool = False, offset: float = -11.0) -> tuple[dict[str, torch.Tensor], Any]:
    weight, weight_scale = per_channel()
    input_scale = torch.tensor([0.02])
    deq_scale = (input_scale * weight_scale.flatten()).float()
    sums = weight.double().sum(1)
    quant_bias = (bias.double() / deq_scale.double() - sums * offset).round().to(torch.int32)
    stored = deq_scale.view(torch.int32).long() if bits else deq_scale
    parts = {"input_scale": input_scale, "input_offset": torch.tensor([offset]), "quant_bias": quant_bias}

    def expected(x: torch.Tensor) -> torch.Tensor:
        q = ((x.float() / 0.02).double().round() + offset).clamp(-128, 127)
        return (q @ weight.double().t() + quant_bias.double()) * deq_scale.double()

    return {"weight": weight, "deq_scale": stored, **parts}, expected


def mix(bias: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    parts, _ = static(bias)
    scale = (parts["deq_scale"] / parts["input_scale"]).unsqueeze(1)
    stored = {**parts, "weight_scale": scale, "weight_offset": torch.zeros(N, 1)}
    return stored, parts["weight"].double() * scale.double()


def mxfp8() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, values = scales(K // 32)
    weight = torch.randn(N, K).to(torch.float8_e4m3fn)
    return {"weight": weight, "weight_scale": codes}, weight.double() * values.repeat_interleave(32, 1)


def mxfp4(unpacked: bool = False, dual: bool = False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, values = scales(K // 32)
    elements = torch.randint(0, 16, (N, K))
    packed = (elements[:, 0::2] | (elements[:, 1::2] << 4)).to(torch.uint8)
    numbers = E2M1[elements]
    weight = numbers.to(torch.float8_e4m3fn) if unpacked else packed
    decoded = numbers * values.repeat_interleave(32, 1)
    if not dual:
        return {"weight": weight, "weight_scale": codes}, decoded
    second = torch.rand(N, 1, 1) + 0.5
    return {"weight": weight, "weight_scale": codes, "weight_dual_scale": second}, decoded * second.double()[:, :, 0]


def fp8() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    weight, scale = torch.randn(N, K).to(torch.float8_e4m3fn), torch.rand(N, 1) + 0.1
    return {"weight": weight, "weight_scale": scale}, weight.double() * scale.double()


BIAS = torch.linspace(-1, 1, N)
LAYERS: dict[str, tuple[str, Any]] = {
    "dynamic": ("W8A8_DYNAMIC", dynamic),
    "w8a16": ("W8A16", dynamic),
    "mix": ("W8A8_MIX", lambda: mix(BIAS)),
    "mxfp8": ("W8A8_MXFP8", mxfp8),
    "mxfp4": ("W4A4_MXFP4", mxfp4),
    "mxfp4-unpacked": ("W4A4_MXFP4", lambda: mxfp4(unpacked=True)),
    "dualscale": ("W4A4_MXFP4_DUALSCALE", lambda: mxfp4(dual=True)),
    "dualscale-unpacked": ("W4A4_MXFP4_DUALSCALE", lambda: mxfp4(unpacked=True, dual=True)),
    "fp8": ("WFP8AFP8_DYNAMIC", fp8),
}


def write(
    folder: Path,
    layer: dict[str, torch.Tensor],
    kind: str,
    *,
    bias: torch.Tensor | None = BIAS,
    mul_scale: torch.Tensor | None = None,
    mindie: bool = False,
) -> Path:
    """Write a pipeline's folder whose transformer is msModelSlim's, with one quantized layer."""
    torch.manual_seed(0)
    model = FLUX.make().to(torch.bfloat16)
    place = folder / "transformer"
    place.mkdir(parents=True)
    model.save_config(place)
    content = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{LAYER}.")}
    types = dict.fromkeys(content, "FLOAT")
    inner = LAYER if mul_scale is None else f"{LAYER}.linear"
    for name, tensor in layer.items():
        content[f"{inner}.{name}"], types[f"{inner}.{name}"] = tensor, kind
    if bias is not None:
        content[f"{inner}.bias"], types[f"{inner}.bias"] = bias, "FLOAT"
    if mul_scale is not None:
        content[f"{LAYER}.div.mul_scale"], types[f"{LAYER}.div.mul_scale"] = mul_scale, "FLOAT"
    suffix = ("_w8a8", "weight") if mindie else ("", "weights")
    description = {"version": "1.0.0", "model_quant_type": kind, "group_size": 0, **types}
    (place / f"quant_model_description{suffix[0]}.json").write_text(json.dumps(description))
    save_file(
        {k: v.contiguous() for k, v in content.items()}, place / f"quant_model_{suffix[1]}{suffix[0]}.safetensors"
    )
    return folder


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
    with pytest.raises(ConfigError, match="already quantized with 'ascend'.*'int8'"):
        load_pipeline(OmniDiffusionConfig(model=str(tmp_path), quantization_config="int8"))
    with pytest.raises(ConfigError, match="already quantized with 'ascend'.*'torchao'"):
        load_pipeline(OmniDiffusionConfig(model=str(tmp_path), quantization_config="torchao"))
    with pytest.raises(ConfigError, match="ascend is read, not made"):
        load_pipeline(OmniDiffusionConfig(model=None, quantization_config="ascend"))


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
