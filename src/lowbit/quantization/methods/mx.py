"""What linear methods of the MX formats share: elements in groups of 32 with a power of two each."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch

from lowbit.ops import mx
from lowbit.quantization.base import LinearMethod
from lowbit.quantization.scales import exponents

if TYPE_CHECKING:
    from lowbit.quantization.linear import QuantizedLinear


class MxLinearMethod(LinearMethod):
    """Weights and activations in groups of 32 that share a power of two."""

    family = "mx"
    table = mx.IMPLEMENTATIONS

    @abstractmethod
    def elements(self, layer: QuantizedLinear) -> tuple[tuple[int, int], torch.dtype]:
        """Return shape and dtype of ``weight``."""

    @abstractmethod
    def canonical_weight(self, layer: QuantizedLinear, weight: torch.Tensor) -> torch.Tensor:
        """Return a checkpoint's weight in the elements' dtype where it holds their values in another."""

    def create_weights(self, layer: QuantizedLinear) -> None:
        """Register ``weight`` and ``weight_scale``, E8M0 uint8 [N, ceil(K / 32)]."""
        layer.register_quantized("weight", *self.elements(layer))
        groups = -(-layer.in_features // mx.GROUP_SIZE)
        layer.register_quantized("weight_scale", (layer.out_features, groups), torch.uint8)

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Accept weights whose values are the elements' in a wider dtype, and scales as ``float8_e8m0fnu``."""
        if name == "weight":
            tensor = self.canonical_weight(layer, tensor)
        if name == "weight_scale":
            tensor = exponents(layer, name, tensor)
        return super().canonical_tensor(layer, name, tensor)

    def dual_scale(self, layer: QuantizedLinear) -> torch.Tensor | None:
        """Return the second scale, float32 [N, ceil(K / 512)], of a format that has one."""
        return None

    def dequantize_weight(self, layer: QuantizedLinear) -> torch.Tensor:
        """Return ``weight`` times its groups' scales."""
        scale = layer.get_parameter("weight_scale")
        return mx.dequantize_mx(layer.get_parameter("weight"), scale, self.dual_scale(layer))

    def apply(self, layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Quantize x and multiply."""
        assert layer.kernel is not None
        scale = layer.get_parameter("weight_scale")
        result: torch.Tensor = layer.kernel.linear(x, layer.weight, scale, bias, self.dual_scale(layer))
        return result
