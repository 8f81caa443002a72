"""Int8 W8A8: symmetric; weights per output channel, activations per token at run time.

On disk (the layout of vLLM-Omni): ``weight`` int8 [N, K] and ``weight_scale`` float32 [N, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lowbit.errors import ConfigError
from lowbit.ops import int8
from lowbit.ops.dispatch import AUTO
from lowbit.ops.weight_format import Prepared
from lowbit.quantization.base import LinearMethod
from lowbit.quantization.scales import per_channel_scale
from lowbit.quantization.tensors import K, N, TensorSpec, fixed
from lowbit.quantization.transforms import TransformableConfig, with_transforms

if TYPE_CHECKING:
    from lowbit.quantization.linear import QuantizedLinear


@dataclass(frozen=True, kw_only=True)
class Int8Config(TransformableConfig):
    """Configuration of ``int8``.

    Attributes:
        activation_scheme: ``"dynamic"``, the only one.
        activation_bits: 8, or 2 to 7 to round activations to fewer bits first: emulated, to see what such activations
            do to quality. It saves nothing.
        is_checkpoint_int8_serialized: the checkpoint's weights are int8 already.
    """

    activation_scheme: str = "dynamic"
    activation_bits: int = 8
    is_checkpoint_int8_serialized: bool = False

    method_name: ClassVar[str] = "int8"
    serialized_flag: ClassVar[str] = "is_checkpoint_int8_serialized"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_scheme != "dynamic":
            raise ConfigError(
                f"int8 has no activation_scheme {self.activation_scheme!r}: activations are scaled per token while"
                " running; use 'dynamic'"
            )
        if type(self.activation_bits) is not int or not 2 <= self.activation_bits <= 8:
            raise ConfigError(f"activation_bits must be a whole number from 2 to 8, not {self.activation_bits!r}")

    def linear_method(self) -> LinearMethod:
        """Return the method with this configuration's kernel and transforms."""
        return with_transforms(Int8LinearMethod(self.kernel, self.activation_bits), self.smoothing, self.rotation)

    def weight_only_method(self) -> LinearMethod:
        """Return W8A16 on the same tensors; neither smoothed nor rotated, as no activation is rounded."""
        return Int8WeightOnlyMethod()

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds; the scheme is always named, for readers that require it."""
        values = super().to_dict()
        return {**values, "activation_scheme": self.activation_scheme}


class Int8LinearMethod(LinearMethod):
    """Int8 W8A8 of a linear layer."""

    name = "int8"
    family = "int8"
    table = int8.IMPLEMENTATIONS

    def __init__(self, kernel: str = AUTO, activation_bits: int = 8) -> None:
        super().__init__(kernel)
        self.activation_bits = activation_bits

    @property
    def is_kernel_alone(self) -> bool:
        """Where activations are not rounded to fewer bits first."""
        return self.activation_bits == 8

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return ``weight`` int8 [N, K] and ``weight_scale`` float32 [N, 1]."""
        return (
            TensorSpec("weight", torch.int8, (N, K)),
            TensorSpec("weight_scale", torch.float32, (N, fixed(1))),
        )

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Accept scales [N, 1], [N] or one for the whole layer."""
        if name == "weight_scale":
            tensor = per_channel_scale(tensor, layer.out_features)
        return super().canonical_tensor(layer, name, tensor)

    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize [N, K] by rows; see ``lowbit.ops.int8``."""
        quantized, scale = int8.quantize_operator(weight)
        return {"weight": quantized, "weight_scale": scale}

    def dequantize_weight(self, layer: QuantizedLinear) -> torch.Tensor:
        """Return ``weight * weight_scale``."""
        return int8.dequantize_int8(layer.get_parameter("weight"), layer.get_parameter("weight_scale"))

    def tensors(self, layer: QuantizedLinear) -> Prepared:
        """Return the weight and its scale."""
        return Prepared(layer.get_parameter("weight"), layer.get_parameter("weight_scale"), format=self.format)

    def apply(self, layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Quantize x by tokens and multiply."""
        return layer.multiply(x if self.activation_bits == 8 else round_to_bits(x, self.activation_bits), bias)


class Int8WeightOnlyMethod(Int8LinearMethod):
    """Int8 weights of a linear layer, with activations left as they are (W8A16)."""

    name = "int8_weight_only"
    weight_only = True
    activation_scheme = "none"

    def __init__(self) -> None:
        super().__init__("weight_only")


def round_to_bits(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round each token to the symmetric grid of a ``bits``-bit integer with a scale of its own.

    Args:
        x: [..., K] floating.
        bits: at least 2.

    Returns:
        ``round(x / scale) * scale`` with ``scale = absmax / (2**(bits - 1) - 1)``, in ``x.dtype``.
    """
    largest = 2 ** (bits - 1) - 1
    values = x.float()
    scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=int8.SMALLEST_ABSMAX) / largest
    rounded: torch.Tensor = ((values / scale).round() * scale).to(x.dtype)
    return rounded
