"""How the command ends: what is printed of an error, and the exit status."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback

from lowbit.errors import ConfigError, is_input_check, is_out_of_memory

FAILED = 1
"""A checkpoint, a file or this machine does not allow it; or a gate does not hold."""
USAGE = 2
"""An option or a combination of options that can't be honoured."""
FAULT = 70
"""A fault of lowbit's, or of a library that it uses."""


def report(text: str) -> None:
    """Write a line to standard error, if that is still there."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def end_with(error: BaseException, debug: bool) -> int:
    """Tell of the error that ended a command, and return the exit status.

    Args:
        error: that was raised.
        debug: whether to show where.
    """
    if debug:
        report("".join(traceback.format_exception(error)).rstrip())
    message, status = _describe(error)
    report(message)
    return status


def _describe(error: BaseException) -> tuple[str, int]:
    """Return what to print of an error, and the exit status."""
    if _is_own(error):
        return f"error: {error}", USAGE if isinstance(error, ConfigError) else FAILED
    if is_input_check(error):
        return f"error: {_line(error)}", USAGE
    if isinstance(error, OSError):
        return f"error: {_file_error(error)}", FAILED
    if is_out_of_memory(error):
        return f"error: out of memory: {_line(error)}. Make it smaller, or quantize more of the model", FAILED
    return (
        f"error: a fault of lowbit's, or of a library below it: {type(error).__name__}: {_line(error)}. The same"
        " command with --debug shows where; please report that",
        FAULT,
    )


def _is_own(error: BaseException) -> bool:
    return any(kind.__module__ == "lowbit.errors" for kind in type(error).__mro__)


def _file_error(error: OSError) -> str:
    if error.strerror is None:
        return _line(error)
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return ": ".join([" -> ".join(files), error.strerror]) if files else error.strerror


def _line(error: BaseException) -> str:
    """Return an error's message in one line, without the full stop."""
    return " ".join(str(error).split()).rstrip(".") or "no message"
