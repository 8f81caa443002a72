"""Changes of a linear layer's input that leave the layer's result as it is and make its rounding smaller.

*Rotation* (QuaRot, Ashkboos et al., 2024): each group of channels is multiplied by an orthonormal Hadamard matrix, and
so are the weight's columns: ``(x H) (W H)^T = x W^T``. An outlier channel is spread over its group, which helps
integers; floating-point formats such as e4m3 hold outliers at no cost and lose by it.

*Smoothing* (SmoothQuant, Xiao et al., 2023): channel j of the input is multiplied by ``mul_scale[j]``, and column j of
the weight divided by it. ``lowbit.quantization.calibration.smoothing`` finds the scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lowbit.errors import ConfigError
from lowbit.ops.rotation import hadamard, rotate
from lowbit.ops.weight_format import Prepared
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.scales import finite_and_positive
from lowbit.quantization.tensors import Along, K, TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Self

    from lowbit.quantization.linear import QuantizedLinear

ROTATIONS = (4, 16, 64, 256)
"""Sizes of a rotation's groups: powers of four, for which there is a regular matrix of powers of two."""


def check_transforms(smoothing: float | None, rotation: int | None) -> None:
    """Raise ``ConfigError`` for a ``smoothing`` outside (0, 1] or a ``rotation`` of a size there is not."""
    if smoothing is not None and (type(smoothing) not in (int, float) or not 0 < smoothing <= 1):
        raise ConfigError(f"smoothing must be a number above 0, up to 1, such as 0.5, not {smoothing!r}")
    if rotation is not None and (type(rotation) is not int or rotation not in ROTATIONS):
        raise ConfigError(f"rotation must be one of {', '.join(map(str, ROTATIONS))}, not {rotation!r}")


@dataclass(frozen=True, kw_only=True)
class TransformableConfig(QuantizationConfig):
    """What the configurations of methods share that quantize activations while running.

    Attributes:
        smoothing: 0 to 1: how much of the difference between an input's channels goes to the weight, found on
            calibration prompts; ``None``: nothing. See ``lowbit.quantization.calibration.smoothing``.
        rotation: multiply groups of this many channels by a Hadamard matrix; ``None``: don't.
        method_name: as the user spells it.
        serialized_flag: the option that says of a checkpoint that its weights are quantized already.
    """

    smoothing: float | None = None
    rotation: int | None = None

    method_name: ClassVar[str]
    serialized_flag: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        for item in fields(self):
            if item.type == "bool" and not isinstance(getattr(self, item.name), bool):
                raise ConfigError(f"{item.name} must be true or false")
        check_transforms(self.smoothing, self.rotation)

    @classmethod
    def get_name(cls) -> str:
        """Return the method's name as the user spells it."""
        return cls.method_name

    @property
    def is_serialized(self) -> bool:
        """Whether the checkpoint's weights are quantized already."""
        flag: bool = getattr(self, self.serialized_flag)
        return flag

    @property
    def needs_calibration(self) -> bool:
        """Whether smoothing is still to be found."""
        return self.smoothing is not None and not self.is_serialized

    def as_serialized(self, ignored_layers: Sequence[str]) -> Self:
        """Return the configuration to write beside the quantized tensors."""
        changes: dict[str, Any] = {"ignored_layers": list(ignored_layers), self.serialized_flag: True}
        return replace(self, **changes)


def rotation_group(channels: int, rotation: int) -> int:
    """Return the largest size of ``ROTATIONS`` up to ``rotation`` that divides ``channels``, 1 if none does."""
    return max((size for size in ROTATIONS if size <= rotation and channels % size == 0), default=1)


@dataclass(frozen=True)
class InputTransform:
    """What happens to a layer's input first.

    Attributes:
        is_smoothed: it is multiplied by ``mul_scale``.
        rotation: matrix that each group of channels is then multiplied by, ``None`` for nothing.
    """

    is_smoothed: bool
    rotation: Tensor | None


class TransformedMethod(LinearMethod):
    """Another method behind a smoothed or rotated input.

    On disk: the other method's tensors, of the changed weight, and with smoothing ``mul_scale`` float32 [K], by which
    the input is multiplied (the name and meaning of vLLM-Omni's MX checkpoints). A scale of all ones is not applied.

    Attributes:
        is_scaled: there is a ``mul_scale``: with smoothing, or because the format has one.
    """

    def __init__(
        self, inner: LinearMethod, smoothing: float | None, rotation: int | None, has_mul_scale: bool = False
    ) -> None:
        super().__init__(inner.kernel)
        self.inner, self.smoothing, self.rotation = inner, smoothing, rotation
        self.is_scaled = smoothing is not None or has_mul_scale
        self.activation_scheme, self.block_size = inner.activation_scheme, inner.block_size
        self.optional = inner.optional | ({"mul_scale"} if has_mul_scale else set())
        self.name, self.family, self.table = inner.name, inner.family, inner.table

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return the other method's tensors and ``mul_scale``."""
        scale = (TensorSpec("mul_scale", torch.float32, (K,)),) if self.is_scaled else ()
        return self.inner.specs(out_features, in_features) + scale

    def cut_step(self, out_features: int, in_features: int, along: Along) -> int:
        """Keep whole what is rotated together."""
        step = self.inner.cut_step(out_features, in_features, along)
        return math.lcm(step, self._group(in_features)) if along == "k" else step

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: Tensor) -> Tensor:
        """Leave it to the other method, but for ``mul_scale``."""
        if name == "mul_scale":
            return finite_and_positive(layer, name, super().canonical_tensor(layer, name, tensor))
        return self.inner.canonical_tensor(layer, name, tensor)

    def quantize_weight(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantize [N, K], already divided by the layer's ``mul_scale``, rotated; the scale is all ones at first."""
        group = self._group(weight.shape[1])
        changed = weight if group == 1 else rotate(weight.float(), hadamard(group, device=weight.device))
        tensors = self.inner.quantize_weight(changed)
        if self.is_scaled:
            tensors["mul_scale"] = torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
        return tensors

    def dequantize_weight(self, layer: QuantizedLinear) -> Tensor:
        """Return the weight for the input as it comes."""
        weight = self.inner.dequantize_weight(layer)
        group = self._group(layer.in_features)
        if group > 1:
            weight = rotate(weight, hadamard(group, device=weight.device))
        return weight * layer.get_parameter("mul_scale") if "mul_scale" in layer.quantized_names else weight

    def refusal(self, layer: torch.nn.Linear) -> str | None:
        """Refuse what the other method refuses, and layers that can't be rotated."""
        if self.rotation is not None and self._group(layer.in_features) == 1:
            return f"{layer.in_features} channels can't be rotated in groups of 4 or more"
        return self.inner.refusal(layer)

    @property
    def weight_format(self) -> str:
        """What the other method's kernels call the format."""
        return self.inner.weight_format

    def tensors(self, layer: QuantizedLinear) -> Prepared:
        """Return the other method's."""
        return self.inner.tensors(layer)

    def facts(self, layer: QuantizedLinear) -> InputTransform:
        """Return what the input is to be multiplied with."""
        group = self._group(layer.in_features)
        device = layer.get_parameter("weight").device
        rotation = hadamard(group, layer.compute_dtype, device) if group > 1 else None
        scale = layer.get_parameter("mul_scale") if "mul_scale" in layer.quantized_names else None
        return InputTransform(scale is not None and (scale.is_meta or bool((scale != 1).any())), rotation)

    def apply(self, layer: QuantizedLinear, x: Tensor, bias: Tensor | None) -> Tensor:
        """Change x and let the other method compute."""
        transform: InputTransform = layer.bound.facts
        if transform.is_smoothed:
            x = (x * layer.get_parameter("mul_scale")).to(x.dtype)
        if transform.rotation is not None:
            x = rotate(x, transform.rotation)
        return self.inner.apply(layer, x, bias)

    def _group(self, channels: int) -> int:
        return 1 if self.rotation is None else rotation_group(channels, self.rotation)


def with_transforms(
    method: LinearMethod, smoothing: float | None, rotation: int | None, has_mul_scale: bool = False
) -> LinearMethod:
    """Return ``method``, behind a smoothed or rotated input if either is asked for.

    Args:
        method: that computes.
        smoothing: strength, ``None`` for none.
        rotation: size of the rotated groups, ``None`` for none.
        has_mul_scale: the checkpoints of the method have a ``mul_scale``, or may have one, without smoothing too.
    """
    if smoothing is None and rotation is None and not has_mul_scale:
        return method
    return TransformedMethod(method, smoothing, rotation, has_mul_scale)
