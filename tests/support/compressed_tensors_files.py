"""Checkpoints made with the ``compressed-tensors`` package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


def operand(num_bits: int, kind: str, strategy: str, **others: Any) -> dict[str, Any]:
    return {"num_bits": num_bits, "type": kind, "strategy": strategy, **others}


def groups(bits: int, size: int = 32, **others: Any) -> dict[str, Any]:
    return operand(bits, "int", "group", group_size=size, **others)


MX = {"group_size": 32, "scale_dtype": "torch.uint8"}
NV = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
TOKEN = {"dynamic": True, "strategy": "token"}
FP8_BLOCK = operand(8, "float", "block", block_structure=[32, 32])
# Name -> weights, activations, format, dtype of the model.
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str, torch.dtype]] = {
    "W4A16 groups": (groups(4), None, "pack-quantized", BF16),
    "W4A16 asymmetric": (groups(4, symmetric=False), None, "pack-quantized", F32),
    "W4A16 channels": (operand(4, "int", "channel", symmetric=False), None, "pack-quantized", BF16),
    "W8A16 groups": (groups(8), None, "pack-quantized", F16),
    "W8A16 asymmetric": (groups(8, 64, symmetric=False), None, "pack-quantized", BF16),
    "W8A16 channels": (operand(8, "int", "channel"), None, "pack-quantized", F32),
    "W2A16": (groups(2, symmetric=False), None, "pack-quantized", F32),
    "W3A16": (groups(3), None, "pack-quantized", BF16),
    "W5A16": (groups(5, symmetric=False), None, "pack-quantized", F32),
    "W6A16": (groups(6), None, "pack-quantized", F32),
    "W7A16": (groups(7, symmetric=False), None, "pack-quantized", F32),
    "W8A8": (operand(8, "int", "channel"), operand(8, "int", **TOKEN), "int-quantized", BF16),
    "W8A8 tensor": (operand(8, "int", "tensor"), operand(8, "int", **TOKEN), "int-quantized", F32),
    "W8A8 static": (operand(8, "int", "channel"), operand(8, "int", "tensor"), "int-quantized", F32),
    "W8A8 static asymmetric": (
        operand(8, "int", "channel"),
        operand(8, "int", "tensor", symmetric=False),
        "int-quantized",
        BF16,
    ),
    "FP8": (operand(8, "float", "tensor"), operand(8, "float", "tensor"), "float-quantized", BF16),
    "FP8_DYNAMIC": (operand(8, "float", "channel"), operand(8, "float", **TOKEN), "float-quantized", BF16),
    "FP8 tensor dynamic": (
        operand(8, "float", "tensor"),
        operand(8, "float", "tensor", dynamic=True),
        "float-quantized",
        F32,
    ),
    "FP8_BLOCK": (FP8_BLOCK, operand(8, "float", "group", group_size=32, dynamic=True), "float-quantized", BF16),
    "FP8 weights": (operand(8, "float", "channel"), None, "naive-quantized", F32),
    "NVFP4A16": (operand(4, "float", "tensor_group", **NV), None, "nvfp4-pack-quantized", F32),
    "NVFP4": (
        operand(4, "float", "tensor_group", **NV),
        operand(4, "float", "tensor_group", dynamic="local", **NV),
        "nvfp4-pack-quantized",
        F32,
    ),
    "MXFP4": (
        operand(4, "float", "group", **MX),
        operand(4, "float", "group", dynamic=True, **MX),
        "mxfp4-pack-quantized",
        F32,
    ),
    "MXFP4A16": (operand(4, "float", "group", **MX), None, "mxfp4-pack-quantized", F32),
    "MXFP8": (
        operand(8, "float", "group", **MX),
        operand(8, "float", "group", dynamic=True, **MX),
        "mxfp8-quantized",
        F32,
    ),
    "MXFP8A16": (operand(8, "float", "group", **MX), None, "mxfp8-quantized", F32),
}


def compressed(weight: torch.Tensor, name: str, targets: list[str]) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """Return the tensors of a layer as the package writes them, its compressor and its scheme."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weights, activations, kind, dtype = SCHEMES[name]
    scheme = QuantizationScheme(targets=targets, weights=weights, input_activations=activations, format=kind)
    compressor: Any = BaseCompressor.get_value_from_registry(kind)
    args: Any = scheme.weights
    low, high = extremes(weight.to(dtype), args)
    global_scale = None
    if args.strategy == "tensor_group":
        global_scale = generate_gparam(weight.amin(), weight.amax())
    scale, zero_point = calculate_qparams(low, high, args, global_scale=global_scale)
    state = {"weight": weight.to(dtype), "weight_scale": scale if global_scale is not None else scale.to(dtype)}
    if not args.symmetric:
        state["weight_zero_point"] = zero_point
    if global_scale is not None:
        state["weight_global_scale"] = global_scale.reshape(1).float()
    if scheme.input_activations is not None and scheme.input_activations.dynamic is not True:
        is_local = scheme.input_activations.dynamic == "local"
        found = {"input_global_scale": 500.0} if is_local else {"input_scale": 0.03125}
        state.update({key: torch.tensor([value], dtype=F32 if is_local else dtype) for key, value in found.items()})
        if not scheme.input_activations.symmetric:
            state["input_zero_point"] = torch.tensor([-7], dtype=torch.int8)
    return compressor.compress(state, scheme), compressor, scheme


def decompressed(found: dict[str, torch.Tensor], compressor: Any, scheme: Any) -> torch.Tensor:
    """Return the weight as the package decompresses it; NVFP4 in float32, not in bfloat16."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    if "weight_global_scale" not in found:
        return compressor.decompress(found, scheme)["weight"]
    packed = found["weight_packed"]
    values = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=F32)
    return values * (found["weight_scale"].float() / found["weight_global_scale"]).repeat_interleave(16, 1)


def extremes(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and largest weight of what shares a scale."""
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "block":
        rows, columns = args.block_structure
        tiles = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        return tiles.amin((1, 3)), tiles.amax((1, 3))
    found = weight.unflatten(1, (-1, args.group_size))
    return found.amin(-1), found.amax(-1)


def config_of(name: str, ignore: list[str]) -> dict[str, Any]:
    """Return ``quantization_config`` as the package serializes it."""
    from compressed_tensors.quantization import QuantizationConfig

    weights, activations, kind, _ = SCHEMES[name]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = QuantizationConfig(
        config_groups={"group_0": group}, format=kind, quantization_status="compressed", ignore=ignore
    )
    return json.loads(json.dumps(config.model_dump(mode="json")))


def write(model: nn.Module, folder: Path, name: str, layers: list[str]) -> dict[str, torch.Tensor]:
    """Write a model whose ``layers`` are quantized beside its ``config.json``; return the weights they decode to."""
    from compressed_tensors.compressors import BaseCompressor

    dtype = SCHEMES[name][3]
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in model.state_dict().items()}
    expected = {}
    for layer in layers:
        weight = tensors.pop(f"{layer}.weight").detach()
        found, compressor, scheme = compressed(weight, name, ["Linear"])
        assert issubclass(compressor, BaseCompressor)
        expected[layer] = decompressed(found, compressor, scheme)
        tensors.update({f"{layer}.{key}": tensor.contiguous() for key, tensor in found.items()})
    linear = [key for key, module in model.named_modules() if type(module) is nn.Linear]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config_of(name, [key for key in linear if key not in layers])
    (folder / "config.json").write_text(json.dumps(config))
    (file,) = folder.glob("*.safetensors")
    save_file(tensors, file, {"format": "pt"})
    return expected
