"""Regular expressions that come with a checkpoint, matched in bounded time.

Python's ``re`` backtracks without end: ``(a+)+$`` takes time exponential in the length of the name it is held against.
The ``regex`` package reads the same syntax and gives up after a given time.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import regex

from lowbit.errors import ConfigError

LONGEST = 1000
"""Characters of an expression."""
PATIENCE_S = 1.0
"""Seconds that matching one name may take; what tools write takes microseconds."""


@lru_cache(maxsize=1 << 15)
def compile_expression(text: str) -> regex.Pattern[str]:
    """Parse an expression in the syntax of ``re``.

    Raises:
        ConfigError: it is none, or too long.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"{text[:50]!r}... has {len(text)} characters, more than {LONGEST}")
    try:
        return regex.compile(text, regex.VERSION0)
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{text!r} is no regular expression ({error})") from error


def expression_matches(expression: str, text: str, *, anywhere: bool) -> bool:
    """Tell whether an expression matches ``text`` from the start, as ``re.match`` does, or ``anywhere``.

    Raises:
        ConfigError: it is no expression, or takes more than ``PATIENCE_S`` seconds.
    """
    compiled = compile_expression(expression)
    try:
        return (compiled.search if anywhere else compiled.match)(text, timeout=PATIENCE_S) is not None
    except TimeoutError as error:
        raise ConfigError(
            f"{expression!r} takes too long to match {text!r}: write it without a repeated group inside of another"
        ) from error


def check_expressions(option: str, texts: Iterable[str]) -> None:
    """Raise ``ConfigError``, naming the option, where one is no expression."""
    for text in texts:
        try:
            compile_expression(text)
        except ConfigError as error:
            raise ConfigError(f"{option}: {error}") from error
