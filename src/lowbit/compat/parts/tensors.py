"""Private functions of torch: what the CPU computes, and where a dispatched call goes after autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def has_vnni() -> bool:
    """Whether the CPU multiplies u8 by s8 and sums in 32 bits in one instruction."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:  # torch before 2.13
        return bool(torch.cpu._is_vnni_supported())
    found = capabilities()
    return bool(found.get("avx512_vnni") or found.get("avx_vnni"))


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies matrices of bfloat16 or float16 without converting them to float32."""
    if dtype == torch.float16:
        return bool(torch.cpu._is_amx_fp16_supported())
    if dtype != torch.bfloat16:
        return False
    if torch.cpu._is_avx2_supported():  # x86
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def convolves(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves ``dtype`` on this CPU other than by a scalar GEMM."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or bool(supported[dtype]())


def below_autograd() -> Any:
    """Return the dispatch keys that are left once autograd has been passed."""
    return torch._C._after_autograd_keyset


def int8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``a @ b`` [M, N], int32, of int8 [M, K] and [K, N] by torch's own kernel."""
    return torch._int_mm(a, b)


def fp8_product(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``a @ b * scale**2`` [M, N], bfloat16, of float8 [M, K] and [K, N] by torch's own kernel."""
    return torch._scaled_mm(a, b, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True)


@contextmanager
def compiling_strictly(limit: int) -> Iterator[None]:
    """Let one function be compiled ``limit`` times, and make passing the limit an error."""
    import torch._dynamo

    limits: dict[str, Any] = {
        "recompile_limit": limit,
        "accumulated_recompile_limit": 16 * limit,
        "fail_on_recompile_limit_hit": True,
    }
    with torch._dynamo.config.patch(limits):
        yield


def compilation_counters() -> Any:
    """Return what torch.compile counts, by group and name."""
    from torch._dynamo.utils import counters

    return counters
