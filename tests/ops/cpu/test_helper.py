"""Whether the native helper is there, and what it may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lowbit.ops.cpu import helper


def test_can_be_turned_off(path: str) -> None:
    assert helper.available() == (path == "native")
    assert helper.description().startswith("native helper (" if path == "native" else "plain torch; ")
    if path == "torch":
        assert helper.refusal() == "turned off by LOWBIT_NATIVE=0"


@pytest.fixture
def reloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Let a test change the environment that the helper is loaded in."""
    yield monkeypatch
    monkeypatch.undo()
    helper.reload()
    helper.refusal()


def test_can_be_held_to_an_instruction_set(reloaded: pytest.MonkeyPatch) -> None:
    if helper.refusal() is not None:
        pytest.skip(f"native helper {helper.refusal()}")
    before = helper.select_isa(helper.BEST_ISA)
    for index, name in enumerate(helper.ISA_NAMES):
        reloaded.setenv(helper.MAX_ISA_VARIABLE, name.lower())
        helper.reload()
        assert f"({helper.ISA_NAMES[min(index, before)]}, " in helper.description()
        assert helper.has_amx() == (name == "AMX" == helper.ISA_NAMES[before])


def test_an_unknown_instruction_set_is_an_error(reloaded: pytest.MonkeyPatch) -> None:
    if helper.refusal() is not None:
        pytest.skip(f"native helper {helper.refusal()}")
    reloaded.setenv(helper.MAX_ISA_VARIABLE, "SSE")
    helper.reload()
    with pytest.raises(ValueError, match="LOWBIT_MAX_ISA=SSE names no instruction set; there are generic, AVX2"):
        helper.available()
