"""llm-compressor's presets that lowbit makes: those without static activations (``preset_name_to_scheme``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _operand(num_bits: int, kind: str, strategy: str, **others: Any) -> dict[str, Any]:
    return {"num_bits": num_bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False, **others}


_MX = {"group_size": 32, "scale_dtype": "torch.uint8"}
_NV = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
_FP8_TOKEN = _operand(8, "float", "token", dynamic=True)
_INT8 = {
    "weights": _operand(8, "int", "channel"),
    "input_activations": _operand(8, "int", "token", dynamic=True),
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    **{f"W{bits}A16": {"weights": _operand(bits, "int", "group", group_size=128)} for bits in range(2, 9)},
    "W4A16_ASYM": {"weights": _operand(4, "int", "group", group_size=128, symmetric=False)},
    "W8A8": _INT8,
    "INT8": _INT8,
    "FP8_DYNAMIC": {"weights": _operand(8, "float", "channel"), "input_activations": _FP8_TOKEN},
    "FP8_BLOCK": {
        "weights": _operand(8, "float", "block", block_structure=[128, 128]),
        "input_activations": _operand(8, "float", "group", group_size=128, dynamic=True),
    },
    "NVFP4A16": {"weights": _operand(4, "float", "tensor_group", **_NV)},
    "MXFP4A16": {"weights": _operand(4, "float", "group", **_MX)},
    "MXFP4": {
        "weights": _operand(4, "float", "group", **_MX),
        "input_activations": _operand(4, "float", "group", dynamic=True, **_MX),
    },
    "MXFP8A16": {"weights": _operand(8, "float", "group", **_MX)},
    "MXFP8": {
        "weights": _operand(8, "float", "group", **_MX),
        "input_activations": _operand(8, "float", "group", dynamic=True, **_MX),
    },
}
