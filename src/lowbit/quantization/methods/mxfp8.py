"""MXFP8 W8A8: e4m3 in groups of 32 that share a power of two, weights and activations alike.

On disk, as vLLM-Omni and msModelSlim have it: ``weight`` e4m3 [N, K] and ``weight_scale`` E8M0 uint8 [N, ceil(K / 32)].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lowbit.errors import CheckpointError
from lowbit.ops import mx
from lowbit.ops.fp8 import E4M3
from lowbit.quantization.base import LinearMethod
from lowbit.quantization.methods.mx import MxLinearMethod
from lowbit.quantization.scales import quantize_by_rows
from lowbit.quantization.tensors import K, N, TensorSpec
from lowbit.quantization.transforms import TransformableConfig, with_transforms

if TYPE_CHECKING:
    from lowbit.quantization.linear import QuantizedLinear

WEIGHT_ROUNDING = "ceil"


@dataclass(frozen=True, kw_only=True)
class Mxfp8Config(TransformableConfig):
    """Configuration of ``mxfp8``.

    Attributes:
        is_checkpoint_mxfp8_serialized: the checkpoint's weights are MXFP8 already.
    """

    is_checkpoint_mxfp8_serialized: bool = False

    method_name: ClassVar[str] = "mxfp8"
    serialized_flag: ClassVar[str] = "is_checkpoint_mxfp8_serialized"

    def linear_method(self) -> LinearMethod:
        """Return the method with this configuration's kernel and transforms."""
        return with_transforms(Mxfp8LinearMethod(self.kernel), self.smoothing, self.rotation)


class Mxfp8LinearMethod(MxLinearMethod):
    """MXFP8 W8A8 of a linear layer."""

    name = "mxfp8"

    @property
    def elements(self) -> TensorSpec:
        """``weight``, e4m3 [N, K]."""
        return TensorSpec("weight", E4M3, (N, K))

    def canonical_weight(self, layer: QuantizedLinear, weight: torch.Tensor) -> torch.Tensor:
        """Accept weights whose values are e4m3's in a wider dtype."""
        return exact_e4m3(layer, weight)

    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize [N, K]."""
        elements, scale = quantize_by_rows(weight, lambda rows: mx.quantize_mxfp8(rows, WEIGHT_ROUNDING))
        return {"weight": elements, "weight_scale": scale}


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
