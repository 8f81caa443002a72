"""What linear methods of the MX formats share: elements in groups of 32 with a power of two each."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch

from lowbit.ops import mx
from lowbit.ops.weight_format import Prepared
from lowbit.quantization.base import LinearMethod
from lowbit.quantization.scales import exponents
from lowbit.quantization.tensors import K, N, TensorSpec, groups

if TYPE_CHECKING:
    from lowbit.quantization.linear import QuantizedLinear


class MxLinearMethod(LinearMethod):
    """Weights and activations in groups of 32 that share a power of two."""

    family = "mx"
    table = mx.IMPLEMENTATIONS

    @property
    @abstractmethod
    def elements(self) -> TensorSpec:
        """What ``weight`` is."""

    @abstractmethod
    def canonical_weight(self, layer: QuantizedLinear, weight: torch.Tensor) -> torch.Tensor:
        """Return a checkpoint's weight in the elements' dtype where it holds their values in another."""

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return ``weight`` and ``weight_scale``, E8M0 uint8 [N, ceil(K / 32)]."""
        return self.elements, TensorSpec("weight_scale", torch.uint8, (N, groups(K, mx.GROUP_SIZE)))

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

    def tensors(self, layer: QuantizedLinear) -> Prepared:
        """Return the weight with both of its scales."""
        weight, scale = layer.get_parameter("weight"), layer.get_parameter("weight_scale")
        return Prepared(weight, scale, outer_scale=self.dual_scale(layer), format=self.format)
