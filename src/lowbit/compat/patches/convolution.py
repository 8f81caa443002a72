"""BF16 and FP16 convolutions on CPUs for which oneDNN has none: computed in float32.

torch (seen in 2.13) runs such a convolution as im2col and a scalar GEMM. On a CPU with AVX2 alone that takes 50 to 100
times as long as float32, and a VAE longer than all denoising steps (``findings/torch_bf16_conv2d_avx2.sh``).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def convolve_in_float32(module: nn.Module) -> int:
    """Let every convolution in ``module`` compute in float32 on the CPU; parameters and the result's dtype stay.

    Inputs and weights are widened exactly: the result is the float32 one, rounded once to the input's dtype.

    Returns:
        The number of convolutions.
    """
    found = [layer for layer in module.modules() if isinstance(layer, _CONVOLUTIONS)]
    for layer in found:
        layer._conv_forward = functools.partial(_in_float32, layer)  # type: ignore[method-assign]
    return len(found)


def _in_float32(layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    original = type(layer)._conv_forward
    if x.device.type != "cpu":
        moved: torch.Tensor = original(layer, x, weight, bias)
        return moved
    result: torch.Tensor = original(layer, x.float(), weight.float(), None if bias is None else bias.float())
    return result.to(x.dtype)
