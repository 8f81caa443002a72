"""Every test that asks for ``path`` runs with the native helper and without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from lowbit.ops.cpu import helper
from tests.support.cpu import selected_isa

torch._inductor.config.compile_threads = 1  # workers, each of which imports torch, cost more than these compilations

SAMPLE_VARIABLE = "LOWBIT_TEST_SAMPLE"
EXACT_ISA = "isa"
ISA_FIXTURES = (EXACT_ISA, "vectors_or_tiles", "wide_isa")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every n-th test where the environment asks for it, and one test of a function for what this CPU lacks."""
    sample(items, os.environ.get(SAMPLE_VARIABLE, "1"))
    seen: set[tuple[object, str]] = set()
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        lack = lacking(item) if Path(__file__).parent == item.path.parent else None
        function = getattr(item, "function", item)
        (left if lack is not None and (function, lack) in seen else kept).append(item)
        if lack is not None:
            seen.add((function, lack))
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def sample(items: list[pytest.Item], steps: str) -> None:
    """Keep every n-th test of all (``"5"``) or of each file (``"test_fp8.py=5,..."``)."""
    if "=" not in steps:
        items[:] = items[:: int(steps)]
        return
    by_file: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.path.name, []).append(item)
    items[:] = [item for part in steps.split(",") for item in by_file[part.split("=")[0]][:: int(part.split("=")[1])]]


def lacking(item: pytest.Item) -> str | None:
    """Return why a test will be skipped on this CPU, as far as its parameters and marks tell."""
    for mark in item.iter_markers("skipif"):
        if mark.args[0] is True:
            return str(mark.kwargs.get("reason"))
    parameters = getattr(item, "callspec", None)
    wanted = [] if parameters is None else [(n, parameters.params[n]) for n in ISA_FIXTURES if n in parameters.params]
    wanted.append(("", getattr(getattr(item, "module", None), "NEEDS_ISA", "generic")))
    return next((f"no {isa}" for name, isa in wanted if is_missing(isa, exact=name == EXACT_ISA)), None)


@cache
def is_missing(name: str, exact: bool) -> bool:
    """Tell whether ``selected_isa`` will skip."""
    if helper.refusal() is not None or (name == "AVX-512" and not exact):
        return False
    isa = helper.ISA_NAMES.index(name)
    chosen = helper.select_isa(isa)
    helper.select_isa(helper.BEST_ISA)
    return chosen != isa


@pytest.fixture(autouse=True)
def _module_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a module's tests with the instruction set that its ``NEEDS_ISA`` names."""
    name = getattr(request.module, "NEEDS_ISA", None)
    for _ in (None,) if name is None else selected_isa(name):
        yield


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
