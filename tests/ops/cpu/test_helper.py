"""Whether the native helper is there, and what it may use."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

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
    with pytest.raises(ValueError, match="LOWBIT_MAX_ISA: no instruction set 'SSE'. Expected one of: generic, AVX2"):
        helper.available()


SOURCE = helper.DIRECTORY / "abi.cpp"
FUNCTIONS = re.findall(r"^LOWBIT_EXPORT \S+ (\w+)\(([^)]*)\)", SOURCE.read_text(), re.MULTILINE)


def test_every_exported_function_has_typed_arguments() -> None:
    typed = helper._OPERATORS | {name: arguments for name, (arguments, _) in helper._QUERIES.items()}
    declared = {name: len(arguments.split(",")) if arguments else 0 for name, arguments in FUNCTIONS}
    assert {name: len(arguments) for name, arguments in typed.items()} == declared


def test_the_library_and_its_caller_have_one_abi_number() -> None:
    assert re.findall(r"constexpr int kAbi = (\d+);", SOURCE.read_text()) == [str(helper.ABI)]


def compiled(folder: Path, source: str) -> Path:
    """Return a library of C code."""
    code, library = folder / "code.c", folder / "code.so"
    code.write_text(source)
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, code], check=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    return library


@pytest.mark.parametrize(
    ("source", "number"),
    [("int lowbit_gate(void) { return 0; }", "None"), ("int lowbit_abi(void) { return 77; }", "77")],
)
def test_a_stale_library_is_not_used(
    source: str, number: str, tmp_path: Path, reloaded: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = compiled(tmp_path, source)
    reloaded.setenv(helper.LIBRARY_VARIABLE, str(library))
    helper.reload()
    reason = f"of another version ({library} has ABI {number}, expected {helper.ABI}; build it with `pip install .`"
    assert (helper.refusal() or "").startswith(reason)
    assert not helper.available()
    assert [record.getMessage() for record in caplog.records] == [
        f"native helper {helper.refusal()}: CPU kernels run in plain torch, several times slower"
    ]


def test_a_missing_library_is_told_once(
    tmp_path: Path, reloaded: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reloaded.setenv(helper.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    helper.reload()
    assert not helper.available()
    assert not helper.available()
    [record] = caplog.records
    assert "install g++ or clang++" in record.getMessage()


def test_turning_it_off_is_not_worth_a_message(reloaded: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reloaded.setenv("LOWBIT_NATIVE", "0")
    helper.reload()
    assert not helper.available()
    assert caplog.records == []
