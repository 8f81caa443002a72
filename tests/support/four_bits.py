"""Weights of e2m1 and e4m3 in blocks, with what they stand for and what multiplies them on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowbit.ops import mx, nvfp4
from lowbit.ops.cpu import mx as cpu_mx
from lowbit.ops.cpu import nvfp4 as cpu_nvfp4
from tests.support import calls

FORMATS = ["mxfp8", "mxfp4", "dualscale", "nvfp4"]


class Layer:
    """A weight in one format with the reference's decoding and the CPU's product."""

    def __init__(self, kind: str, features: int, columns: int) -> None:
        weight = torch.randn(features, columns) / 8
        self.tensors: tuple[torch.Tensor, ...]
        self.module: Any
        self.decode: Callable[..., torch.Tensor]
        if kind == "nvfp4":
            scale = nvfp4.global_scale_of(weight.abs().amax())
            self.tensors = (*nvfp4.quantize_nvfp4(weight, scale), scale)
            self.module, self.decode = cpu_nvfp4, nvfp4.dequantize_nvfp4
        else:
            quantizers = {
                "mxfp8": mx.quantize_mxfp8,
                "mxfp4": mx.quantize_mxfp4,
                "dualscale": mx.quantize_mxfp4_dualscale,
            }
            self.tensors = quantizers[kind](weight)
            self.module, self.decode = cpu_mx, mx.dequantize_mx

    def weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.decode(*self.tensors, dtype=dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        packed, scale, *rest = self.tensors
        return calls.linear(self.module, x, calls.packed(self.module, packed), scale, bias, *rest)
