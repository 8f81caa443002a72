"""A quantization method as another package would bring it: int8 weights under one scale for the whole layer.

It is its own kernel module too: ``supports``, ``pack_weight``, ``unpack_weight`` and ``linear``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lowbit.ops.dispatch import ANY_DEVICE, Implementation, Problem
from lowbit.quantization import LinearMethod, QuantizationConfig, QuantizedLinear
from lowbit.quantization.tensors import K, N, TensorSpec


@dataclass(frozen=True, kw_only=True)
class ToyConfig(QuantizationConfig):
    levels: int = 127
    is_checkpoint_serialized: bool = False

    @classmethod
    def get_name(cls) -> str:
        return "toy_int8"

    @property
    def is_serialized(self) -> bool:
        return self.is_checkpoint_serialized

    def linear_method(self) -> LinearMethod:
        return ToyLinearMethod(self.levels, self.kernel)

    def as_serialized(self, ignored_layers: Sequence[str]) -> ToyConfig:
        return replace(self, is_checkpoint_serialized=True, ignored_layers=list(ignored_layers))


class ToyLinearMethod(LinearMethod):
    name = "toy_int8"
    family = "toy"
    table = (Implementation("plain", __name__, ANY_DEVICE),)

    def __init__(self, levels: int, kernel: str) -> None:
        super().__init__(kernel)
        self.levels = levels

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        return TensorSpec("weight", torch.int8, (N, K)), TensorSpec("weight_scale", torch.float32)

    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.float().abs().amax() / self.levels
        return {"weight": (weight.float() / scale).round().to(torch.int8), "weight_scale": scale}

    def dequantize_weight(self, layer: QuantizedLinear) -> torch.Tensor:
        return layer.get_parameter("weight").float() * layer.get_parameter("weight_scale")

    def apply(self, layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert layer.kernel is not None
        result: torch.Tensor = layer.kernel.linear(x, layer.weight, layer.get_parameter("weight_scale"), bias)
        return result


def supports(problem: Problem) -> str | None:
    return None


def pack_weight(weight: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
    return weight.t().contiguous().unsqueeze(0)


def unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    return packed[0].t().contiguous()


def linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result = x.float() @ (packed[0].float() * scale)
    return (result if bias is None else result + bias).to(x.dtype)
