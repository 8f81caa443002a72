"""Every test that asks for ``path`` runs with the native helper and without it."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config

from lowbit.ops.cpu import helper

torch._inductor.config.compile_threads = 1  # workers, each of which imports torch, cost more than these compilations


SAMPLE_VARIABLE = "LOWBIT_TEST_SAMPLE"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep every n-th test where the environment asks for it (``test_emulated.py``)."""
    items[:] = items[:: int(os.environ.get(SAMPLE_VARIABLE, "1"))]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


def selected_isa(name: str) -> Iterator[str]:
    """Select an instruction set for a test. With less than AVX-512 one for "AVX-512" runs by what there is."""
    isa = helper.ISA_NAMES.index(name)
    chosen = isa if helper.refusal() is not None else helper.select_isa(isa)
    if chosen != isa and name != "AVX-512":
        helper.select_isa(helper.BEST_ISA)
        pytest.skip(f"the CPU has no {name}")
    yield name
    if helper.refusal() is None:
        helper.select_isa(helper.BEST_ISA)


@pytest.fixture(params=["AVX-512", "AMX"])
def vectors_or_tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set of what runs by either."""
    yield from selected_isa(request.param)


@pytest.fixture(params=["AVX-512", "AVX512-BF16", "AMX"])
def wide_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set of what differs with each that has registers of 512 bits."""
    yield from selected_isa(request.param)


def awkward(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return activations whose first rows are what breaks quantizers; all finite."""
    x = torch.randn(rows, columns) * torch.randn(rows, 1).exp()
    cases = [
        torch.zeros(columns),
        -torch.zeros(columns),
        torch.randn(columns) * 1e-38,  # below the smallest absmax; subnormal in part
        torch.randn(columns).clamp(-4, 4) * 1e4,
        torch.where(torch.arange(columns) == 3, 1000.0, x[0]),  # an outlier
        torch.arange(columns) % 8 - 3.5,  # ties
        torch.full((columns,), 3.0),
    ]
    for row, case in enumerate(cases[:rows]):
        x[row] = case
    return x.to(dtype)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether dtype, shape and every value are equal, NaN to NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    a, b = left.double(), right.double()
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def at_the_end_of_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a dense ``tensor`` after whose last byte a page begins that ends the process if it is read."""
    if not sys.platform.startswith("linux"):
        pytest.skip("protects memory as Linux does")
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    after = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(after), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, offset=size - tensor.nbytes, count=tensor.nbytes)
    copy.copy_(tensor.flatten().view(torch.uint8))
    return copy.view(tensor.dtype).view(tensor.shape)
