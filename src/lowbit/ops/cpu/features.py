"""What the CPU can do, as far as the choice of a computation depends on it."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

from lowbit.compat.parts import tensors


@cache
def processor_facts() -> dict[str, str]:
    """Return what Linux tells of the CPU in ``/proc/cpuinfo``, nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def processor_name() -> str:
    """Return the CPU's model as the system names it, such as "AMD EPYC 9355"; at worst its architecture."""
    return processor_facts().get("model name") or platform.processor() or platform.machine()


@cache
def has_vnni() -> bool:
    """Whether the CPU multiplies u8 by s8 and sums in 32 bits in one instruction, so that nothing saturates."""
    return tensors.has_vnni()


@cache
def fast_matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision in which products of ``dtype`` values are fastest: ``dtype`` itself or float32.

    Without instructions for it, oneDNN converts bfloat16 on the way: on an Ice Lake Xeon a 1088x3840x3840 product takes
    475 ms in bfloat16 and 133 in float32.
    """
    return dtype if tensors.multiplies(dtype) else torch.float32
