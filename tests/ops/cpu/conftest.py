"""Every test that asks for ``path`` runs with the native helper and without it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config

from lowbit.ops.cpu import helper
from tests.support.cpu import selected_isa

torch._inductor.config.compile_threads = 1  # workers, each of which imports torch, cost more than these compilations


SAMPLE_VARIABLE = "LOWBIT_TEST_SAMPLE"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep every n-th test where the environment asks for it (``test_emulated.py``)."""
    items[:] = items[:: int(os.environ.get(SAMPLE_VARIABLE, "1"))]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Share work among threads, wherever the suite runs: that is part of what is tested."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which code computes: ``"native"`` or ``"torch"``."""
    if request.param == "torch":
        monkeypatch.setenv("LOWBIT_NATIVE", "0")
    helper.reload()
    if request.param == "native" and helper.refusal() is not None:
        pytest.skip(f"native helper {helper.refusal()}")
    yield request.param
    monkeypatch.undo()
    helper.reload()


@pytest.fixture(params=helper.ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run with one instruction set after the other, those that the CPU has."""
    if helper.refusal() is not None:
        pytest.skip(f"native helper {helper.refusal()}")
    yield from selected_isa(request.param, exact=True)


@pytest.fixture(params=["AVX-512", "AMX"])
def vectors_or_tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set of what runs by either."""
    yield from selected_isa(request.param)


@pytest.fixture(params=["AVX-512", "AVX512-BF16", "AMX"])
def wide_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set of what differs with each that has registers of 512 bits."""
    yield from selected_isa(request.param)
