"""What to compute: the quantization methods, their configuration, and applying them to models.

A name is imported when it is first used: naming one method does not import the others.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "AscendConfig": "lowbit.quantization.methods.ascend",
    "AutoRoundConfig": "lowbit.quantization.methods.auto_round",
    "ComfyUiConfig": "lowbit.quantization.methods.comfyui",
    "ComponentQuantizationConfig": "lowbit.quantization.component",
    "Fp8Config": "lowbit.quantization.methods.fp8",
    "GgufConfig": "lowbit.quantization.methods.gguf",
    "Int8Config": "lowbit.quantization.methods.int8",
    "LayerRecord": "lowbit.quantization.manifest",
    "LinearMethod": "lowbit.quantization.base",
    "Manifest": "lowbit.quantization.manifest",
    "ModelOptConfig": "lowbit.quantization.methods.modelopt",
    "Mxfp4Config": "lowbit.quantization.methods.mxfp4",
    "Mxfp4DualScaleConfig": "lowbit.quantization.methods.mxfp4",
    "Mxfp8Config": "lowbit.quantization.methods.mxfp8",
    "NvFp4Config": "lowbit.quantization.methods.nvfp4",
    "QuantizationConfig": "lowbit.quantization.base",
    "QuantizedLinear": "lowbit.quantization.linear",
    "SUPPORTED_QUANTIZATION_METHODS": "lowbit.quantization.factory",
    "SvdQuantConfig": "lowbit.quantization.methods.svdquant",
    "build_quant_config": "lowbit.quantization.factory",
    "plan_layers": "lowbit.quantization.plan",
    "quantize_model": "lowbit.quantization.plan",
    "register_quantization_method": "lowbit.quantization.factory",
}

__all__ = [*_PUBLIC]  # noqa: PLE0604, the table above holds strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
