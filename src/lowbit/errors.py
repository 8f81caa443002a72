"""The errors lowbit raises: for bad input ``ValueError``s, so one ``except`` catches them; two for ended requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType


class ConfigError(ValueError):
    """An option or a combination of options that can't be honoured."""


class CheckpointError(ValueError):
    """A checkpoint whose files or tensors are not what its configuration promises."""


class UnsupportedError(ValueError):
    """No implementation can do what was asked.

    Attributes:
        summary: what was asked and can't be done, without the reasons.
        reasons: one line per implementation that was considered, saying why it can't run.
    """

    def __init__(self, summary: str, reasons: Sequence[str] = ()) -> None:
        self.summary = summary
        self.reasons = tuple(reasons)
        super().__init__("\n".join([summary, *(f"  - {reason}" for reason in self.reasons)]))

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[str, tuple[str, ...]]]:
        return type(self), (self.summary, self.reasons)


class AbortedError(RuntimeError):
    """A request that was ended before it had a result."""


class DeadlineError(AbortedError, TimeoutError):
    """A request whose deadline passed before it had a result."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put ``where``, a file or a folder, in front of errors of lowbit's that do not name it."""
    try:
        yield
    except UnsupportedError as error:
        if where in str(error):
            raise
        raise UnsupportedError(f"{where}: {error.summary}", error.reasons) from error
    except (ConfigError, CheckpointError) as error:
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error


def expected_one_of(names: Iterable[object]) -> str:
    """Return the sentence that ends a message about an unknown name: which ones there are."""
    return f"Expected one of: {', '.join(map(str, names))}"


def is_input_check(error: BaseException) -> bool:
    """Whether a pipeline of diffusers refused what the user gave, which its ``check_inputs`` does."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return isinstance(error, ValueError) and last is not None and last.tb_frame.f_code.co_name == "check_inputs"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the device had too little memory."""
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    )
