"""What the Triton backends share on the host: which chip, and tensors as kernels want them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lowbit.ops.dispatch import Problem

# Kernels address a tile's elements by 32-bit offsets from a 64-bit origin, so that (rows of a tile) * (row stride) must
# stay below 2**31. No tile has more than 256 rows.
LARGEST_ROW_STRIDE = (2**31 - 1) // 256

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """A chip, as far as kernels are chosen by it.

    Attributes:
        backend: ``"cuda"``, ``"hip"``, ``"xpu"``, or ``"interpreter"`` (Triton's, on the CPU).
        arch: the compute capability times ten (``cuda``), or the chip's name.
        processors: multiprocessors, compute units or cores that run programs side by side.
    """

    backend: str
    arch: int | str
    processors: int = 1

    def __str__(self) -> str:
        return f"SM {int(self.arch) // 10}.{int(self.arch) % 10}" if self.backend == "cuda" else f"{self.arch}"

    @property
    def has_e4m3(self) -> bool:
        """Whether Triton's ``float8e4nv`` is native here: conversions and matrix products, in the OCP encoding.

        gfx942 multiplies only the FNUZ encoding; there, and wherever this is false, kernels convert in software.
        """
        if self.backend == "cuda":
            return int(self.arch) >= 89
        return self.backend == "hip" and str(self.arch).startswith(("gfx950", "gfx12"))

    @property
    def has_scaled_dot(self) -> bool:
        """Whether it multiplies groups with scales of their own (``tl.dot_scaled``) itself: SM 10.x, gfx950."""
        if self.backend == "cuda":
            return 100 <= int(self.arch) < 110
        return self.backend == "hip" and str(self.arch).startswith("gfx950")

    @property
    def has_wide_tiles(self) -> bool:
        """Whether it has wgmma or tcgen05 and the 227 KiB of shared memory that come with them (SM 9.0, 10.x)."""
        return self.backend == "cuda" and 90 <= int(self.arch) < 110


def target_of(device: torch.device) -> Target:
    """Return the chip behind ``device``; the CPU stands for Triton's interpreter."""
    return Target("interpreter", 0) if device.type == "cpu" else _accelerator(device)


@cache
def _accelerator(device: torch.device) -> Target:
    if device.type == "xpu":
        return Target("xpu", torch.xpu.get_device_name(device))
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Target("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)


def device_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what every Triton kernel here would refuse, or ``None``."""
    if dtype not in FLOATING_DTYPES:
        return f"takes float32, bfloat16 or float16 activations, not {dtype}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA or ROCm device is present"
    if device.type == "xpu" and not torch.xpu.is_available():
        return "no XPU device is present"
    return None


def can_run(problem: Problem) -> str | None:
    """Return why a kernel that takes whatever its chip does can't run ``problem``, or ``None``."""
    return device_refusal(problem.device, problem.dtype)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Make ``tensor``'s device current: Triton launches on the current one, whatever its arguments live on."""
    module: Any = torch.xpu if tensor.device.type == "xpu" else torch.cuda
    context: AbstractContextManager[None] = module.device_of(tensor)
    return context


def row_major(matrix: torch.Tensor) -> torch.Tensor:
    """Return ``matrix`` [rows, columns] with unit stride along its rows, copying it only when it has to be."""
    if matrix.stride(1) == 1 and matrix.stride(0) <= LARGEST_ROW_STRIDE:
        return matrix
    return matrix.contiguous()


def expect_shape(name: str, tensor: torch.Tensor, *shape: int) -> None:
    """Raise for a tensor of another shape: a kernel would read beyond its end.

    Raises:
        ValueError: names the tensor and both shapes.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has to have the shape {shape}, not {tuple(tensor.shape)}")
