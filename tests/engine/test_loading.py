"""What is checked before a pipeline is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit import Omni, OmniDiffusionConfig
from lowbit.engine.loading import read_components, resolve_model, route
from lowbit.errors import CheckpointError, ConfigError
from lowbit.models.embedded import embedded_model
from lowbit.quantization import Fp8Config, Int8Config, build_quant_config

WAN = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "transformer_2": ("diffusers", "WanTransformer3DModel"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_model().folder, tmp_path / "model"))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("int8", {"transformer": Int8Config(), "transformer_2": Int8Config()}),
        (None, {}),
        ({"transformer": "fp8", "vae": None}, {"transformer": Fp8Config()}),
        ({"transformer": "fp8", "default": "int8"}, {"transformer": Fp8Config(), "transformer_2": Int8Config()}),
        ({"text_encoder": "int8"}, {"text_encoder": Int8Config()}),
    ],
)
def test_routing(spec: Any, expected: dict[str, Any]) -> None:
    assert route(build_quant_config(spec), WAN) == expected


def test_routing_refuses_what_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"lacks: transformer_3\. Expected one of: transformer, transformer_2"):
        route(build_quant_config({"transformer_3": "int8"}), WAN)
    with pytest.raises(ConfigError, match=r"parts of components: transformer\.blocks\.0.*ignored_layers"):
        route(build_quant_config({"transformer": "int8", "transformer.blocks.0": None}), WAN)
    with pytest.raises(ConfigError, match="the pipeline has none"):
        route(build_quant_config("int8"), {"vae": ("diffusers", "AutoencoderKL")})


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no folder"):
        resolve_model(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
        resolve_model(str(tmp_path))
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model(str(tmp_path / "a.safetensors"))
    assert resolve_model("Qwen/Qwen-Image") == "Qwen/Qwen-Image"
    assert resolve_model(None) == str(embedded_model().folder)


def test_a_damaged_index_is_named(model: Path) -> None:
    (model / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        read_components(str(model))


def weights(model: Path) -> Path:
    return next((model / "transformer").glob("*.safetensors"))


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_truncated_file_is_named(model: Path, quantization: str | None) -> None:
    file = weights(model)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=file.name):
        Omni(str(model), quantization=quantization, device="cpu")


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_missing_unexpected_and_misshapen_tensors_come_in_one_message(model: Path, quantization: str | None) -> None:
    from safetensors.torch import load_file, save_file

    file = weights(model)
    tensors = load_file(file)
    del tensors["layers.0.attention.to_q.weight"]
    tensors["layers.0.attention.to_k.weight"] = torch.zeros(3, 3, dtype=torch.bfloat16)
    tensors["surprise.weight"] = torch.zeros(2)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        Omni(str(model), quantization=quantization, device="cpu")
    for name in ("layers.0.attention.to_q.weight", "layers.0.attention.to_k.weight", "surprise.weight"):
        assert name in str(error.value)


def test_pickles_are_refused(model: Path) -> None:
    file = weights(model)
    torch.save({}, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        Omni(str(model), quantization="int8", device="cpu")


def test_another_method_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    folder = str(tmp_path / "int8")
    Omni(quantization="int8", device="cpu").save_pretrained(folder)
    written = json.loads((tmp_path / "int8" / "transformer" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "int8"
    assert written["is_checkpoint_int8_serialized"] is True
    with pytest.raises(ConfigError, match=r"fp8.*int8|int8.*fp8"):
        Omni(folder, quantization="fp8", device="cpu")
    assert Omni(folder, quantization="int8", device="cpu").manifests["transformer"].quantized


def test_options_that_contradict() -> None:
    with pytest.raises(ConfigError, match="contradict"):
        Omni(quantization="int8", quantization_config={"method": "fp8"})
    with pytest.raises(ConfigError, match="Unknown dtype 'int4'"):
        Omni(dtype="int4")
    with pytest.raises(ConfigError, match="Can't use device 'gpu'"):
        Omni(device="gpu")


def test_method_and_options_combine() -> None:
    config = OmniDiffusionConfig(
        model="m", quantization_config={"method": "int8", "ignored_layers": ["to_out"]}
    ).resolved()
    assert config.quantization_config == Int8Config(ignored_layers=["to_out"])
    assert config.quantization == config.quantization_config
    assert config.dtype == torch.bfloat16
