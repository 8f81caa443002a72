from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, ZImagePipeline

from lowbit import Omni
from lowbit.checkpoints.component import manifests
from lowbit.errors import CheckpointError, ConfigError
from lowbit.hosts.preflight import check_pipeline
from lowbit.quantization import Fp8Config, Int8Config, QuantizedLinear, build_quant_config
from tests.support.models import relative_error, save_pipeline

BF16 = torch.bfloat16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pipeline(tmp_path / "pipeline")


def paint(pipeline: ZImagePipeline) -> torch.Tensor:
    torch.manual_seed(5)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipeline(
            prompt_embeds=[torch.randn(6, 32, dtype=BF16)],
            height=16,
            width=16,
            num_inference_steps=2,
            guidance_scale=0.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images


def test_a_separate_modelopt_configuration_is_found_by_omni(folder: Path, tmp_path: Path) -> None:
    config = build_quant_config({"method": "modelopt", "quant_algo": "W4A16_NVFP4"})
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=BF16, quantization_config=mapping)
    pipeline.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "transformer" / "config.json"
    content = json.loads(file.read_text())
    stored = content.pop("quantization_config")
    file.write_text(json.dumps(content))
    separate = {"producer": stored["producer"], "quantization": {"quant_algo": "W4A16_NVFP4"}}
    separate["quantization"]["exclude_modules"] = stored["ignore"]
    (file.parent / "hf_quant_config.json").write_text(json.dumps(separate))
    omni = Omni(model=str(tmp_path / "saved"))
    assert {record.method for record in omni.manifests["transformer"].quantized} == {"nvfp4"}
    assert torch.equal(paint(omni.pipeline), paint(pipeline))


def test_a_pipeline_loads_with_a_mapping_and_saves(folder: Path, tmp_path: Path) -> None:
    plain = DiffusionPipeline.from_pretrained(folder, torch_dtype=BF16)
    mapping = {"transformer": Int8Config(), "text_encoder": Fp8Config()}
    check_pipeline(folder, mapping)
    config = PipelineQuantizationConfig(quant_mapping=mapping)
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=BF16, quantization_config=config)
    images = paint(pipeline)
    assert 0 < relative_error(images, paint(plain)) < 0.1
    found = manifests(pipeline)
    assert found.keys() == mapping.keys()
    assert found["transformer"].component == "transformer"
    assert {record.method for record in found["text_encoder"].quantized} == {"fp8"}

    pipeline.save_pretrained(tmp_path / "saved")
    check_pipeline(tmp_path / "saved")
    reloaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=BF16)
    assert torch.equal(paint(reloaded), images)
    assert manifests(reloaded).keys() == mapping.keys()
    assert isinstance(reloaded.text_encoder.layers[0].mlp.up_proj, QuantizedLinear)


def test_a_pipeline_is_checked_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model_index.json: it is the folder of one model"):
        check_pipeline(folder / "transformer")
    with pytest.raises(CheckpointError, match=r"has no model_index.json: no such folder"):
        check_pipeline(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no component trnsformer; it has: .*transformer"):
        check_pipeline(folder, {"trnsformer": Int8Config()})
    vae, encoder = (next((folder / name).glob("*.safetensors")) for name in ("vae", "text_encoder"))
    vae.write_bytes(vae.read_bytes()[:-100])
    encoder.rename(encoder.with_name("pytorch_model.bin"))
    with pytest.raises(CheckpointError) as error:
        check_pipeline(folder)
    assert f"{vae} (" in str(error.value)
    assert "not a whole safetensors file" in str(error.value)
    assert "pytorch_model.bin: refused" in str(error.value)


def test_a_quantized_component_is_not_quantized_again(folder: Path, tmp_path: Path) -> None:
    config = PipelineQuantizationConfig(quant_mapping={"transformer": Int8Config()})
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=BF16, quantization_config=config)
    pipeline.save_pretrained(tmp_path / "saved")
    check_pipeline(tmp_path / "saved", {"transformer": Int8Config(kernel="reference")})
    with pytest.raises(ConfigError, match="transformer: The checkpoint is already quantized with 'int8'"):
        check_pipeline(tmp_path / "saved", {"transformer": Fp8Config()})
