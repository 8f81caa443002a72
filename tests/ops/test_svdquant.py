from __future__ import annotations

import pytest
import torch

from lowbit.ops.e2m1 import E2M1_VALUES
from lowbit.ops.svdquant import low_rank_factors, nvfp4_svd_dequantize, svdquant_dequantize


def outlier_weight(rows: int = 96, columns: int = 128) -> torch.Tensor:
    """Normal numbers with a few directions that are much larger."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator)
    weight[:, 5] *= 20
    weight[7] *= 20
    return weight


@pytest.mark.parametrize(("rows", "columns", "rank"), [(96, 128, 8), (300, 200, 32), (16, 64, 32), (64, 8, 4)])
def test_the_factors_are_near_the_best_and_the_same_each_time(rows: int, columns: int, rank: int) -> None:
    weight = outlier_weight(rows, columns) if columns > 5 else torch.randn(rows, columns)
    down, up = low_rank_factors(weight, rank)
    kept = min(rank, rows, columns)
    assert down.shape == (columns, kept)
    assert up.shape == (rows, kept)
    values = torch.linalg.svdvals(weight.double())
    best = float(values[kept:].square().sum().sqrt())
    error = float((weight.double() - up.double() @ down.double().t()).norm())
    assert error <= 1.02 * best + 1e-3
    torch.manual_seed(99)  # the global generator has no part in it
    again = low_rank_factors(weight, rank)
    assert torch.equal(again[0], down)
    assert torch.equal(again[1], up)


@pytest.mark.parametrize("precision", ["nvfp4", "int4"])
def test_the_decoder_against_float64(precision: str) -> None:
    generator = torch.Generator().manual_seed(1)
    n, k, r = 12, 128, 4
    group = 16 if precision == "nvfp4" else 64
    codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).long()
    scale = torch.rand(k // group, n, generator=generator)
    smooth = (torch.rand(k, generator=generator) + 0.5).bfloat16()
    down, up = torch.randn(k, r, generator=generator).bfloat16(), torch.randn(n, r, generator=generator).bfloat16()
    extra = {}
    if precision == "nvfp4":
        scale = scale.to(torch.float8_e4m3fn)
        values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], dtype=torch.float64)[nibbles]
        extra = {"wcscales": torch.rand(n).bfloat16(), "wtscale": torch.tensor([0.375]).bfloat16()}
    else:
        scale = scale.bfloat16()
        values = torch.where(nibbles >= 8, nibbles - 16, nibbles).double()
    main = values * scale.double().t().repeat_interleave(group, dim=1)
    if extra:
        main = main * extra["wcscales"].double()[:, None] * 0.375
    expected = main / smooth.double() + up.double() @ down.double().t()
    found = svdquant_dequantize(codes.view(torch.int8), scale, smooth, down, up, **extra)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
    # Scales above the groups' may be missing.
    if extra:
        plain = svdquant_dequantize(codes.view(torch.int8), scale, smooth, down, up)
        whole = values * scale.double().t().repeat_interleave(group, dim=1) / smooth.double()
        assert torch.allclose(plain.double(), whole + up.double() @ down.double().t(), rtol=1e-5, atol=1e-5)


def test_modelopts_decoder_against_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    n, k, r = 12, 64, 4
    codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).long()
    values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], dtype=torch.float64)[nibbles]
    scale = torch.rand(n, k // 16, generator=generator).to(torch.float8_e4m3fn)
    before = (torch.rand(k, generator=generator) + 0.5).bfloat16()
    a, b = torch.randn(r, k, generator=generator).bfloat16(), torch.randn(n, r, generator=generator).bfloat16()
    outer = torch.tensor(0.375)
    expected = values * scale.double().repeat_interleave(16, dim=1) * 0.375 + b.double() @ a.double()
    found = nvfp4_svd_dequantize(codes, scale, outer, before, a, b)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected * before.double(), rtol=1e-5, atol=1e-5)
