"""FP8 W8A8 in e4m3: activations dynamic per token or static per tensor; weights per output channel or per block.

On disk: ``weight`` e4m3 [N, K] with ``weight_scale`` float32 [N, 1], or with ``weight_block_size`` and
``weight_scale_inv`` float32 [ceil(N / rows), ceil(K / columns)] (the names of vLLM and of DeepSeek's checkpoints; the
value is multiplied with, whatever the name says); with the static scheme also ``input_scale`` float32 [].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lowbit.errors import ConfigError
from lowbit.ops import fp8
from lowbit.ops.weight_format import Prepared
from lowbit.quantization.base import LinearMethod
from lowbit.quantization.scales import finite_and_positive, per_channel_scale, per_tensor_scale
from lowbit.quantization.tensors import Dim, K, N, TensorSpec, fixed, groups
from lowbit.quantization.transforms import TransformableConfig, with_transforms

if TYPE_CHECKING:
    from lowbit.quantization.linear import QuantizedLinear

ACTIVATION_SCHEMES = ("dynamic", "static")
UNCALIBRATED = 0.0


@dataclass(frozen=True, kw_only=True)
class Fp8Config(TransformableConfig):
    """Configuration of ``fp8``.

    Attributes:
        activation_scheme: ``"dynamic"``: scaled per token while running (per group of columns with
            ``weight_block_size``); ``"static"``: by one scale per layer, from the checkpoint or from calibration.
        weight_block_size: [rows, columns] of a weight block with one scale; ``None`` for one per output channel.
        is_checkpoint_fp8_serialized: the checkpoint's weights are FP8 already.
    """

    activation_scheme: str = "dynamic"
    weight_block_size: list[int] | None = None
    is_checkpoint_fp8_serialized: bool = False

    method_name: ClassVar[str] = "fp8"
    serialized_flag: ClassVar[str] = "is_checkpoint_fp8_serialized"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_scheme not in ACTIVATION_SCHEMES:
            raise ConfigError(
                f"fp8 has no activation_scheme {self.activation_scheme!r}; use one of {', '.join(ACTIVATION_SCHEMES)}"
            )
        if self.weight_block_size is not None:
            self._check_block_size(self.weight_block_size)
        if self.activation_scheme == "static" and (self.smoothing is not None or self.rotation is not None):
            raise ConfigError("smoothing and rotation of fp8 need activation_scheme 'dynamic'")

    def _check_block_size(self, block_size: Sequence[int]) -> None:
        edges = list(block_size) if isinstance(block_size, list | tuple) else []
        if len(edges) != 2 or not all(isinstance(edge, int) and edge > 0 for edge in edges):
            raise ConfigError(f"weight_block_size must be [rows, columns], such as [128, 128], not {block_size!r}")
        if self.activation_scheme == "static":
            raise ConfigError(
                "weight_block_size needs activation_scheme 'dynamic': activations are scaled in groups of the block's"
                " columns while running"
            )
        object.__setattr__(self, "weight_block_size", list(block_size))

    def linear_method(self) -> LinearMethod:
        """Return the method with this configuration's scheme, blocks, kernel and transforms."""
        block = None if self.weight_block_size is None else (self.weight_block_size[0], self.weight_block_size[1])
        method = Fp8LinearMethod(self.activation_scheme, block, self.kernel)
        return with_transforms(method, self.smoothing, self.rotation)

    def weight_only_method(self) -> LinearMethod:
        """Return W8A16 on the same tensors, without ``input_scale``; neither smoothed nor rotated."""
        block = None if self.weight_block_size is None else (self.weight_block_size[0], self.weight_block_size[1])
        return Fp8WeightOnlyMethod(block)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds; the scheme is always named, for readers that require it."""
        values = super().to_dict()
        return {**values, "activation_scheme": self.activation_scheme}


class Fp8LinearMethod(LinearMethod):
    """FP8 W8A8 of a linear layer."""

    name = "fp8"
    family = "fp8"
    table = fp8.IMPLEMENTATIONS

    def __init__(self, activation_scheme: str, block_size: tuple[int, int] | None, kernel: str) -> None:
        super().__init__(kernel)
        self.activation_scheme = activation_scheme
        self.block_size = block_size
        self.scale_name = "weight_scale" if block_size is None else "weight_scale_inv"

    @property
    def is_kernel_alone(self) -> bool:
        """Where rows of activations have a scale each and channels of the weight, too."""
        return self.activation_scheme == "dynamic" and self.block_size is None

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return ``weight``, its scale and, for static activations, ``input_scale``."""
        static = (TensorSpec("input_scale", torch.float32),) if self.activation_scheme == "static" else ()
        weight = TensorSpec("weight", fp8.E4M3, (N, K))
        return (weight, TensorSpec(self.scale_name, torch.float32, self._scale_dims()), *static)

    def _scale_dims(self) -> tuple[Dim, ...]:
        if self.block_size is None:
            return (N, fixed(1))
        rows, columns = self.block_size
        return (groups(N, rows), groups(K, columns))

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Accept weight scales [N, 1], [N] or one for the whole layer, and input scales [] or [1]."""
        if name == "weight_scale":
            tensor = per_channel_scale(tensor, layer.out_features)
        if name == "input_scale":
            tensor = super().canonical_tensor(layer, name, per_tensor_scale(tensor))
            return finite_and_positive(layer, name, tensor)
        return super().canonical_tensor(layer, name, tensor)

    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize [N, K] by rows or blocks; an ``input_scale`` still to be calibrated is ``UNCALIBRATED``."""
        if self.block_size is None:
            quantized, scale = fp8.quantize_per_token_operator(weight)
        else:
            quantized, scale = fp8.quantize_per_block_operator(weight, self.block_size)
        tensors = {"weight": quantized, self.scale_name: scale}
        if self.activation_scheme == "static":
            tensors["input_scale"] = torch.tensor(UNCALIBRATED, dtype=torch.float32, device=weight.device)
        return tensors

    def dequantize_weight(self, layer: QuantizedLinear) -> torch.Tensor:
        """Return ``weight`` times its scale."""
        return fp8.dequantize_fp8(layer.get_parameter("weight"), self._scale(layer), self.block_size)

    def input_scale_of(self, absmax: float) -> float:
        """Return ``absmax / 448``."""
        return max(absmax, fp8.SMALLEST_ABSMAX) / fp8.E4M3_MAX

    def tensors(self, layer: QuantizedLinear) -> Prepared:
        """Return the weight, its scales and that of static activations."""
        input_scale = layer.get_parameter("input_scale") if self.activation_scheme == "static" else None
        return Prepared(layer.get_parameter("weight"), self._scale(layer), input_scale=input_scale, format=self.format)

    def _scale(self, layer: QuantizedLinear) -> torch.Tensor:
        """Return the weight's scale as kernels take it: float32 [N, 1], [], or one per block."""
        return layer.get_parameter(self.scale_name)


class Fp8WeightOnlyMethod(Fp8LinearMethod):
    """FP8 weights of a linear layer, with activations left as they are (W8A16)."""

    name = "fp8_weight_only"
    weight_only = True

    def __init__(self, block_size: tuple[int, int] | None) -> None:
        super().__init__("none", block_size, "weight_only")
