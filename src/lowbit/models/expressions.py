"""Regular expressions that come with a checkpoint, matched in bounded time.

Python's ``re`` backtracks: ``(a+)+$`` takes time exponential in the length of the name it is held against. Here an
expression is parsed by Python's own parser and then maps a set of places in the name to the set of places where the
match can be after it: sets are integers, bit p the place before character p, and each part of an expression is a few
operations on them. So a match takes at most (parts) x (length of the name) operations, whatever the expression. Such
sets can't tell what a group held or which way a match took: back references, look-behind, atomic groups and possessive
quantifiers are refused, as are flags.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lowbit.errors import ConfigError

LONGEST = 1000
"""Characters of an expression."""
MOST_WORK = 500_000
"""Of all expressions of an option: their parts, those of expressions with loops counted ``LOOP_WORK`` times."""
LOOP_WORK = 50
DEEPEST = 20
"""Groups inside of groups."""

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


class _Name:
    """The name to match.

    Attributes:
        text: itself.
        places: character -> the set of places before it.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.places: dict[str, int] = {}
        for place, character in enumerate(text):
            self.places[character] = self.places.get(character, 0) | 1 << place


_name = lru_cache(maxsize=1024)(_Name)

_Step = Callable[[_Name, int], int]
"""From the places where a part of the expression may begin to those where it may end."""
_Where = Callable[[_Name], int]
"""The places before characters of a class, or those where an assertion holds."""


@dataclass(frozen=True)
class Expression:
    """A regular expression.

    Attributes:
        step: of the whole.
        needle: characters that every match has.
        work: see ``MOST_WORK``.
    """

    step: _Step
    needle: str
    work: int

    def is_in(self, text: str, *, anywhere: bool) -> bool:
        """Tell whether it matches ``text`` from the start, as ``re.match`` does, or ``anywhere``, as ``re.search``."""
        if self.needle not in text:
            return False
        starts = (1 << len(text) + 1) - 1 if anywhere else 1
        return self.step(_name(text), starts) != 0


@lru_cache(maxsize=1 << 15)
def compile_expression(text: str) -> Expression:
    """Parse an expression in the syntax of ``re``.

    Raises:
        ConfigError: it is none, or not one that is matched here; says why.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"{text[:50]!r}... has {len(text)} characters, more than {LONGEST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of syntax that Python may change
            tree = _parser.parse(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{text!r} is no regular expression ({error})") from error
    builder = _Builder()
    try:
        builder.check_flags(tree.state.flags & ~re.UNICODE)
        step = builder.sequence(tree, 0)
    except _NotMatchedError as error:
        raise ConfigError(f"{text!r} has {error}, which is not matched here") from error
    return Expression(step, max(_runs(tree), key=len, default=""), builder.parts * (LOOP_WORK if builder.loops else 1))


def check_expressions(option: str, texts: Iterable[str]) -> None:
    """Check the expressions of an option.

    Raises:
        ConfigError: one can't be used, or all together would take too long to match.
    """
    work = 0
    for text in texts:
        try:
            work += compile_expression(text).work
        except ConfigError as error:
            raise ConfigError(f"{option}: {error}") from error
        if work > MOST_WORK:
            raise ConfigError(f"{option}: these expressions are too many or too complicated to match")


class _NotMatchedError(Exception):
    """A construct that sets of places can't follow."""


def _runs(tree: Iterable[tuple[Any, Any]]) -> list[str]:
    """Return the runs of plain characters of an expression that are in every match."""
    runs = [""]
    for kind, value in tree:
        if str(kind) == "LITERAL":
            runs[-1] += chr(value)
        else:
            runs.append("")
    return runs


class _Builder:
    """Makes steps of what Python's parser gives: pairs of a kind and a value.

    Attributes:
        parts: made so far.
        loops: how many take several turns.
        nesting: of sequences, where it is now.
    """

    def __init__(self) -> None:
        self.parts = self.loops = self.nesting = 0
        self.makers: Mapping[str, Callable[[Any, int], _Step]] = {
            "SUBPATTERN": self.group,
            "BRANCH": self.branch,
            "MAX_REPEAT": self.repeat,
            "MIN_REPEAT": self.repeat,
            "ASSERT": lambda value, depth: self.look(value, depth, wanted=True),
            "ASSERT_NOT": lambda value, depth: self.look(value, depth, wanted=False),
            "AT": self.at,
        }

    def check_flags(self, flags: int) -> None:
        if flags:
            raise _NotMatchedError("flags")

    def sequence(self, tree: Iterable[tuple[Any, Any]], depth: int) -> _Step:
        steps = []
        run = ""
        self.nesting += 1
        if self.nesting > DEEPEST:
            raise _NotMatchedError(f"groups in more than {DEEPEST} others")
        for kind, value in tree:
            if str(kind) == "LITERAL":
                run += chr(value)
                continue
            if run:
                steps.append(self.run(run))
            run = ""
            steps.append(self.step(str(kind), value, depth))
        if run:
            steps.append(self.run(run))
        self.nesting -= 1

        def follow(name: _Name, starts: int) -> int:
            for step in steps:
                starts = step(name, starts)
                if not starts:
                    break
            return starts

        return follow

    def step(self, kind: str, value: Any, depth: int) -> _Step:
        self.parts += 1
        where = _class_of(kind, value)
        if where is not None:
            return lambda name, starts: (starts & where(name)) << 1
        maker = self.makers.get(kind)
        if maker is None:
            raise _NotMatchedError(kind.lower().replace("_", " "))
        return maker(value, depth)

    def run(self, characters: str) -> _Step:
        self.parts += 1

        def follow(name: _Name, starts: int) -> int:
            for character in characters:
                starts = (starts & name.places.get(character, 0)) << 1
                if not starts:
                    break
            return starts

        return follow

    def group(self, value: Any, depth: int) -> _Step:
        _, added, removed, tree = value
        self.check_flags(added | removed)
        return self.sequence(tree, depth)

    def branch(self, value: Any, depth: int) -> _Step:
        ways = [self.sequence(tree, depth) for tree in value[1]]

        def follow(name: _Name, starts: int) -> int:
            ends = 0
            for way in ways:
                ends |= way(name, starts)
            return ends

        return follow

    def repeat(self, value: Any, depth: int) -> _Step:
        least, most, tree = int(value[0]), int(value[1]), value[2]
        where = _class_of(str(tree[0][0]), tree[0][1]) if len(tree) == 1 else None
        if where is not None and least <= 1 and value[1] is _parser.MAXREPEAT:
            return _any_number(where, least)
        body = self.sequence(tree, self.deeper(depth) if most > 1 else depth)

        def follow(name: _Name, starts: int) -> int:
            # More turns than characters only repeat what matched nothing.
            turns = len(name.text) + 1
            for _ in range(min(least, turns)):
                starts = body(name, starts)
            ends = starts
            for _ in range(min(most - least, turns)):
                starts = body(name, starts) & ~ends
                if not starts:
                    break
                ends |= starts
            return ends

        return follow

    def look(self, value: Any, depth: int, wanted: bool) -> _Step:
        direction, tree = value
        if direction < 0:
            raise _NotMatchedError("look-behind")
        body = self.sequence(tree, self.deeper(depth))

        def follow(name: _Name, starts: int) -> int:
            places = (1 << place for place in range(starts.bit_length()) if starts >> place & 1)
            return sum(place for place in places if bool(body(name, place)) is wanted)

        return follow

    def at(self, value: Any, depth: int) -> _Step:
        where = _ASSERTIONS[str(value)]
        return lambda name, starts: starts & where(name)

    def deeper(self, depth: int) -> int:
        if depth:
            raise _NotMatchedError("a repeated group or look-ahead inside of another")
        self.loops += 1
        return depth + 1


def _any_number(where: _Where, least: int) -> _Step:
    def follow(name: _Name, starts: int) -> int:
        inside = where(name)
        if least:
            starts = (starts & inside) << 1
        # The sum carries from each start through the places before characters of the class, to the one after.
        return ((starts & inside) + inside ^ inside) | starts

    return follow


def _class_of(kind: str, value: Any) -> _Where | None:
    """Return where characters of a class are; ``None`` for what is no class."""
    test = _test_of(kind, value)
    if test is None:
        return None
    ascii_codes = sum(1 << code for code in range(128) if test(chr(code)))

    def where(name: _Name) -> int:
        found = 0
        for character, places in name.places.items():
            code = ord(character)
            if ascii_codes >> code & 1 if code < 128 else test(character):
                found |= places
        return found

    return where


def _test_of(kind: str, value: Any) -> Callable[[str], bool] | None:
    tests: Mapping[str, Callable[[str], bool]] = {
        "LITERAL": lambda character: ord(character) == value,
        "NOT_LITERAL": lambda character: ord(character) != value,
        "ANY": lambda character: character != "\n",
        "RANGE": lambda character: value[0] <= ord(character) <= value[1],
    }
    if kind == "CATEGORY":
        return _CATEGORIES[str(value)]
    return _set_test(value) if kind == "IN" else tests.get(kind)


def _set_test(items: Sequence[tuple[Any, Any]]) -> Callable[[str], bool]:
    negated = str(items[0][0]) == "NEGATE"
    tests = [test for kind, value in items if (test := _test_of(str(kind), value)) is not None]
    return lambda character: any(test(character) for test in tests) is not negated


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


_CATEGORIES: Mapping[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda character: not character.isdecimal(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda character: not character.isspace(),
    "CATEGORY_WORD": _is_word,
    "CATEGORY_NOT_WORD": lambda character: not _is_word(character),
}


def _end(name: _Name) -> int:
    length = len(name.text)
    return 1 << length | (1 << length - 1 if name.text.endswith("\n") else 0)


def _boundary(name: _Name) -> int:
    words = sum(places for character, places in name.places.items() if _is_word(character))
    return words ^ (words << 1)


_ASSERTIONS: Mapping[str, _Where] = {
    "AT_BEGINNING": lambda name: 1,
    "AT_BEGINNING_STRING": lambda name: 1,
    "AT_END": _end,
    "AT_END_STRING": lambda name: 1 << len(name.text),
    "AT_BOUNDARY": _boundary,
    "AT_NON_BOUNDARY": lambda name: ~_boundary(name),
}
