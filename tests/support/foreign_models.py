"""Small FLUX.1 transformers from checkpoints of other tools, in the formats that lowbit reads and does not make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from lowbit.checkpoints.external import load_component
from lowbit.checkpoints.msmodelslim.read import described
from lowbit.quantization import ComfyUiConfig
from lowbit.quantization.base import QuantizationConfig
from tests.support import ascend_files, comfyui_files
from tests.support.modelopt import FIXTURES, complete
from tests.support.models import FAMILIES, save
from tests.support.nunchaku_files import Written

BF16 = torch.bfloat16


def _load(source: Path, config: QuantizationConfig) -> Any:
    name = FluxTransformer2DModel.__name__
    return load_component(str(source), "transformer", "diffusers", name, config, dtype=BF16)


def _ascend(folder: Path, cases: list[str]) -> Any:
    ascend_files.write_types(folder, cases)
    config = described(folder / "transformer", None)
    assert config is not None
    return _load(folder, config)


def _comfyui(folder: Path) -> Any:
    model = FAMILIES["flux"].make()
    save(model, folder / "transformer", torch.float32)
    found, layers = comfyui_files.every_format(model.float())
    file = folder / "model.safetensors"
    save_file(found, file, {comfyui_files.METADATA: json.dumps({"format_version": "1.0", "layers": layers})})
    return _load(folder, ComfyUiConfig(comfyui_model=str(file)))


def _modelopt(folder: Path, algorithm: str) -> Any:
    (fixture,) = (path for path in FIXTURES if path.name == f"flux-{algorithm}")
    return FluxTransformer2DModel.from_pretrained(complete(fixture, folder / "transformer"), torch_dtype=BF16)


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "ascend W8A8, W8A8_DYNAMIC, W8A16": lambda folder: _ascend(folder, ["dynamic", "w8a16"]),
    "ascend W8A8_MIX, W8A8_MXFP8": lambda folder: _ascend(folder, ["mix", "mxfp8"]),
    "ascend W4A4_MXFP4": lambda folder: _ascend(folder, ["mxfp4", "dualscale"]),
    "comfyui": _comfyui,
    "nunchaku int4": lambda folder: Written("flux", "int4", folder).load(BF16),
    "nunchaku nvfp4": lambda folder: Written("flux", "nvfp4", folder).load(BF16),
    "modelopt NVFP4_SVD": lambda folder: _modelopt(folder, "nvfp4_svd"),
    "modelopt MIXED_PRECISION": lambda folder: _modelopt(folder, "mixed"),
}


def foreign_model(name: str, folder: Path) -> Any:
    """Return the model of ``FOREIGN``, its files in ``folder``, which is made."""
    folder.mkdir()
    return FOREIGN[name](folder).requires_grad_(False)
