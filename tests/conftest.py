"""Fixtures that all tests share."""

from __future__ import annotations

import os

import pytest
import torch

# Side by side, each worker of pytest-xdist keeps to one core, and so does what it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def adversarial() -> dict[str, torch.Tensor]:
    """Activations [6, 300] in bfloat16 of the kinds that break quantizers."""
    ordinary = torch.randn(6, 300)
    outlier = ordinary.clone()
    outlier[:, 7] *= 1000
    zero_rows = ordinary.clone()
    zero_rows[::2] = 0
    tiny = ordinary * 1e-36
    huge = ordinary * 1e36
    cases = {"ordinary": ordinary, "outlier": outlier, "zero_rows": zero_rows, "tiny": tiny, "huge": huge}
    cases["constant"] = torch.full((6, 300), 3.0)
    return {name: case.to(torch.bfloat16) for name, case in cases.items()}
