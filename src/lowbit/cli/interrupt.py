"""Ctrl-C: one line and exit status 130, at any moment.

While modules are imported there is nothing to clean up, and an exception within an import is often swallowed or turned
into another one, so the process ends at once. Otherwise ``KeyboardInterrupt`` is raised, so that half-written files are
removed; where that is swallowed, the second Ctrl-C ends the process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

STATUS = 130

_was_asked = False


def was_asked() -> bool:
    """Whether Ctrl-C was pressed: an error that follows it is its consequence."""
    return _was_asked


@contextmanager
def at_once() -> Iterator[None]:
    """During the context, or until ``with_clean_up``, let Ctrl-C end the process at once."""
    global _was_asked  # noqa: PLW0603  # a signal handler has nowhere else to tell
    _was_asked = False
    # Ignored, as in a background job, it stays ignored; a handler of a program around is not ours to replace.
    replaced = _replace(_leave_at_once) if signal.getsignal(signal.SIGINT) is signal.default_int_handler else False
    try:
        yield
    finally:
        if replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def with_clean_up() -> None:
    """From now on let Ctrl-C raise ``KeyboardInterrupt``."""
    if signal.getsignal(signal.SIGINT) is _leave_at_once:
        _replace(_raise)


def leave() -> NoReturn:
    """End the process after what Ctrl-C interrupted was cleaned up; Python's own way may print tracebacks."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(STATUS)


def _replace(handler: Any) -> bool:
    try:
        signal.signal(signal.SIGINT, handler)
    except ValueError:  # not the main thread, which alone gets signals
        return False
    return True


def _leave_at_once(*_: object) -> None:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(STATUS)


def _raise(_: int, frame: FrameType | None) -> None:
    global _was_asked  # noqa: PLW0603
    if _was_asked or _is_importing(frame):
        _leave_at_once()
    _was_asked = True
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
