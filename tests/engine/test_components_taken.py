"""What was asked for a component is what the pipeline holds, whatever its class calls optional."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanVACETransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from lowbit.checkpoints.comfyui.write import export_comfyui
from lowbit.checkpoints.gguf.write import export_gguf
from lowbit.engine.config import OmniDiffusionConfig
from lowbit.engine.load import check_components, load_pipeline, pipeline_class
from lowbit.engine.loading import route
from lowbit.errors import CheckpointError, ConfigError
from lowbit.quantization import ComfyUiConfig, GgufConfig, build_quant_config
from tests.support.models import FAMILIES, save_pipeline

BF16 = torch.bfloat16
# Those of diffusers 0.42.1 that call a transformer optional.
OPTIONAL = {"LucyEditPipeline", "WanImageToVideoPipeline", "WanPipeline", "WanVACEPipeline"}


def optional_transformers(kind: type[DiffusionPipeline]) -> list[str]:
    """Components with a default value that DiffusionPipeline.from_pretrained would drop."""
    parameters = inspect.signature(kind.__init__).parameters
    return [
        name
        for name in kind._optional_components
        if name in parameters
        and parameters[name].default is not inspect.Parameter.empty
        and "Transformer" in str(parameters[name].annotation)
    ]


def test_these_are_all_the_pipelines_whose_transformer_is_optional() -> None:
    found = set()
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None) if name.endswith("Pipeline") else None
        if isinstance(kind, type) and issubclass(kind, DiffusionPipeline) and optional_transformers(kind):
            found.add(name)
    assert found == OPTIONAL


def vace() -> WanVACETransformer3DModel:
    small = {**FAMILIES["wan"].make().config}
    names = inspect.signature(WanVACETransformer3DModel.__init__).parameters
    settings = {name: value for name, value in small.items() if name in names}
    return WanVACETransformer3DModel(**settings, vace_layers=[0], vace_in_channels=4)


def save_wan(kind_name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    make = vace if kind_name == "WanVACEPipeline" else FAMILIES["wan"].make
    encoder = {"vocab_size": 32, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    vae = {"base_dim": 8, "z_dim": 4, "dim_mult": [1], "num_res_blocks": 1, "temperal_downsample": []}
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    kind: Any = getattr(diffusers, kind_name)
    pipeline = kind(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]"),
        text_encoder=UMT5EncoderModel(UMT5Config(**encoder)),
        vae=AutoencoderKLWan(**vae, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=make(),
        transformer_2=make(),
    )
    pipeline.to(BF16).save_pretrained(folder)
    return folder


def write_single_files(folder: Path, kind_name: str, method: str) -> dict[str, Any]:
    """Write each transformer as a single file of another tool, and return what asks for them."""
    spec: dict[str, Any] = {}
    for name in ("transformer", "transformer_2"):
        path = folder / f"{name}.{method}"
        if kind_name == "WanVACEPipeline":  # no writer has its names: diffusers' own do
            tensors = load_file(folder / name / "diffusion_pytorch_model.safetensors")
            path, layer = folder / f"{name}.safetensors", "blocks.0.ffn.net.2"
            weight = tensors.pop(f"{layer}.weight").float()
            scale = weight.abs().amax() / 448
            scaled = {f"{layer}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{layer}.weight_scale": scale}
            save_file({**tensors, **scaled}, path)
            spec[name] = ComfyUiConfig(comfyui_model=str(path))
        elif method == "gguf":
            export_gguf(folder / name, "WanTransformer3DModel", GgufConfig(gguf_type="Q8_0"), path)
            spec[name] = GgufConfig(gguf_model=str(path))
        else:
            path = path.with_suffix(".safetensors")
            export_comfyui(folder / name, "WanTransformer3DModel", ComfyUiConfig(), path)
            spec[name] = ComfyUiConfig(comfyui_model=str(path))
    return spec


@pytest.mark.parametrize(
    ("kind_name", "method"),
    [
        *((name, "gguf") for name in sorted(OPTIONAL - {"WanVACEPipeline"})),
        *((name, "comfyui") for name in sorted(OPTIONAL)),
    ],
)
def test_weights_from_elsewhere_are_in_the_pipeline(kind_name: str, method: str, tmp_path: Path) -> None:
    folder = save_wan(kind_name, tmp_path / "model")
    spec = write_single_files(folder, kind_name, method)
    config = OmniDiffusionConfig(model=str(folder), quantization_config=build_quant_config(spec), dtype=BF16)
    pipeline = load_pipeline(config)
    assert type(pipeline).__name__ == kind_name
    for name in spec:
        part = pipeline.components[name]
        assert part.lowbit_manifest.quantized, name
        assert part.dtype == BF16


def test_a_pipeline_that_leaves_a_component_out_is_an_error(tmp_path: Path) -> None:
    folder = save_wan("WanPipeline", tmp_path / "model")
    given = DiffusionPipeline.from_pretrained(folder, torch_dtype=BF16)
    other = FAMILIES["wan"].make()
    with pytest.raises(CheckpointError, match="transformer is not the one that was loaded, transformer is not quant"):
        check_components(given, {"transformer": other}, ["transformer"])
    with pytest.raises(CheckpointError, match="WanPipeline did not take .*: image_encoder is missing"):
        check_components(given, {}, ["image_encoder"])


def test_a_class_of_nobody_is_left_to_diffusers(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "model")
    assert pipeline_class(str(folder)) is diffusers.ZImagePipeline
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "Mine"]}))
    assert pipeline_class(str(folder)) is DiffusionPipeline


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"scheduler": "int8"}, "no models: scheduler. Models are: text_encoder, transformer, vae"),
        ({"tokenizer": "fp8", "transformer": "int8"}, "no models: tokenizer"),
        ({"Transformer": "int8"}, "lacks: Transformer. Expected one of: .*transformer"),
        ({"transformer_9": "int8", "transformer": "int8"}, "lacks: transformer_9"),
    ],
)
def test_components_that_take_nothing_are_named(spec: Any, message: str) -> None:
    components = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "Qwen3Model"),
        "tokenizer": ("transformers", "Qwen2Tokenizer"),
        "transformer": ("diffusers", "ZImageTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    with pytest.raises(ConfigError, match=message):
        route(build_quant_config(spec), components)


def test_nothing_asked_of_a_scheduler_is_fine(caplog: pytest.LogCaptureFixture) -> None:
    components = {"scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler")}
    with caplog.at_level(logging.WARNING):
        assert route(build_quant_config({"scheduler": None}), components) == {}
    assert not caplog.records
