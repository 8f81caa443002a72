from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lowbit.ops import gguf
from lowbit.ops.dispatch import Problem
from lowbit.ops.gguf import BLOCK_TYPES, gguf_dequantize, gguf_quantize
from lowbit.ops.triton import gguf as kernels
from lowbit.ops.weight_format import WeightFormat


@pytest.mark.parametrize("kind", kernels.TYPES)
def test_decoding_is_exact(kind: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (9, 512 // BLOCK_TYPES[kind].elements * BLOCK_TYPES[kind].bytes), generator=generator)
    raw = raw.to(torch.uint8)
    expected = gguf_dequantize(raw, kind)
    result = kernels.gguf_dequantize(raw.to(device), kind).cpu()
    assert bool(((result.view(torch.int32) == expected.view(torch.int32)) | (result.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("kind", kernels.TYPES)
@pytest.mark.parametrize("rows", [1, 33])
def test_products(kind: str, rows: int, device: torch.device) -> None:
    torch.manual_seed(0)
    weight, x, bias = torch.randn(37, 512) * 0.02, torch.randn(rows, 512), torch.randn(37)
    raw = gguf_quantize(weight, kind)
    decoded = gguf_dequantize(raw, kind).double()
    result = kernels.gguf_mm(x.to(device), raw.to(device), kind, bias.to(device)).cpu()
    bound = x.double().abs() @ decoded.abs().t()
    assert float(((result - (x.double() @ decoded.t() + bias)).abs() / bound).max()) < 1e-6


def test_depth_that_no_step_divides(device: torch.device) -> None:
    weight, x = torch.randn(5, 96), torch.randn(3, 96)
    raw = gguf_quantize(weight, "Q4_0")
    result = kernels.gguf_mm(x.to(device), raw.to(device), "Q4_0").cpu()
    assert torch.allclose(result, gguf.gguf_mm(x, raw, "Q4_0"), atol=1e-5)


@pytest.mark.parametrize("rows", [2, 256])
def test_other_types_and_many_rows_are_decoded_first(rows: int, device: torch.device) -> None:
    kind = "Q5_0" if rows == 2 else "Q8_0"
    weight, x = torch.randn(16, 64), torch.randn(rows, 64)
    raw = gguf_quantize(weight, kind)
    result = kernels.gguf_mm(x.to(device), raw.to(device), kind).cpu()
    assert torch.allclose(result, gguf.gguf_mm(x, raw, kind), atol=1e-4)


def test_refusals(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter's device is not asked")
    problem = Problem(device, torch.bfloat16, 64, 256, format=WeightFormat("IQ4_XS"))
    assert "IQ4_XS" in str(kernels.can_run(problem))
