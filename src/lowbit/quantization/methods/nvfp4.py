"""NVFP4: e2m1 in groups of 16 with e4m3 scales under one float32 scale; W4A4, or W4A16 with ``weight_only``.

On disk, as ModelOpt has it: ``weight`` uint8 [N, K / 2], the even column in the low nibble; ``weight_scale`` e4m3
[N, ceil(K / 16)]; ``weight_scale_2`` float32 []; with the static scheme ``input_scale`` float32 [], the largest
magnitude of the input over 6 * 448.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lowbit.errors import ConfigError
from lowbit.ops import nvfp4
from lowbit.ops.fp8 import E4M3
from lowbit.ops.weight_format import Prepared
from lowbit.quantization.base import LinearMethod
from lowbit.quantization.methods.fp8 import ACTIVATION_SCHEMES, UNCALIBRATED
from lowbit.quantization.scales import finite_and_positive, per_tensor_scale, quantize_by_rows
from lowbit.quantization.tensors import K, N, TensorSpec, groups
from lowbit.quantization.transforms import TransformableConfig, with_transforms

if TYPE_CHECKING:
    from lowbit.quantization.linear import QuantizedLinear


@dataclass(frozen=True, kw_only=True)
class NvFp4Config(TransformableConfig):
    """Configuration of ``nvfp4``.

    Attributes:
        weight_only: leave activations as they are (W4A16).
        activation_scheme: ``"dynamic"``: a global scale per token while running; ``"static"``: one per layer, from the
            checkpoint or from calibration. The scales of the groups are dynamic in both.
        is_checkpoint_nvfp4_serialized: the checkpoint's weights are NVFP4 already.
    """

    weight_only: bool = False
    activation_scheme: str = "dynamic"
    is_checkpoint_nvfp4_serialized: bool = False

    method_name: ClassVar[str] = "nvfp4"
    serialized_flag: ClassVar[str] = "is_checkpoint_nvfp4_serialized"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_scheme not in ACTIVATION_SCHEMES:
            known = ", ".join(ACTIVATION_SCHEMES)
            raise ConfigError(f"nvfp4 has no activation_scheme {self.activation_scheme!r}; use one of {known}")
        changed = self.smoothing is not None or self.rotation is not None
        if self.activation_scheme == "static" and (changed or self.weight_only):
            raise ConfigError("smoothing, rotation and weight_only of nvfp4 need activation_scheme 'dynamic'")

    def linear_method(self) -> LinearMethod:
        """Return the method with this configuration's scheme, kernel and transforms."""
        scheme = "none" if self.weight_only else self.activation_scheme
        return with_transforms(NvFp4LinearMethod(scheme, self.kernel), self.smoothing, self.rotation)


class NvFp4LinearMethod(LinearMethod):
    """NVFP4 of a linear layer.

    Attributes:
        has_input_scale: the checkpoint has an ``input_scale``.
    """

    name = "nvfp4"
    family = "nvfp4"
    table = nvfp4.IMPLEMENTATIONS

    def __init__(self, activation_scheme: str, kernel: str) -> None:
        super().__init__(kernel)
        self.activation_scheme = activation_scheme
        self.has_input_scale = activation_scheme == "static"

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return ``weight``, its scales and, for static activations, ``input_scale``."""
        static = (TensorSpec("input_scale", torch.float32),) if self.has_input_scale else ()
        return (
            TensorSpec("weight", torch.uint8, (N, groups(K, 2))),
            TensorSpec("weight_scale", E4M3, (N, groups(K, nvfp4.GROUP_SIZE))),
            TensorSpec("weight_scale_2", torch.float32),
            *static,
        )

    def refusal(self, layer: torch.nn.Linear) -> str | None:
        """Refuse an odd number of input channels."""
        return "an odd number of input channels" if layer.in_features % 2 else None

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Accept scales of the whole layer as [] or [1]; refuse those that are not finite or not positive.

        A group's scale may be zero: some writers give it to groups of zeros.
        """
        if name in ("weight_scale_2", "input_scale"):
            tensor = per_tensor_scale(tensor)
        tensor = super().canonical_tensor(layer, name, tensor)
        if name == "weight_scale" and not tensor.is_meta:
            # Codes compare as their values do: bit 7 is the sign, 0x7F is NaN.
            magnitudes = tensor.view(torch.uint8)
            finite_and_positive(layer, name, torch.where(magnitudes == 0, 1.0, tensor.float()))
        return finite_and_positive(layer, name, tensor) if name in ("weight_scale_2", "input_scale") else tensor

    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize [N, K] with the group scales of the smallest squared error.

        An ``input_scale`` still to be calibrated is ``UNCALIBRATED``.
        """
        global_scale = nvfp4.global_scale_of(weight.abs().amax(), nvfp4.SEARCHED_SCALE_MAX)
        packed, scale = quantize_by_rows(weight, lambda rows: nvfp4.quantize_nvfp4(rows, global_scale, search=True))
        tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": global_scale}
        if self.has_input_scale:
            tensors["input_scale"] = torch.tensor(UNCALIBRATED, dtype=torch.float32, device=weight.device)
        return tensors

    def dequantize_weight(self, layer: QuantizedLinear) -> torch.Tensor:
        """Return ``weight`` times its scales."""
        scales = layer.get_parameter("weight_scale"), layer.get_parameter("weight_scale_2")
        return nvfp4.dequantize_nvfp4(layer.get_parameter("weight"), *scales)

    def input_scale_of(self, absmax: float) -> float:
        """Return ``absmax / (6 * 448)``."""
        return float(nvfp4.global_scale_of(torch.tensor(absmax)))

    def tensors(self, layer: QuantizedLinear) -> Prepared:
        """Return the weight, its scales and, where the scheme uses it, that of static activations."""
        weight, scale, global_scale = (
            layer.get_parameter(name) for name in ("weight", "weight_scale", "weight_scale_2")
        )
        input_scale = layer.get_parameter("input_scale") if self.activation_scheme == "static" else None
        return Prepared(weight, scale, outer_scale=global_scale, input_scale=input_scale, format=self.format)
