"""ModelOpt's checkpoints: what ``nvidia-modelopt`` exported (scripts/fixtures), and what lowbit writes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.hosts.preflight import check_component
from lowbit.hosts.routing import claims
from lowbit.quantization import ModelOptConfig, QuantizedLinear, build_quant_config, quantize_model
from lowbit.quantization.calibration.static import calibration
from lowbit.quantization.plan import quantized_layers
from tests.support.modelopt import FIXTURES, complete
from tests.support.models import FAMILIES, stored_config, tensors


def load(folder: Path, **options: Any) -> Any:
    kind = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    return kind.from_pretrained(folder, torch_dtype=torch.bfloat16, **options)


def layer_input(columns: int) -> torch.Tensor:
    """The input that the fixtures' outputs were made with (scripts/fixtures/export_modelopt.py)."""
    return (torch.arange(3 * columns, dtype=torch.float32) * 0.7).sin().reshape(3, columns).to(torch.bfloat16)


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
class TestExports:
    def test_weights_decode_as_modelopt_decodes_them(self, fixture: Path, tmp_path: Path) -> None:
        expected = json.loads((fixture / "expected.json").read_text())
        model = load(complete(fixture, tmp_path / "model"))
        layers = quantized_layers(model)
        assert sorted(layers) == sorted(expected["weights"])
        for name, layer in layers.items():
            # Of NVFP4_SVD modelopt decodes the part that is NVFP4.
            decode: Any = type(layer.method).__mro__[1 if "svd" in fixture.name else 0]
            weight = decode.dequantize_weight(layer.method, layer)
            assert hashlib.sha256((weight + 0.0).numpy().tobytes()).hexdigest() == expected["weights"][name], name

    def test_layers_compute_what_modelopt_simulates(self, fixture: Path, tmp_path: Path) -> None:
        expected = json.loads((fixture / "expected.json").read_text())
        folder = complete(fixture, tmp_path / "model")
        stored = json.loads((folder / "config.json").read_text())["quantization_config"]
        config = build_quant_config({**stored, "kernel": "reference"})
        layers = quantized_layers(load(folder, quantization_config=config))
        assert layers.keys() == expected["weights"].keys()
        for name, layer in layers.items():
            theirs = torch.tensor(expected["outputs"][name]).reshape(3, -1)
            ours = layer(layer_input(layer.in_features).float())
            # modelopt exports FP8 codes rounded in bfloat16, and simulates with others, rounded in float32.
            bound = 0.03 if layer.method.name == "fp8" else 1e-5
            assert (ours - theirs).norm() < bound * theirs.norm(), name

    def test_what_was_read_is_written_and_read_again(self, fixture: Path, tmp_path: Path) -> None:
        folder = complete(fixture, tmp_path / "model")
        model = load(folder)
        model.save_pretrained(tmp_path / "again")
        before, after = tensors(folder), tensors(tmp_path / "again")
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            if name.rpartition(".")[0] not in quantized_layers(model):
                continue  # of the rest diffusers keeps some in float32
            assert tensor.dtype == after[name].dtype, name
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8)), name
        assert stored_config(tmp_path / "again")["quant_algo"] == stored_config(folder)["quant_algo"]
        again = quantized_layers(load(tmp_path / "again"))
        assert again.keys() == quantized_layers(model).keys()

    def test_a_separate_configuration_is_found(self, fixture: Path, tmp_path: Path) -> None:
        folder = complete(fixture, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        stored = config.pop("quantization_config")
        (folder / "config.json").write_text(json.dumps(config))
        names = {"ignore": "exclude_modules"}
        inner = {names.get(k, k): v for k, v in stored.items() if k in ("ignore", "quant_algo", "quantized_layers")}
        if stored["quant_algo"] == "NVFP4_SVD":
            inner["lora_rank"] = 8
        (folder / "hf_quant_config.json").write_text(
            json.dumps({"producer": stored["producer"], "quantization": inner})
        )
        check_component(folder)
        file = json.loads((folder / "hf_quant_config.json").read_text())
        model = load(folder, quantization_config=build_quant_config({**file, "method": "modelopt"}))
        assert len(quantized_layers(model)) == 2


SIMPLE = next(path for path in FIXTURES if path.name == "flux-nvfp4")


def broken(tmp_path: Path, change: Any) -> Path:
    folder = complete(SIMPLE, tmp_path / "broken")
    (file,) = folder.glob("*.safetensors")
    content = load_file(file)
    change(content)
    save_file(content, file, {"format": "pt"})
    return folder


LAYER = "transformer_blocks.0.attn.to_q"


def replaced(name: str, make: Any) -> Any:
    return lambda content: content.update({f"{LAYER}.{name}": make(content[f"{LAYER}.{name}"])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop(f"{LAYER}.weight_scale"), rf"1 missing: {LAYER}.weight_scale"),
        (lambda content: content.pop(f"{LAYER}.input_scale"), rf"1 missing: {LAYER}.input_scale"),
        (replaced("weight", lambda t: t[:, 1:].clone()), rf"{LAYER}.weight: found uint8 \[64, 31\], nvfp4 needs"),
        (replaced("weight", lambda t: t.to(torch.int8)), rf"{LAYER}.weight: found int8"),
        (replaced("weight_scale", lambda t: t.float()), rf"{LAYER}.weight_scale: found float32 \[64, 4\]"),
        (
            replaced("weight_scale", lambda t: torch.full_like(t, torch.nan)),
            "diffusion_pytorch_model.*weight_scale: 256",
        ),
        (
            replaced("weight_scale_2", lambda t: t * 0),
            rf"diffusion_pytorch_model.*{LAYER}.weight_scale_2: 1 of 1 values",
        ),
        (replaced("weight_scale_2", lambda t: t * torch.nan), "must be finite and above zero; the first is nan"),
        (replaced("input_scale", lambda t: t * torch.inf), "input_scale: 1 of 1 values must be finite"),
    ],
)
def test_broken_checkpoints_name_file_and_tensor(change: Any, message: str, tmp_path: Path) -> None:
    folder = broken(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_diffusers_own_modelopt_is_left_to_diffusers() -> None:
    theirs = {"quant_method": "modelopt", "quant_type": "FP8", "modelopt_config": {}}
    ours = json.loads((SIMPLE / "config.json").read_text())["quantization_config"]
    assert not claims(theirs, {"modelopt"})
    assert claims(ours, {"modelopt"})
    assert claims({"quant_method": "modelopt", "producer": {}, "quantization": {"quant_algo": "FP8"}}, {"modelopt"})


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4", "W4A16_NVFP4", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8"])
def test_written_checkpoints_have_modelopts_tensors_and_keys(algorithm: str, tmp_path: Path) -> None:
    family = FAMILIES["flux"]
    torch.manual_seed(0)
    model = family.make().to(torch.bfloat16)
    quantize_model(model, "modelopt", quant_algo=algorithm)
    if algorithm in ("FP8", "NVFP4"):
        with pytest.raises(ConfigError, match="no input_scale yet"):
            model.save_pretrained(tmp_path / "early")
        with calibration(model):
            family.run(model)
    model.save_pretrained(tmp_path / "ours")
    (fixture,) = (path for path in FIXTURES if path.name == f"flux-{algorithm.lower()}")
    theirs, written = stored_config(fixture), stored_config(tmp_path / "ours")
    assert written["quant_algo"] == theirs["quant_algo"]
    assert written["quant_method"] == "modelopt"
    assert written.get("config_groups") == theirs.get("config_groups", written.get("config_groups"))
    (file,) = fixture.glob("*.safetensors")
    for name, tensor in load_file(file).items():
        ours = tensors(tmp_path / "ours")[name]
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape), name
    output, again = family.run(model), load(tmp_path / "ours")
    assert torch.equal(family.run(again), output)
    assert "single_transformer_blocks.0.norm.linear" in written["ignore"]


def test_patterns_match_whole_names() -> None:
    config = build_quant_config(
        {"method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}, "ignore": ["proj_out*", "a.b"]}
    )
    assert isinstance(config, ModelOptConfig)
    assert config.is_ignored("proj_out")
    assert config.is_ignored("proj_out.linear")
    assert config.is_ignored("a.b.c")
    assert not config.is_ignored("single_transformer_blocks.0.proj_out")
    assert not config.is_ignored("a.bc")
    assert config.to_dict()["ignore"] == ["proj_out*", "a.b"]
    assert build_quant_config(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quant_algo": "INT4_AWQ"}, UnsupportedError, "INT4_AWQ.*is not supported"),
        ({"quant_algo": "MIXED_PRECISION", "producer": {}}, ConfigError, "needs quantized_layers"),
        ({"quant_algo": "NVFP4_SVD"}, ConfigError, "is read, not made"),
        ({"producer": {}}, ConfigError, "names no quant_algo"),
        ({"quant_algo": "FP8", "surprise": 1}, ConfigError, "Unknown option 'surprise'"),
        (
            {"quant_algo": "MIXED_PRECISION", "producer": {}, "quantized_layers": {"a": {"quant_algo": "W8A16"}}},
            UnsupportedError,
            "W8A16",
        ),
        ({"quant_algo": "MIXED_PRECISION", "producer": {}, "quantized_layers": ["a"]}, ConfigError, "must map names"),
    ],
)
def test_what_can_not_be_read_is_said(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_quant_config({"method": "modelopt", **options})


def test_low_rank_part_is_in_the_dequantized_weight(tmp_path: Path) -> None:
    (fixture,) = (path for path in FIXTURES if path.name == "wan-nvfp4_svd")
    model = load(complete(fixture, tmp_path / "model"))
    layers = quantized_layers(model)
    assert layers
    for layer in layers.values():
        assert isinstance(layer, QuantizedLinear)
        x = layer_input(layer.in_features).float()
        weight = layer.method.dequantize_weight(layer)
        bias = 0 if layer.bias is None else layer.bias.float()
        expected = x @ weight.t() + bias
        # On CPUs activations are left as they are; bfloat16 on the way.
        assert (layer(x.bfloat16()).float() - expected).norm() < 0.01 * expected.norm()


def test_save_and_load_of_a_saved_source(tmp_path: Path) -> None:
    """A user's method that contradicts the checkpoint is refused."""
    folder = complete(SIMPLE, tmp_path / "model")
    with pytest.raises(ConfigError, match="already quantized with 'modelopt'"):
        load(folder, quantization_config=build_quant_config("fp8"))
