"""Layers in the formats of ComfyUI's single files, from their definition."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from lowbit.ops import mx, nvfp4
from lowbit.ops.comfyui import swap_nibbles, to_blocked
from lowbit.ops.fp8 import E4M3
from lowbit.ops.rotation import hadamard, rotate

METADATA = "_quantization_metadata"


def int8_layer(weight: torch.Tensor, rotation: int | None, per_row: bool) -> dict[str, torch.Tensor]:
    rotated = weight if rotation is None else rotate(weight, hadamard(rotation))
    absmax = rotated.abs().amax(dim=1, keepdim=True) if per_row else rotated.abs().amax()
    scale = absmax / 127
    return {"weight": (rotated / scale).round().clamp(-127, 127).to(torch.int8), "weight_scale": scale}


def nvfp4_layer(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale_2 = weight.abs().amax() / (6 * 448)
    packed, scale = nvfp4.quantize_nvfp4(weight, scale_2)
    return {"weight": swap_nibbles(packed), "weight_scale": to_blocked(scale), "weight_scale_2": scale_2}


def mxfp8_layer(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    elements, scale = mx.quantize_mxfp8(weight)
    return {"weight": elements, "weight_scale": to_blocked(scale)}


def fp8_layer(weight: torch.Tensor, **extra: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().amax() / 448
    return {"weight": (weight / scale).to(E4M3), "weight_scale": scale, **extra}


FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp8": (fp8_layer, {"format": "float8_e4m3fn"}),
    "fp8 static": (lambda w: fp8_layer(w, input_scale=torch.tensor([0.02])), {"format": "float8_e4m3fn"}),
    "int8": (lambda w: int8_layer(w, None, per_row=False), {"format": "int8_tensorwise"}),
    "int8 rows": (lambda w: int8_layer(w, None, per_row=True), {"format": "int8_tensorwise", "per_row": True}),
    "convrot": (
        lambda w: int8_layer(w, 64, per_row=True),
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
    ),
    "convrot nested": (
        lambda w: int8_layer(w, 16, per_row=True),
        {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 16}},
    ),
    "nvfp4": (nvfp4_layer, {"format": "nvfp4"}),
    "nvfp4 scaled": (
        lambda w: {**nvfp4_layer(w / 2), "pre_quant_scale": torch.full((w.shape[1],), 2.0)},
        {"format": "nvfp4"},
    ),
    "mxfp8": (mxfp8_layer, {"format": "mxfp8"}),
}


def every_format(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of a model whose first linear layers are in one format each, and what names the formats.

    Half of them are named by a marker as well.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    linear = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and "blocks" in name]
    layers = {}
    for layer, (quantize, config) in zip(linear, FORMATS.values(), strict=False):
        layers[layer] = config
        for tensor, value in quantize(tensors.pop(f"{layer}.weight")).items():
            tensors[f"{layer}.{tensor}"] = value.contiguous()
        if len(layers) % 2:
            text = json.dumps(config).encode()
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors, layers
