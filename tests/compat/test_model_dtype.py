"""A quantized model's dtype is that of its activations: of the whole, and of each model within."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3OmniMoeForConditionalGeneration

from lowbit.quantization import build_quant_config, quantize_model
from lowbit.quantization.calibration.static import uncalibrated_layers
from tests.support.models import FAMILIES, language_model
from tests.support.omni_models import qwen3_omni

METHODS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "fp8": {"method": "fp8"},
    "fp8-static": {"method": "fp8", "activation_scheme": "static"},
    "fp8-block": {"method": "fp8", "weight_block_size": [32, 32]},
    "mxfp8": {"method": "mxfp8"},
    "mxfp4": {"method": "mxfp4"},
    "mxfp4_dualscale": {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0},
    "nvfp4": {"method": "nvfp4"},
    "gguf": {"method": "gguf", "gguf_type": "Q8_0"},
    "svdquant": {"method": "svdquant", "rank": 8},
    "auto-round": {"method": "auto-round", "group_size": 32},
    "modelopt": {"method": "modelopt", "quant_algo": "NVFP4"},
    "modelopt-FP8": {"method": "modelopt"},
    "comfyui": {"method": "comfyui"},
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {part.dtype for part in model.modules() if isinstance(part, PreTrainedModel)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("omni")
    qwen3_omni().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_of_an_omni_model(method: str, folder: Path, tmp_path: Path) -> None:
    load: Any = Qwen3OmniMoeForConditionalGeneration.from_pretrained
    model = load(folder, torch_dtype=torch.bfloat16, quantization_config=build_quant_config(METHODS[method]))
    assert model.lowbit_manifest.quantized
    assert dtypes(model) == {torch.bfloat16}
    if not uncalibrated_layers(model):
        model.save_pretrained(tmp_path)
        assert dtypes(load(tmp_path, torch_dtype=torch.float16)) == {torch.float16}


@pytest.mark.parametrize("method", ["int8", "fp8", "mxfp8"])
def test_an_omni_model_answers(method: str, folder: Path) -> None:
    """Its audio encoder, whose first layer is quantized, casts what it hears to its dtype."""
    load: Any = Qwen3OmniMoeForConditionalGeneration.from_pretrained
    model = load(folder, torch_dtype=torch.bfloat16, quantization_config=build_quant_config(METHODS[method]))
    plain = load(folder, torch_dtype=torch.bfloat16)
    torch.manual_seed(1)
    heard, mask = torch.randn(1, 16, 40), torch.ones(1, 40, dtype=torch.long)
    tokens = plain.thinker.get_audio_features(heard, feature_attention_mask=mask).pooler_output
    ids = torch.tensor([[1, 2, *[100] * tokens.shape[0], 3]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": heard,
        "feature_attention_mask": mask,
    }
    with torch.no_grad():
        found, expected = (each.thinker(**inputs).logits.float() for each in (model, plain))
    assert float((found - expected).norm() / expected.norm()) < 0.2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_language_model_whose_first_layer_is_quantized(dtype: torch.dtype) -> None:
    model: Any = language_model().to(dtype)
    quantize_model(model, "int8")
    assert dtypes(model.model.layers[0]) == set()
    within = model.model
    within._modules = {"layers": within.layers, **{k: v for k, v in within._modules.items() if k != "layers"}}
    assert next(within.parameters()).dtype != dtype or dtype == torch.float32
    assert model.dtype == within.dtype == dtype
    assert model.to(torch.float16).dtype == torch.float16


@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_diffusers(method: str) -> None:
    model: Any = FAMILIES["flux"].make().to(torch.bfloat16)
    first = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=torch.bfloat16))
    quantize_model(first, METHODS[method])
    model._modules = {"first": first, **model._modules}
    assert model.dtype == torch.bfloat16
    assert model.to(torch.float16).dtype == torch.float16


def test_plain_models_answer_as_before() -> None:
    plain = language_model()
    assert plain.dtype == torch.float32
    assert AutoModelForCausalLM.from_config(plain.config, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "order", ["import lowbit, transformers.modeling_utils", "import transformers.modeling_utils, lowbit"]
)
def test_whichever_is_imported_first(order: str) -> None:
    code = f"{order}; from transformers import PreTrainedModel as M; assert M.dtype.fget._lowbit_original"
    subprocess.run([sys.executable, "-c", code], check=True)
