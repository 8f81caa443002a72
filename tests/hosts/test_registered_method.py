"""A method that another package brings, from end to end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, ZImageTransformer2DModel
from transformers import AutoModel

from examples.custom_method import ToyConfig
from lowbit import Omni, quantize_model, register_quantization_method
from lowbit.errors import ConfigError
from lowbit.inputs.data import OmniDiffusionSamplingParams
from lowbit.quantization import (
    SUPPORTED_QUANTIZATION_METHODS,
    Int8Config,
    QuantizationConfig,
    build_quant_config,
)
from tests.support.methods import forget_method
from tests.support.models import Family, language_model, relative_error, stored_config, tensors

BF16 = torch.bfloat16
NAME = ToyConfig.get_name()


@pytest.fixture
def toy() -> Iterator[None]:
    register_quantization_method(NAME, ToyConfig)
    yield
    forget_method(NAME)


@pytest.mark.usefixtures("toy")
def test_a_transformer_is_quantized_saved_and_reloaded(checkpoint: Path, tmp_path: Path, z_family: Family) -> None:
    load: Any = ZImageTransformer2DModel.from_pretrained
    plain = load(checkpoint, torch_dtype=BF16)
    online = load(checkpoint, torch_dtype=BF16, quantization_config=build_quant_config("TOY-int8", levels=63))
    output = z_family.run(online)
    assert 0 < relative_error(output, z_family.run(plain)) < 0.1
    assert online.lowbit_manifest.by_kernel().keys() == {(NAME, "plain")}
    quantize_model(plain, "toy_int8", levels=63)
    assert torch.equal(z_family.run(plain), output)

    online.save_pretrained(tmp_path / "saved")
    stored = stored_config(tmp_path / "saved")
    assert (stored["quant_method"], stored["levels"]) == (NAME, 63)
    stored_weight = tensors(tmp_path / "saved")[f"{z_family.quantized}.weight"]
    original = tensors(checkpoint)[f"{z_family.quantized}.weight"].float()
    assert torch.equal(stored_weight.float(), (original / (original.abs().amax() / 63)).round())
    assert torch.equal(z_family.run(load(tmp_path / "saved", torch_dtype=BF16)), output)


@pytest.mark.usefixtures("toy")
def test_a_text_encoder_is_quantized_saved_and_reloaded(tmp_path: Path) -> None:
    language_model().to(BF16).save_pretrained(tmp_path / "bf16")
    online = AutoModel.from_pretrained(tmp_path / "bf16", dtype=BF16, quantization_config=ToyConfig())
    online.save_pretrained(tmp_path / "saved")
    tokens = torch.arange(8)[None]
    expected = online(tokens).last_hidden_state
    reloaded = AutoModel.from_pretrained(tmp_path / "saved", dtype=BF16)
    assert reloaded.lowbit_manifest.quantized
    assert torch.equal(reloaded(tokens).last_hidden_state, expected)


@pytest.mark.usefixtures("toy")
def test_pipelines(tmp_path: Path) -> None:
    omni = Omni(quantization_config={"transformer": {"method": NAME}, "text_encoder": NAME}, device="cpu")
    assert {name: {method for method, _ in made.by_kernel()} for name, made in omni.manifests.items()} == {
        "transformer": {NAME},
        "text_encoder": {NAME},
    }
    output = omni.generate("a red circle", OmniDiffusionSamplingParams(num_inference_steps=1, seed=0), progress=False)
    assert output.images
    omni.save_pretrained(str(tmp_path / "saved"))
    mapping = {"transformer": ToyConfig(kernel="plain")}
    reloaded = DiffusionPipeline.from_pretrained(
        tmp_path / "saved", torch_dtype=BF16, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
    )
    found, expected = reloaded.transformer.state_dict(), omni.pipeline.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


class _OtherName(ToyConfig):
    @classmethod
    def get_name(cls) -> str:
        return "other"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("int8", ToyConfig, "There is a quantization method 'int8' already"),
        ("MXFP4-dualscale", ToyConfig, "There is a quantization method 'mxfp4_dualscale' already"),
        ("none", ToyConfig, "can't be the name"),
        ("  ", ToyConfig, "can't be the name"),
        (3, ToyConfig, "can't be the name"),
        (NAME, dict, "derived from QuantizationConfig"),
        (NAME, Int8Config(), "derived from QuantizationConfig"),
        (NAME, QuantizationConfig, "does not define.*as_serialized"),
        (NAME, _OtherName, "returns 'other'"),
    ],
)
def test_what_can_not_be_registered(name: Any, kind: Any, message: str) -> None:
    before = list(SUPPORTED_QUANTIZATION_METHODS)
    with pytest.raises(ConfigError, match=message):
        register_quantization_method(name, kind)
    assert before == SUPPORTED_QUANTIZATION_METHODS


@pytest.mark.usefixtures("toy")
def test_a_registered_name_is_taken() -> None:
    with pytest.raises(ConfigError, match="There is a quantization method 'toy_int8' already"):
        register_quantization_method(NAME, ToyConfig)


_INSTALLED = """
import sys
from lowbit.cli.main import main
sys.argv = ["lowbit", "quantize", "--quantization", "toy_int8", "--output", sys.argv[1]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "examples.custom_method" in sys.modules
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[-1])
assert pipeline.transformer.lowbit_manifest.by_kernel().keys() == {("toy_int8", "plain")}
"""


def test_an_installed_package_adds_to_the_command_line(tmp_path: Path) -> None:
    package = tmp_path / "site" / "toy-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[lowbit.quantization_methods]\n"
        "toy_int8 = examples.custom_method:ToyConfig\n"
        "int8 = examples.custom_method:ToyConfig\n"
        "lost = no_such_module:Config\n"
    )
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([str(package.parent), root, *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", _INSTALLED, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr
    assert "layers toy_int8 (plain)" in result.stdout
    assert "There is a quantization method 'int8' already" in result.stderr
    assert "can't import no_such_module:Config" in result.stderr
