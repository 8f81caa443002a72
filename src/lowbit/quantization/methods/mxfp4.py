"""MXFP4 W4A4: e2m1 in groups of 32 that share a power of two, with one scale or with a second one per 512.

In a state dict: ``weight`` uint8 [N, K / 2], the even column in the low nibble; ``weight_scale`` E8M0 uint8
[N, ceil(K / 32)]; with the second scale ``weight_dual_scale`` float32 [N, ceil(K / 512), 1]; and ``mul_scale`` float32
[K], by which the input is multiplied: optional for one scale, always there for two.

On disk vLLM-Omni has the weight unpacked, numbers of e2m1 in e4m3 [N, K]; msModelSlim packs it. Both are read, told
apart by dtype and shape; ``pack_weights`` says which is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lowbit.errors import CheckpointError, ConfigError
from lowbit.ops import mx
from lowbit.ops.e2m1 import decode_e2m1_pairs, encode_e2m1, pack_nibbles
from lowbit.ops.fp8 import E4M3
from lowbit.quantization.base import LinearMethod
from lowbit.quantization.methods.mx import MxLinearMethod
from lowbit.quantization.scales import finite_and_positive, quantize_by_rows
from lowbit.quantization.tensors import K, N, TensorSpec, fixed, groups
from lowbit.quantization.transforms import TransformableConfig, with_transforms

if TYPE_CHECKING:
    from lowbit.quantization.linear import QuantizedLinear

WEIGHT_ROUNDING = "mse"
# Blocks of the main stack, in diffusers' and transformers' names; single-stream blocks of FLUX come after them.
_BLOCK = re.compile(r"(?:^|\.)(?:transformer_blocks|blocks|layers)\.(\d+)\.")
_UNPACKED = (E4M3, torch.bfloat16, torch.float16, torch.float32)
# Options of vLLM-Omni's that name what its Ascend kernels do; only their values at rest are understood here.
_AT_REST: Mapping[str, tuple[Any, ...]] = {
    "w4a8_fallback_steps": (None, []),
    "w4a8_fallback_layers": (None, []),
    "mxfp4_scale_alg": (None, 0),
}


@dataclass(frozen=True, kw_only=True)
class _Fp4Config(TransformableConfig):
    """What the two configurations share.

    Attributes:
        pack_weights: write two weights to a byte; vLLM-Omni 0.30 reads them unpacked, which is the default.
    """

    pack_weights: bool = False

    @classmethod
    def _options(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        for name, allowed in _AT_REST.items():
            if name in config and config[name] not in allowed:
                raise ConfigError(f"{cls.get_name()}: {name}={config[name]!r} is not supported; leave it out")
        return super()._options({name: value for name, value in config.items() if name not in _AT_REST})

    def stored_tensors(self, state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return the state dict with weights unpacked to e4m3 [N, K] unless ``pack_weights``."""

        def stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
            is_packed = tensor.dtype == torch.uint8 and name.endswith(".weight") and f"{name}_scale" in state_dict
            return decode_e2m1_pairs(tensor).flatten(-2).to(E4M3) if is_packed else tensor

        return state_dict if self.pack_weights else {name: stored(name, value) for name, value in state_dict.items()}


@dataclass(frozen=True, kw_only=True)
class Mxfp4Config(_Fp4Config):
    """Configuration of ``mxfp4``.

    Attributes:
        require_smooth_scale: a checkpoint without ``mul_scale`` is an error.
        is_checkpoint_mxfp4_serialized: the checkpoint's weights are MXFP4 already.
    """

    require_smooth_scale: bool = False
    is_checkpoint_mxfp4_serialized: bool = False

    method_name: ClassVar[str] = "mxfp4"
    serialized_flag: ClassVar[str] = "is_checkpoint_mxfp4_serialized"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.require_smooth_scale and not self.is_serialized:
            raise ConfigError("require_smooth_scale is of checkpoints that are MXFP4 already")

    def linear_method(self) -> LinearMethod:
        """Return the method with this configuration's kernel and transforms."""
        method = with_transforms(Mxfp4LinearMethod(self.kernel), self.smoothing, self.rotation, self.is_serialized)
        if self.require_smooth_scale:
            method.optional -= {"mul_scale"}
        return method


@dataclass(frozen=True, kw_only=True)
class Mxfp4DualScaleConfig(_Fp4Config):
    """Configuration of ``mxfp4_dualscale``.

    Attributes:
        num_bf16_fallback_layers: how many of the first blocks stay as they are when quantizing; a checkpoint says in
            ``ignored_layers`` what it kept.
        is_checkpoint_serialized: the checkpoint's weights are MXFP4 with two scales already.
    """

    num_bf16_fallback_layers: int = 5
    is_checkpoint_serialized: bool = False

    method_name: ClassVar[str] = "mxfp4_dualscale"
    serialized_flag: ClassVar[str] = "is_checkpoint_serialized"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.num_bf16_fallback_layers) is not int or self.num_bf16_fallback_layers < 0:
            raise ConfigError(
                f"num_bf16_fallback_layers must be a number of blocks, 0 or more, not {self.num_bf16_fallback_layers!r}"
            )

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """No other library has a method of this name."""
        return True

    def linear_method(self) -> LinearMethod:
        """Return the method with this configuration's kernel and transforms."""
        method = Mxfp4DualScaleLinearMethod(self.kernel)
        return with_transforms(method, self.smoothing, self.rotation, has_mul_scale=True)

    def is_leading_block(self, name: str) -> bool:
        """Tell whether a layer is in one of the first blocks, which stay as they are."""
        block = _BLOCK.search(name)
        return not self.is_serialized and block is not None and int(block[1]) < self.num_bf16_fallback_layers

    def kept_reason(self, name: str) -> str:
        """Return why a layer is left as it is."""
        return "num_bf16_fallback_layers" if self.is_leading_block(name) else super().kept_reason(name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethod | None:
        """Return what to do with ``layer``; ``None`` for ignored ones and those in leading blocks."""
        return None if self.is_leading_block(prefix) else super().get_quant_method(layer, prefix)


class Mxfp4LinearMethod(MxLinearMethod):
    """MXFP4 W4A4 of a linear layer."""

    name = "mxfp4"

    @property
    def elements(self) -> TensorSpec:
        """``weight``, uint8 [N, K / 2]."""
        return TensorSpec("weight", torch.uint8, (N, groups(K, 2)))

    def refusal(self, layer: torch.nn.Linear) -> str | None:
        """Refuse an odd number of input channels."""
        return "an odd number of input channels" if layer.in_features % 2 else None

    def canonical_weight(self, layer: QuantizedLinear, weight: torch.Tensor) -> torch.Tensor:
        """Accept unpacked weights."""
        return packed_e2m1(layer, weight)

    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize [N, K] with the scales of the smallest squared error."""
        packed, scale = quantize_by_rows(weight, lambda rows: mx.quantize_mxfp4(rows, WEIGHT_ROUNDING))
        return {"weight": packed, "weight_scale": scale}


class Mxfp4DualScaleLinearMethod(Mxfp4LinearMethod):
    """MXFP4 W4A4 of a linear layer with a second scale per 512 input channels."""

    name = "mxfp4_dualscale"

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return ``weight``, ``weight_scale`` and ``weight_dual_scale``."""
        dual = TensorSpec("weight_dual_scale", torch.float32, (N, groups(K, mx.DUAL_GROUP_SIZE), fixed(1)))
        return (*super().specs(out_features, in_features), dual)

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Accept dual scales without the last dimension too."""
        if name == "weight_dual_scale":
            tensor = tensor.unsqueeze(-1) if tensor.ndim == 2 else tensor
            return finite_and_positive(layer, name, super().canonical_tensor(layer, name, tensor))
        return super().canonical_tensor(layer, name, tensor)

    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize [N, K]: float32 scales per 512 from the absmax, those per 32 of the smallest squared error."""
        packed, scale, dual_scale = quantize_by_rows(
            weight, lambda rows: mx.quantize_mxfp4_dualscale(rows, WEIGHT_ROUNDING)
        )
        return {"weight": packed, "weight_scale": scale, "weight_dual_scale": dual_scale.unsqueeze(-1)}

    def dual_scale(self, layer: QuantizedLinear) -> torch.Tensor:
        """Return the second scale, float32 [N, ceil(K / 512)]."""
        return layer.get_parameter("weight_dual_scale").squeeze(-1)


def packed_e2m1(layer: QuantizedLinear, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight [N, K] that holds e2m1 values in a wider floating dtype packed, uint8 [N, K / 2].

    Others are returned unchanged.

    Raises:
        CheckpointError: some values are not e2m1's.
    """
    if weight.dtype not in _UNPACKED or weight.shape != (layer.out_features, layer.in_features):
        return weight
    if weight.is_meta:
        return torch.empty(layer.out_features, layer.in_features // 2, dtype=torch.uint8, device="meta")
    packed = pack_nibbles(encode_e2m1(weight.float()))
    if not torch.equal(decode_e2m1_pairs(packed).flatten(-2), weight.float()):
        raise CheckpointError(
            f"{layer.prefix}.weight: unpacked e2m1 ({weight.dtype}) with values other than 0, 0.5, 1, 1.5, 2, 3, 4, 6"
        )
    return packed
