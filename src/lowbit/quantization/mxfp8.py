"""MXFP8 W8A8: e4m3 in groups of 32 that share a power of two, weights and activations alike.

On disk, as vLLM-Omni and msModelSlim have it: ``weight`` e4m3 [N, K] and ``weight_scale`` E8M0 uint8 [N, ceil(K / 32)].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lowbit.errors import CheckpointError, ConfigError
from lowbit.ops import mx
from lowbit.ops.fp8 import E4M3
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.scales import exponents, quantize_by_rows
from lowbit.quantization.transforms import check_transforms, with_transforms

if TYPE_CHECKING:
    from typing_extensions import Self

    from lowbit.quantization.linear import QuantizedLinear

WEIGHT_ROUNDING = "ceil"


@dataclass(frozen=True, kw_only=True)
class Mxfp8Config(QuantizationConfig):
    """Configuration of ``mxfp8``.

    Attributes:
        smoothing: 0 to 1, as of ``int8``.
        rotation: size of the rotated groups, as of ``int8``.
        is_checkpoint_mxfp8_serialized: the checkpoint's weights are MXFP8 already.
    """

    smoothing: float | None = None
    rotation: int | None = None
    is_checkpoint_mxfp8_serialized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.is_checkpoint_mxfp8_serialized, bool):
            raise ConfigError("is_checkpoint_mxfp8_serialized must be true or false")
        check_transforms(self.smoothing, self.rotation)

    @classmethod
    def get_name(cls) -> str:
        """Return ``"mxfp8"``."""
        return "mxfp8"

    @property
    def is_serialized(self) -> bool:
        """Whether the checkpoint's weights are MXFP8 already."""
        return self.is_checkpoint_mxfp8_serialized

    @property
    def needs_calibration(self) -> bool:
        """Whether smoothing is still to be found."""
        return self.smoothing is not None and not self.is_serialized

    def linear_method(self) -> LinearMethod:
        """Return the method with this configuration's kernel and transforms."""
        return with_transforms(Mxfp8LinearMethod(self.kernel), self.smoothing, self.rotation)

    def as_serialized(self, ignored_layers: Sequence[str]) -> Self:
        """Return the configuration to write beside the quantized tensors."""
        return replace(self, is_checkpoint_mxfp8_serialized=True, ignored_layers=list(ignored_layers))


class Mxfp8LinearMethod(LinearMethod):
    """MXFP8 W8A8 of a linear layer."""

    name = "mxfp8"
    family = "mx"
    table = mx.IMPLEMENTATIONS

    def create_weights(self, layer: QuantizedLinear) -> None:
        """Register ``weight`` and ``weight_scale``."""
        layer.register_quantized("weight", (layer.out_features, layer.in_features), E4M3)
        groups = -(-layer.in_features // mx.GROUP_SIZE)
        layer.register_quantized("weight_scale", (layer.out_features, groups), torch.uint8)

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Accept weights whose values are e4m3's in a wider dtype, and scales as ``float8_e8m0fnu``."""
        if name == "weight":
            tensor = exact_e4m3(layer, tensor)
        if name == "weight_scale":
            tensor = exponents(layer, name, tensor)
        return super().canonical_tensor(layer, name, tensor)

    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize [N, K]."""
        elements, scale = quantize_by_rows(weight, lambda rows: mx.quantize_mxfp8(rows, WEIGHT_ROUNDING))
        return {"weight": elements, "weight_scale": scale}

    def dequantize_weight(self, layer: QuantizedLinear) -> torch.Tensor:
        """Return ``weight`` times its groups' scales."""
        return mx.dequantize_mx(layer.get_parameter("weight"), layer.get_parameter("weight_scale"))

    def apply(self, layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Quantize x and multiply."""
        assert layer.kernel is not None
        result: torch.Tensor = layer.kernel.linear(x, layer.weight, layer.get_parameter("weight_scale"), bias)
        return result


def exact_e4m3(layer: QuantizedLinear, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight that holds e4m3 values in a wider floating dtype as e4m3; others unchanged.

    Raises:
        CheckpointError: some values are not e4m3's.
    """
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return weight
    if weight.is_meta:
        return weight.to(E4M3)
    narrow = weight.to(E4M3)
    if not torch.equal(narrow.to(weight.dtype), weight):
        raise CheckpointError(f"{layer.prefix}.weight: {weight.dtype} with values that e4m3 does not have")
    return narrow
