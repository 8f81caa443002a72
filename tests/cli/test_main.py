"""The command before, around and after any command of its own: what it imports, and how it ends."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.cli import app, generate, interrupt, messages, status
from lowbit.errors import CheckpointError, ConfigError, UnsupportedError

HEAVY = ("torch", "diffusers", "transformers", "pandas", "rich", "numpy", "huggingface_hub")

# Put first on sys.path: importing one of HEAVY fails.
BLOCK = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {HEAVY!r}:
            raise ImportError(f'{{name}} is not needed here')
sys.meta_path.insert(0, Blocked())
"""


def run(*arguments: str, block: bool = False, **options: object) -> subprocess.CompletedProcess[str]:
    code = (BLOCK if block else "") + "import runpy; runpy.run_module('lowbit', run_name='__main__')"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], [], ["nonsense"]], ids=str)
def test_nothing_heavy_is_imported_before_it_is_needed(arguments: list[str]) -> None:
    result = run(*arguments, block=True)
    assert "Traceback" not in result.stderr
    assert "not needed here" not in result.stderr
    assert result.returncode == (0 if arguments in (["--version"], ["--help"]) else 2)
    assert ("lowbit 0.1.0" if arguments == ["--version"] else "lowbit") in result.stdout + result.stderr


def test_importing_lowbit_imports_nothing_heavy() -> None:
    code = f"{BLOCK}import lowbit; print(lowbit.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "0.1.0", result.stderr


def test_the_blocked_imports_are_blocked() -> None:
    result = run("info", block=True)
    assert result.returncode == status.FAULT
    assert "torch is not needed here" in result.stderr


@pytest.mark.parametrize("command", app.COMMANDS)
def test_each_command_has_examples_and_the_line_of_the_list(command: str) -> None:
    module = importlib.import_module(f"lowbit.cli.{command.replace('-', '_')}")
    function = getattr(module, command.replace("-", "_"))
    assert function.__doc__
    assert module.EXAMPLES.startswith("Examples:\n\n  lowbit ")
    assert f"lowbit {command}" in module.EXAMPLES


def test_the_page_lists_the_commands_and_statuses() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for command, line in app.COMMANDS.items():
        assert f"| `lowbit {command}` | {line} |" in page
    for code in (status.FAILED, status.USAGE, status.FAULT, interrupt.STATUS):
        assert f"\n| {code} | " in page
    for option in messages.SHARED:
        assert f"`--{option.replace('_', '-')}" in page


def call(monkeypatch: pytest.MonkeyPatch, error: BaseException, *arguments: str) -> int:
    """Run a command that raises ``error``; return the exit status."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(generate, "check_image_path", fail)
    return app.run(["generate", "a star", *arguments])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("steps: no"), 2, "error: steps: no\n"),
        (CheckpointError("x.safetensors: cut off"), 1, "error: x.safetensors: cut off\n"),
        (UnsupportedError("none can", ["a: no"]), 1, "error: none can\n  - a: no\n"),
        (OSError(28, "No space left on device", "/data/x"), 1, "error: /data/x: No space left on device\n"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), 1, "error: a -> b: Invalid cross-device link\n"),
        (OSError("one\n line.\n"), 1, "error: one line\n"),
        (MemoryError("17 GB"), 1, "error: out of memory: 17 GB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes"), 1, "error: out of memory: Default"),
        (ValueError("x\ny"), 70, "error: a fault of lowbit's, or of a library below it: ValueError: x y. "),
        (KeyError("x"), 70, "KeyError: 'x'. The same command with --debug shows where"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=repr,
)
def test_how_an_error_ends_the_command(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, error) == code
    plain = capfd.readouterr().err
    assert message in plain
    assert "Traceback" not in plain
    assert plain.count("\n") == 1 + len(getattr(error, "reasons", ()))
    if not isinstance(error, KeyboardInterrupt):
        assert call(monkeypatch, error, "--debug") == code
        traced = capfd.readouterr().err
        assert traced.startswith("Traceback")
        assert traced.endswith(plain)


def test_what_a_pipeline_refuses_is_the_users_to_mend(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def check_inputs(*_: object) -> None:
        raise ValueError("`height` has to be divisible by 8.")

    monkeypatch.setattr(generate, "check_image_path", check_inputs)
    assert app.run(["generate", "a star"]) == 2
    assert capfd.readouterr().err == "error: `height` has to be divisible by 8\n"


def test_options_of_all_commands_stand_before_or_after_the_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--log-level", "info"], ["--log-level", "INFO"]):
        for line in ([*arguments, "generate", ""], ["generate", "", *arguments]):
            assert app.run(line) == 2
            assert logging.getLogger("lowbit").level == logging.INFO
    assert app.run(["generate", "", "--quiet"]) == 2
    assert messages.state.quiet
    assert logging.getLogger("lowbit").level == logging.WARNING
    capfd.readouterr()
    assert app.run(["info", "--log-level", "loud"]) == 2
    assert "Unknown --log-level: 'loud'. Expected one of: debug, info, warning, error" in capfd.readouterr().err
    monkeypatch.setenv("LOWBIT_LOG", "loud")
    assert app.run(["info"]) == 2
    assert "Unknown LOWBIT_LOG: 'loud'" in capfd.readouterr().err


def test_a_misspelt_variable_is_told() -> None:
    result = run("generate", "", env={**os.environ, "LOWBIT_LOGS": "debug"})
    assert "WARNING: LOWBIT_LOGS is set, and lowbit reads no such variable" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(
    "moment",
    ["lowbit.cli.interrupt", "typer.core", "numpy", "torch", "lowbit.cli.options", "diffusers.utils", "loaded "],
)
def test_interrupting_at_any_moment_is_one_line(moment: str, tmp_path: Path) -> None:
    """The moment is the end of a module's import, or the line that the command has printed."""
    arguments = ["generate", "a star", "--steps", "2000", "-o", str(tmp_path / "a.png")]
    command = [sys.executable, "-X", "importtime", "-m", "lowbit", *arguments]
    # A job in a shell's background ignores Ctrl-C, and so would what it starts.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    signal.signal(signal.SIGINT, heard)
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.rpartition("|")[2].strip() == moment or line.startswith(moment):
                break
        else:
            pytest.fail(f"it never came to {moment}")
        child.send_signal(signal.SIGINT)
        printed = child.communicate(timeout=60)[0]
    finally:
        child.kill()
    rest = [line for line in printed.splitlines() if not line.startswith("import time:")]
    assert child.returncode == interrupt.STATUS, rest
    assert rest[-1] == "interrupted"
    assert not [line for line in rest if "Traceback" in line or "Error" in line]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no such pipes")
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    command = f"{sys.executable} -m lowbit info 2>{errors} | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert result.stdout.startswith("lowbit ")
    assert errors.read_text() == ""
    full = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m lowbit info > /dev/full"], capture_output=True, text=True, check=False
    )
    assert full.returncode == status.FAILED
    assert full.stderr == "error: No space left on device\n"


def test_deprecations_of_libraries_are_not_the_users_to_read(tmp_path: Path) -> None:
    result = run("generate", "a star", "--steps", "1", "-o", str(tmp_path / "a.png"))
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
