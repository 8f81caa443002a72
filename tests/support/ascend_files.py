"""Checkpoints as msModelSlim writes them, from its published layouts, in float64."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.models import FAMILIES

FLUX = FAMILIES["flux"]
LAYER = "transformer_blocks.0.ff.net.2"  # [64, 256]
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
N, K = 64, 256


def scales(groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """E8M0 codes uint8 [N, groups] and their values per group."""
    codes = torch.randint(118, 124, (N, groups), dtype=torch.uint8)
    return codes, torch.exp2(codes.double() - 127)


def per_channel() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N, 1) * 1e-3 + 1e-4


def dynamic() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    weight, scale = per_channel()
    return (
        {"weight": weight, "weight_scale": scale, "weight_offset": torch.zeros(N, 1)},
        weight.double() * scale.double(),
    )


def static(bias: torch.Tensor, bits: bool = False, offset: float = -11.0) -> tuple[dict[str, torch.Tensor], Any]:
    weight, weight_scale = per_channel()
    input_scale = torch.tensor([0.02])
    deq_scale = (input_scale * weight_scale.flatten()).float()
    sums = weight.double().sum(1)
    quant_bias = (bias.double() / deq_scale.double() - sums * offset).round().to(torch.int32)
    stored = deq_scale.view(torch.int32).long() if bits else deq_scale
    parts = {"input_scale": input_scale, "input_offset": torch.tensor([offset]), "quant_bias": quant_bias}

    def expected(x: torch.Tensor) -> torch.Tensor:
        q = ((x.float() / 0.02).double().round() + offset).clamp(-128, 127)
        return (q @ weight.double().t() + quant_bias.double()) * deq_scale.double()

    return {"weight": weight, "deq_scale": stored, **parts}, expected


def mix(bias: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    parts, _ = static(bias)
    scale = (parts["deq_scale"] / parts["input_scale"]).unsqueeze(1)
    stored = {**parts, "weight_scale": scale, "weight_offset": torch.zeros(N, 1)}
    return stored, parts["weight"].double() * scale.double()


def mxfp8() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, values = scales(K // 32)
    weight = torch.randn(N, K).to(torch.float8_e4m3fn)
    return {"weight": weight, "weight_scale": codes}, weight.double() * values.repeat_interleave(32, 1)


def mxfp4(unpacked: bool = False, dual: bool = False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, values = scales(K // 32)
    elements = torch.randint(0, 16, (N, K))
    packed = (elements[:, 0::2] | (elements[:, 1::2] << 4)).to(torch.uint8)
    numbers = E2M1[elements]
    weight = numbers.to(torch.float8_e4m3fn) if unpacked else packed
    decoded = numbers * values.repeat_interleave(32, 1)
    if not dual:
        return {"weight": weight, "weight_scale": codes}, decoded
    second = torch.rand(N, 1, 1) + 0.5
    return {"weight": weight, "weight_scale": codes, "weight_dual_scale": second}, decoded * second.double()[:, :, 0]


def fp8() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    weight, scale = torch.randn(N, K).to(torch.float8_e4m3fn), torch.rand(N, 1) + 0.1
    return {"weight": weight, "weight_scale": scale}, weight.double() * scale.double()


BIAS = torch.linspace(-1, 1, N)
LAYERS: dict[str, tuple[str, Any]] = {
    "dynamic": ("W8A8_DYNAMIC", dynamic),
    "w8a16": ("W8A16", dynamic),
    "mix": ("W8A8_MIX", lambda: mix(BIAS)),
    "mxfp8": ("W8A8_MXFP8", mxfp8),
    "mxfp4": ("W4A4_MXFP4", mxfp4),
    "mxfp4-unpacked": ("W4A4_MXFP4", lambda: mxfp4(unpacked=True)),
    "dualscale": ("W4A4_MXFP4_DUALSCALE", lambda: mxfp4(dual=True)),
    "dualscale-unpacked": ("W4A4_MXFP4_DUALSCALE", lambda: mxfp4(unpacked=True, dual=True)),
    "fp8": ("WFP8AFP8_DYNAMIC", fp8),
}


def write(
    folder: Path,
    layer: dict[str, torch.Tensor],
    kind: str,
    *,
    bias: torch.Tensor | None = BIAS,
    mul_scale: torch.Tensor | None = None,
    mindie: bool = False,
) -> Path:
    """Write a pipeline's folder whose transformer is msModelSlim's, with one quantized layer."""
    torch.manual_seed(0)
    model = FLUX.make().to(torch.bfloat16)
    place = folder / "transformer"
    place.mkdir(parents=True)
    model.save_config(place)
    content = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{LAYER}.")}
    types = dict.fromkeys(content, "FLOAT")
    inner = LAYER if mul_scale is None else f"{LAYER}.linear"
    for name, tensor in layer.items():
        content[f"{inner}.{name}"], types[f"{inner}.{name}"] = tensor, kind
    if bias is not None:
        content[f"{inner}.bias"], types[f"{inner}.bias"] = bias, "FLOAT"
    if mul_scale is not None:
        content[f"{LAYER}.div.mul_scale"], types[f"{LAYER}.div.mul_scale"] = mul_scale, "FLOAT"
    suffix = ("_w8a8", "weight") if mindie else ("", "weights")
    description = {"version": "1.0.0", "model_quant_type": kind, "group_size": 0, **types}
    (place / f"quant_model_description{suffix[0]}.json").write_text(json.dumps(description))
    save_file(
        {k: v.contiguous() for k, v in content.items()}, place / f"quant_model_{suffix[1]}{suffix[0]}.safetensors"
    )
    return folder


def write_types(folder: Path, cases: Sequence[str]) -> None:
    """Write a pipeline's folder whose transformer has a smoothed W8A8 layer, and of ``LAYERS`` as many as fit: two."""
    write(folder, static(BIAS)[0], "W8A8", mul_scale=torch.rand(K) + 0.5)
    place = folder / "transformer"
    file, notes = place / "quant_model_weights.safetensors", place / "quant_model_description.json"
    content, types = load_file(file), json.loads(notes.read_text())
    layers = [name.removesuffix(".weight") for name, tensor in content.items() if tensor.shape == (N, K)]
    wide = [name for name in layers if types[f"{name}.weight"] == "FLOAT"]
    for layer, case in zip(wide, cases, strict=True):
        kind, make = LAYERS[case]
        del content[f"{layer}.weight"]
        for name, tensor in make()[0].items():
            content[f"{layer}.{name}"], types[f"{layer}.{name}"] = tensor, kind
    save_file(content, file)
    notes.write_text(json.dumps(types))
