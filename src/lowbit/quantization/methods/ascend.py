"""Checkpoints of msModelSlim for Ascend (``ascend``): AscendV1 and MindIE. Every layer may have a type of its own.

A file ``quant_model_description*.json`` beside the weights names the type of every tensor;
``lowbit.checkpoints.msmodelslim.read`` reads both and hands each layer the tensors of its type. With N output and K
input channels:

========================  ========================================================================================
type                      tensors, and the family that computes
========================  ========================================================================================
W8A8                      ``weight`` int8 [N, K], ``quant_bias`` int32 [N], ``input_scale``, ``input_offset``
                          float32 [], ``deq_scale`` float32 [N]: ``int8_static``
W8A8_DYNAMIC, W8A8_MIX    ``weight`` int8 [N, K], ``weight_scale`` float32 [N, 1]: ``int8``
W8A16                     the same: ``int8``, weights alone
WFP8AFP8_DYNAMIC          ``weight`` e4m3 [N, K], ``weight_scale`` float32 [N, 1]: ``fp8``
W8A8_MXFP8                ``weight`` e4m3 [N, K], ``weight_scale`` E8M0 uint8 [N, K / 32]: ``mx``
W4A4_MXFP4                ``weight`` uint8 [N, K / 2], ``weight_scale`` E8M0 uint8 [N, K / 32]: ``mx``
W4A4_MXFP4_DUALSCALE      the same and ``weight_dual_scale`` float32 [N, K / 512, 1]: ``mx``
FLOAT                     not quantized
========================  ========================================================================================

A smoothed layer also has ``mul_scale`` float32 [K], by which its input is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lowbit.errors import ConfigError, UnsupportedError
from lowbit.ops import int8_static
from lowbit.ops.weight_format import Prepared
from lowbit.quantization.base import LinearMethod, QuantizationConfig, check_tensor
from lowbit.quantization.methods.fp8 import Fp8LinearMethod
from lowbit.quantization.methods.int8 import Int8LinearMethod, Int8WeightOnlyMethod
from lowbit.quantization.methods.mxfp4 import Mxfp4DualScaleLinearMethod, Mxfp4LinearMethod
from lowbit.quantization.methods.mxfp8 import Mxfp8LinearMethod
from lowbit.quantization.scales import finite, finite_and_positive, per_tensor_scale
from lowbit.quantization.tensors import K, N, TensorSpec
from lowbit.quantization.transforms import with_transforms

if TYPE_CHECKING:
    from typing_extensions import Self

    from lowbit.quantization.linear import QuantizedLinear

FLOAT = "FLOAT"
_READ_ONLY = "ascend is read, not made: its checkpoints have a quant_model_description*.json beside their weights"


@dataclass(frozen=True, kw_only=True)
class AscendConfig(QuantizationConfig):
    """Configuration of ``ascend``.

    Attributes:
        layer_types: layer -> type of the table above; layers that are not named are ``FLOAT``.
        smoothed_layers: layers with a ``mul_scale``.
        weights_folder: where the description and the weights are.
        is_checkpoint_ascend_serialized: the checkpoint's own configuration holds the types: what lowbit writes.
    """

    layer_types: dict[str, str] | None = None
    smoothed_layers: list[str] | None = None
    weights_folder: str | None = None
    is_checkpoint_ascend_serialized: bool = False

    runtime_options: ClassVar[frozenset[str]] = frozenset({"kernel", "weights_folder"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.is_checkpoint_ascend_serialized, bool):
            raise ConfigError("is_checkpoint_ascend_serialized must be true or false")
        if self.weights_folder is not None and not isinstance(self.weights_folder, str):
            raise ConfigError(f"ascend: weights_folder must be a folder, not {self.weights_folder!r}")
        types = self.layer_types or {}
        if not isinstance(types, Mapping) or not all(isinstance(part, str) for pair in types.items() for part in pair):
            raise ConfigError(f"ascend: layer_types must map layers to types, not {types!r}")
        unknown = sorted({kind for kind in types.values() if kind not in TYPES and kind != FLOAT})
        if unknown:
            known = ", ".join([*TYPES, FLOAT])
            raise UnsupportedError(f"ascend: {', '.join(unknown)} is not supported", [f"supported: {known}"])
        smoothed = self.smoothed_layers or []
        if not isinstance(smoothed, list) or not all(isinstance(name, str) for name in smoothed):
            raise ConfigError(f"ascend: smoothed_layers must be a list of layers, not {smoothed!r}")

    @classmethod
    def get_name(cls) -> str:
        """Return ``"ascend"``."""
        return "ascend"

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """No other library has a method of this name."""
        return True

    @property
    def is_serialized(self) -> bool:
        """Whether the types of the checkpoint's layers are known."""
        return self.is_checkpoint_ascend_serialized or self.layer_types is not None

    @property
    def weights_from(self) -> str | None:
        """The folder with the description and the weights."""
        return self.weights_folder

    def linear_method(self) -> LinearMethod:
        """Return the method of W8A8_DYNAMIC; what a layer gets is up to ``get_quant_method``."""
        return Int8LinearMethod(self.kernel)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethod | None:
        """Return the method for the layer's type.

        Raises:
            ConfigError: the types are not known: this is no checkpoint of msModelSlim's.
        """
        if self.layer_types is None:
            raise ConfigError(_READ_ONLY)
        kind = self.layer_types.get(prefix, FLOAT)
        if not isinstance(layer, torch.nn.Linear) or kind == FLOAT or self.is_ignored(prefix):
            return None
        method = TYPES[kind](self.kernel)
        return with_transforms(method, None, None, has_mul_scale=prefix in (self.smoothed_layers or ()))

    def kept_reason(self, name: str) -> str:
        """Name the type in the description, if that is the reason."""
        return super().kept_reason(name) if self.is_ignored(name) else "FLOAT in the checkpoint"

    def as_serialized(self, ignored_layers: Sequence[str]) -> Self:
        """Return the configuration to write beside the tensors; ``FLOAT`` is in ``layer_types`` already."""
        return replace(self, is_checkpoint_ascend_serialized=True, weights_folder=None)


class AscendStaticMethod(LinearMethod):
    """W8A8 with one scale and one offset for all activations.

    ``quant_bias`` holds the bias already: that of the layer is there for who dequantizes it, and is not added.
    """

    name = "ascend W8A8"
    family = "int8_static"
    activation_scheme = "static"
    table = int8_static.IMPLEMENTATIONS

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return the type's tensors, see the module's table."""
        return (
            TensorSpec("weight", torch.int8, (N, K)),
            TensorSpec("quant_bias", torch.int32, (N,), is_summed=True),
            TensorSpec("input_scale", torch.float32),
            TensorSpec("input_offset", torch.float32),
            TensorSpec("deq_scale", torch.float32, (N,)),
        )

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: Tensor) -> Tensor:
        """Accept scalars as [1], and ``deq_scale`` as the bits of float32 numbers in int64."""
        if name in ("input_scale", "input_offset"):
            tensor = per_tensor_scale(tensor)
        if name == "deq_scale":
            shape, dtype = layer.expected[name]
            check_tensor(f"{layer.prefix}.{name}", tensor, shape, (dtype, torch.int64), self.name)
            tensor = int8_static.bits_to_scale(tensor) if tensor.dtype == torch.int64 else tensor
        tensor = super().canonical_tensor(layer, name, tensor)
        if name in ("input_scale", "deq_scale"):
            return finite_and_positive(layer, name, tensor)
        return finite(layer, name, tensor) if name == "input_offset" else tensor

    def quantize_weight(self, weight: Tensor) -> dict[str, Tensor]:
        """Refuse: only checkpoints are read."""
        raise UnsupportedError(_READ_ONLY)

    def dequantize_weight(self, layer: QuantizedLinear) -> Tensor:
        """Return ``weight * deq_scale / input_scale``."""
        return int8_static.dequantize_int8_static(
            *(layer.get_parameter(name) for name in ("weight", "deq_scale", "input_scale"))
        )

    def tensors(self, layer: QuantizedLinear) -> Prepared:
        """Return the type's tensors, see the module's table."""
        names = ("weight", "deq_scale", "input_scale", "input_offset", "quant_bias")
        weight, scale, input_scale, input_offset, quant_bias = (layer.get_parameter(name) for name in names)
        return Prepared(
            weight,
            scale,
            input_scale=input_scale,
            input_offset=input_offset,
            quant_bias=quant_bias,
            format=self.format,
        )


TYPES: Mapping[str, Callable[[str], LinearMethod]] = {
    "W8A8": AscendStaticMethod,
    "W8A8_DYNAMIC": Int8LinearMethod,
    "W8A8_MIX": Int8LinearMethod,
    "W8A16": lambda kernel: Int8WeightOnlyMethod(),
    "WFP8AFP8_DYNAMIC": lambda kernel: Fp8LinearMethod("dynamic", None, kernel),
    "W8A8_MXFP8": Mxfp8LinearMethod,
    "W4A4_MXFP4": Mxfp4LinearMethod,
    "W4A4_MXFP4_DUALSCALE": Mxfp4DualScaleLinearMethod,
}
