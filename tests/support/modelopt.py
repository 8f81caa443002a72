"""Whole checkpoints around what nvidia-modelopt exported (scripts/fixtures)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures" / "modelopt").iterdir())


def rest_of_the_model(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random tensors for a model of which only the quantized layers are known."""
    torch.manual_seed(0)
    kind = getattr(diffusers, config["_class_name"])
    model = kind.from_config({name: value for name, value in config.items() if name != "quantization_config"})
    return model.to(torch.bfloat16).state_dict()


def complete(fixture: Path, folder: Path) -> Path:
    """Write the whole checkpoint that ``fixture`` is the quantized part of."""
    config = json.loads((fixture / "config.json").read_text())
    (file,) = fixture.glob("*.safetensors")
    folder.mkdir()
    shutil.copy(fixture / "config.json", folder)
    save_file({**rest_of_the_model(config), **load_file(file)}, folder / file.name, {"format": "pt"})
    return folder
