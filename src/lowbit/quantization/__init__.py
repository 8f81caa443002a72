"""What to compute: the quantization methods, their configuration, and applying them to models.

A name is imported when it is first used: naming one method does not import the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.quantization.base import LinearMethod as LinearMethod
    from lowbit.quantization.base import QuantizationConfig as QuantizationConfig
    from lowbit.quantization.component import ComponentQuantizationConfig as ComponentQuantizationConfig
    from lowbit.quantization.factory import SUPPORTED_QUANTIZATION_METHODS as SUPPORTED_QUANTIZATION_METHODS
    from lowbit.quantization.factory import build_quant_config as build_quant_config
    from lowbit.quantization.factory import register_quantization_method as register_quantization_method
    from lowbit.quantization.linear import QuantizedLinear as QuantizedLinear
    from lowbit.quantization.manifest import LayerRecord as LayerRecord
    from lowbit.quantization.manifest import Manifest as Manifest
    from lowbit.quantization.methods.ascend import AscendConfig as AscendConfig
    from lowbit.quantization.methods.auto_round import AutoRoundConfig as AutoRoundConfig
    from lowbit.quantization.methods.comfyui import ComfyUiConfig as ComfyUiConfig
    from lowbit.quantization.methods.fp8 import Fp8Config as Fp8Config
    from lowbit.quantization.methods.gguf import GgufConfig as GgufConfig
    from lowbit.quantization.methods.int8 import Int8Config as Int8Config
    from lowbit.quantization.methods.modelopt import ModelOptConfig as ModelOptConfig
    from lowbit.quantization.methods.mxfp4 import Mxfp4Config as Mxfp4Config
    from lowbit.quantization.methods.mxfp4 import Mxfp4DualScaleConfig as Mxfp4DualScaleConfig
    from lowbit.quantization.methods.mxfp8 import Mxfp8Config as Mxfp8Config
    from lowbit.quantization.methods.nvfp4 import NvFp4Config as NvFp4Config
    from lowbit.quantization.methods.svdquant import SvdQuantConfig as SvdQuantConfig
    from lowbit.quantization.plan import plan_layers as plan_layers
    from lowbit.quantization.plan import quantize_model as quantize_model

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
