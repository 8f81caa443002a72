"""What a kernel is given of a quantized weight, whatever its format: numbers as data, tensors by their role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class WeightFormat:
    """How the codes of a weight [N, K] stand for numbers, and what happens to activations.

    Attributes:
        name: of the codes where a family of kernels knows several, such as ``"mxfp4"`` or GGUF's ``"Q4_K"``.
        block: (output, input channels) that share a scale, ``None``: what the scale's shape says.
        activation: ``"dynamic"``, ``"static"``, or ``None``: activations are not quantized (weight-only).
    """

    name: str = ""
    block: tuple[int, int] | None = None
    activation: str | None = "dynamic"


PLAIN = WeightFormat()


class Prepared(NamedTuple):
    """The tensors of a quantized weight by their role, in a checkpoint's layout or in that of a kernel.

    Attributes:
        weight: codes of [N, K].
        scale: of channels, groups or blocks.
        zero_point: code that stands for zero, of each group; ``None``: the middle of the codes.
        outer_scale: by which scales are multiplied: NVFP4's float32 [], or float32 [N, ceil(K / 512)].
        input_scale: of static activations, float32 [].
        input_offset: of static activations, float32 [].
        quant_bias: int32 [N], added to the integer product.
        format: what the codes are.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    outer_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_offset: torch.Tensor | None = None
    quant_bias: torch.Tensor | None = None
    format: WeightFormat = PLAIN

    @property
    def scales(self) -> torch.Tensor:
        """``scale`` of a format that has one."""
        assert self.scale is not None
        return self.scale

    @property
    def static_activations(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``input_scale``, ``input_offset`` and ``quant_bias`` of a format that has them."""
        assert self.input_scale is not None
        assert self.input_offset is not None
        assert self.quant_bias is not None
        return self.input_scale, self.input_offset, self.quant_bias
