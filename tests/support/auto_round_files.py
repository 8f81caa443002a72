"""Checkpoints that AutoRound exported, made whole: the fixtures hold the quantized layers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures" / "auto-round").iterdir())
FLUX = next(path for path in FIXTURES if path.name == "flux")


def model_class(config: dict[str, Any]) -> Any:
    return getattr(diffusers, config["_class_name"]) if "_class_name" in config else transformers.Qwen3ForCausalLM


def rest_of_the_model(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random tensors for a model of which only the quantized layers are known."""
    torch.manual_seed(0)
    own = {name: value for name, value in config.items() if name != "quantization_config"}
    kind = model_class(config)
    model = kind.from_config(own) if "_class_name" in config else kind(transformers.Qwen3Config(**own))
    return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def complete(fixture: Path, folder: Path) -> Path:
    """Write the whole checkpoint that ``fixture`` is the quantized part of."""
    config = json.loads((fixture / "config.json").read_text())
    (file,) = fixture.glob("*.safetensors")
    quantized = load_file(file)
    layers = {name.rpartition(".")[0] for name in quantized}
    rest = rest_of_the_model(config)
    kept = {name: tensor for name, tensor in rest.items() if name not in {f"{layer}.weight" for layer in layers}}
    folder.mkdir()
    shutil.copy(fixture / "config.json", folder)
    dense = {name: tensor.clone() for name, tensor in {**kept, **quantized}.items()}
    save_file(dense, folder / file.name, {"format": "pt"})
    return folder
