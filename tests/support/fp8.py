"""Inputs that break FP8 quantizers."""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn


def adversarial(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of every kind: zero, an outlier, NaN, infinity, tiny, subnormal, large, constant; the rest random."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    x[0] = 0
    x[1, 5] = 3000
    x[2, 3] = torch.nan
    x[3, 7] = -torch.inf
    x[4] *= 1e-20
    x[5] *= 1e-40
    x[6] *= torch.finfo(dtype).max / 8
    x[7] = -1.5
    return x.to(dtype)


def every_rounding() -> torch.Tensor:
    """Every e4m3 value, every middle of two neighbours, the float32 on either side of those, and beyond the range."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    finite = values[values.isfinite()].unique()
    middles = (finite[1:] + finite[:-1]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    beyond = torch.tensor(
        [0.0, -0.0, 449.0, 463.9, 464.0, 1e9, -480.0, 3e38, 1e-10, -1e-40, 1e-45, torch.inf, torch.nan]
    )
    return torch.cat([finite, middles, middles.nextafter(up), middles.nextafter(down), beyond, -beyond])


def random(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
