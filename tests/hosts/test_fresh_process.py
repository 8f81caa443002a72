"""Folders that lowbit wrote, in a process that does nothing but ``import lowbit``."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit import Omni

METHODS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "fp8": {"method": "fp8"},
    "mxfp8": {"method": "mxfp8"},
    "mxfp4": {"method": "mxfp4"},
    "mxfp4_dualscale": {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 1},
    "nvfp4": {"method": "nvfp4"},
    "gguf": {"method": "gguf", "gguf_type": "Q8_0"},
    "fp8-block": {"method": "fp8", "weight_block_size": [32, 32]},
    "int8-rotation": {"method": "int8", "rotation": 16},
    "auto-round": {"method": "auto-round", "group_size": 32},
    "svdquant": {"method": "svdquant", "rank": 8},
    "modelopt": {"method": "modelopt", "quant_algo": "W4A16_NVFP4"},
    "modelopt-FP8": {"method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    "comfyui": {"method": "comfyui"},
}
TOKENS = torch.arange(3, 11)[None]

CHILD = """
import hashlib, json, sys
import lowbit
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModel

torch.set_num_threads(1)  # as in the tests here
tokens = torch.arange(3, 11)[None]
results = {}
for folder in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    encoder = AutoModel.from_pretrained(folder + "/text_encoder", dtype=torch.bfloat16)
    with torch.no_grad():
        states = [model(tokens, output_hidden_states=True).hidden_states for model in (encoder, pipeline.text_encoder)]
        hidden = [state[-2].double().sum().item() for state in states]  # which the pipeline takes
    results[folder] = {
        "layers": {
            name: sum(type(layer).__name__ == "QuantizedLinear" for layer in model.modules())
            for name, model in (("transformer", pipeline.transformer), ("text_encoder", encoder))
        },
        "methods": sorted({layer.method for layer in pipeline.transformer.lowbit_manifest.quantized}),
        "hidden": hidden,
        "transformer": {
            name: hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in pipeline.transformer.state_dict().items()
        },
    }
print(json.dumps(results))
"""


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Omni]]:
    made = {}
    for name, spec in METHODS.items():
        omni = Omni(quantization_config={"transformer": spec, "text_encoder": {**spec}}, device="cpu")
        folder = tmp_path_factory.mktemp("written") / name
        omni.save_pretrained(str(folder))
        made[name] = (folder, omni)
    return made


def test_plain_from_pretrained_works(folders: dict[str, tuple[Path, Omni]]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CHILD, *(str(folder) for folder, _ in folders.values())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    for name, (folder, omni) in folders.items():
        loaded = found[str(folder)]
        assert loaded["layers"] == {part: len(made.quantized) for part, made in omni.manifests.items()}, name
        assert loaded["methods"] == sorted({str(layer.method) for layer in omni.manifests["transformer"].quantized})
        with torch.no_grad():
            states = omni.pipeline.text_encoder(TOKENS, output_hidden_states=True).hidden_states
            hidden = states[-2].double().sum().item()
        assert loaded["hidden"] == [hidden, hidden], name
        expected = {key: digest(tensor) for key, tensor in omni.pipeline.transformer.state_dict().items()}
        assert loaded["transformer"] == expected, name
