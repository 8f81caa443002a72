"""Fixtures of tests that load and run small models; the conftest of each folder that has some takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowbit.quantization import QuantizationConfig
from tests.support.models import CONFIGS, FAMILIES, Family, save


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    # The matrices here are so small that a second thread is only waited for.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def z_family() -> Family:
    return FAMILIES["z-image"]


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> QuantizationConfig:
    return CONFIGS[request.param]


@pytest.fixture
def checkpoint(tmp_path: Path, z_family: Family) -> Path:
    """A small Z-Image transformer in BF16, in one file."""
    torch.manual_seed(0)
    return save(z_family.make(), tmp_path / "transformer")
