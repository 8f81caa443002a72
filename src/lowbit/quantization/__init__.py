"""What to compute: the quantization methods, their configuration, and applying them to models."""

from lowbit.quantization.ascend import AscendConfig
from lowbit.quantization.auto_round import AutoRoundConfig
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.comfyui import ComfyUiConfig
from lowbit.quantization.component import ComponentQuantizationConfig
from lowbit.quantization.factory import (
    SUPPORTED_QUANTIZATION_METHODS,
    build_quant_config,
    register_quantization_method,
)
from lowbit.quantization.fp8 import Fp8Config
from lowbit.quantization.gguf import GgufConfig
from lowbit.quantization.int8 import Int8Config
from lowbit.quantization.linear import QuantizedLinear
from lowbit.quantization.manifest import LayerRecord, Manifest
from lowbit.quantization.modelopt import ModelOptConfig
from lowbit.quantization.mxfp4 import Mxfp4Config, Mxfp4DualScaleConfig
from lowbit.quantization.mxfp8 import Mxfp8Config
from lowbit.quantization.nvfp4 import NvFp4Config
from lowbit.quantization.plan import plan_layers, quantize_model
from lowbit.quantization.svdquant import SvdQuantConfig

__all__ = [
    "SUPPORTED_QUANTIZATION_METHODS",
    "AscendConfig",
    "AutoRoundConfig",
    "ComfyUiConfig",
    "ComponentQuantizationConfig",
    "Fp8Config",
    "GgufConfig",
    "Int8Config",
    "LayerRecord",
    "LinearMethod",
    "Manifest",
    "ModelOptConfig",
    "Mxfp4Config",
    "Mxfp4DualScaleConfig",
    "Mxfp8Config",
    "NvFp4Config",
    "QuantizationConfig",
    "QuantizedLinear",
    "SvdQuantConfig",
    "build_quant_config",
    "plan_layers",
    "quantize_model",
    "register_quantization_method",
]
