"""Int8 W8A8: symmetric; weights per output channel, activations per token at run time.

On disk (the layout of vLLM-Omni): ``weight`` int8 [N, K] and ``weight_scale`` float32 [N, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lowbit.errors import ConfigError
from lowbit.ops import int8
from lowbit.ops.dispatch import AUTO
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.scales import per_channel_scale
from lowbit.quantization.transforms import check_transforms, with_transforms

if TYPE_CHECKING:
    from typing_extensions import Self

    from lowbit.quantization.linear import QuantizedLinear


@dataclass(frozen=True, kw_only=True)
class Int8Config(QuantizationConfig):
    """Configuration of ``int8``.

    Attributes:
        activation_scheme: ``"dynamic"``, the only one.
        activation_bits: 8, or 2 to 7 to round activations to fewer bits first: emulated, to see what such activations
            do to quality. It saves nothing.
        smoothing: 0 to 1: how much of the difference between an input's channels goes to the weight, found on
            calibration prompts; ``None``: nothing. See ``lowbit.quantization.smoothing``.
        rotation: multiply groups of this many channels by a Hadamard matrix; ``None``: don't. See
            ``lowbit.quantization.transforms``.
        is_checkpoint_int8_serialized: the checkpoint's weights are int8 already.
    """

    activation_scheme: str = "dynamic"
    activation_bits: int = 8
    smoothing: float | None = None
    rotation: int | None = None
    is_checkpoint_int8_serialized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_scheme != "dynamic":
            raise ConfigError(
                f"int8 has no activation_scheme {self.activation_scheme!r}: activations are scaled per token while"
                " running; use 'dynamic'"
            )
        check_transforms(self.smoothing, self.rotation)
        if type(self.activation_bits) is not int or not 2 <= self.activation_bits <= 8:
            raise ConfigError(f"activation_bits must be a whole number from 2 to 8, not {self.activation_bits!r}")
        if not isinstance(self.is_checkpoint_int8_serialized, bool):
            raise ConfigError("is_checkpoint_int8_serialized must be true or false")

    @classmethod
    def get_name(cls) -> str:
        """Return ``"int8"``."""
        return "int8"

    @property
    def is_serialized(self) -> bool:
        """Whether the checkpoint's weights are int8 already."""
        return self.is_checkpoint_int8_serialized

    @property
    def needs_calibration(self) -> bool:
        """Whether smoothing is still to be found."""
        return self.smoothing is not None and not self.is_serialized

    def linear_method(self) -> LinearMethod:
        """Return the method with this configuration's kernel and transforms."""
        return with_transforms(Int8LinearMethod(self.kernel, self.activation_bits), self.smoothing, self.rotation)

    def weight_only_method(self) -> LinearMethod:
        """Return W8A16 on the same tensors; neither smoothed nor rotated, as no activation is rounded."""
        return Int8WeightOnlyMethod()

    def as_serialized(self, ignored_layers: Sequence[str]) -> Self:
        """Return the configuration to write beside the quantized tensors."""
        return replace(self, is_checkpoint_int8_serialized=True, ignored_layers=list(ignored_layers))

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

    def create_weights(self, layer: QuantizedLinear) -> None:
        """Register ``weight`` int8 [N, K] and ``weight_scale`` float32 [N, 1]."""
        layer.register_quantized("weight", (layer.out_features, layer.in_features), torch.int8)
        layer.register_quantized("weight_scale", (layer.out_features, 1), torch.float32)

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
        return layer.get_parameter("weight").float() * layer.get_parameter("weight_scale")

    def apply(self, layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Quantize x by tokens and multiply."""
        if self.activation_bits < 8:
            x = round_to_bits(x, self.activation_bits)
        assert layer.kernel is not None
        result: torch.Tensor = layer.kernel.linear(x, layer.weight, layer.weight_scale, bias)
        return result


class Int8WeightOnlyMethod(Int8LinearMethod):
    """Int8 weights of a linear layer, with activations left as they are (W8A16)."""

    name = "int8_weight_only"
    weight_only = True

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
