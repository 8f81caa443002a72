"""A quantization method of your own, whole: int8 weights under one scale for the layer, 16-bit activations.

python examples/custom_method.py

A package that is installed names the class as an entry point instead (docs/structure.md); then ``--quantization
toy_int8`` works in every command. This module is its own kernel too: ``can_run``, ``prepare``, ``restore`` and
``linear``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lowbit import Omni, OmniDiffusionSamplingParams, register_quantization_method
from lowbit.ops.dispatch import ANY_DEVICE, Implementation, Problem
from lowbit.ops.weight_format import Prepared
from lowbit.quantization import LinearMethod, QuantizationConfig, QuantizedLinear
from lowbit.quantization.tensors import K, N, TensorSpec


@dataclass(frozen=True, kw_only=True)
class ToyConfig(QuantizationConfig):
    """The method's options; they are written to ``config.json`` with the checkpoint.

    Attributes:
        levels: codes go from ``-levels`` to ``levels``.
        is_checkpoint_serialized: whether the checkpoint holds quantized weights.
    """

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
    """What a layer holds, how it gets there from the original weight, and what it computes."""

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

    def tensors(self, layer: QuantizedLinear) -> Prepared:
        return Prepared(layer.get_parameter("weight"), layer.get_parameter("weight_scale"), format=self.format)


def can_run(problem: Problem) -> str | None:
    """Return why the kernel cannot run ``problem``; this one can run all."""
    return None


def prepare(tensors: Prepared, overwrite: bool = False) -> Prepared:
    """Return a weight [N, K] as ``linear`` reads it: [1, K, N]."""
    return tensors._replace(weight=tensors.weight.t().contiguous().unsqueeze(0))


def restore(prepared: Prepared) -> Prepared:
    """Undo ``prepare``: checkpoints and state dicts hold [N, K]."""
    return prepared._replace(weight=prepared.weight[0].t().contiguous())


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Dequantize the weight and multiply in float32."""
    result = x.float() @ (prepared.weight[0].float() * prepared.scales)
    return (result if bias is None else result + bias).to(x.dtype)


def main() -> None:
    register_quantization_method("toy_int8", ToyConfig)
    omni = Omni(quantization_config={"method": "toy_int8", "levels": 63})
    print(omni.manifests["transformer"].summary())
    output = omni.generate("a green star", OmniDiffusionSamplingParams(seed=0))
    print(f"wrote {output[0].save_images('star.png')[0]}")


if __name__ == "__main__":
    main()
