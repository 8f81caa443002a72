"""What the command prints besides its result: log messages, warnings, progress."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from lowbit import env
from lowbit.errors import ConfigError, expected_one_of

LEVELS = ("debug", "info", "warning", "error")
SHARED = ("log_level", "quiet", "debug")

# Libraries whose deprecations concern lowbit's code, not its user.
_LIBRARIES = ("accelerate", "diffusers", "huggingface_hub", "peft", "torch", "torchao", "transformers", "triton")


@dataclass
class State:
    """What the user chose.

    Attributes:
        level: of ``LEVELS``; ``None`` where the environment says.
        quiet: no progress, nothing but results, warnings and errors.
        debug: tracebacks of errors, and every message.
    """

    level: str | None = None
    quiet: bool = False
    debug: bool = False


state = State()


def _set_level(value: str | None) -> str | None:
    if value is not None:
        state.level = _known(value, "--log-level")
        set_level()
    return value


def _set_quiet(value: bool) -> bool:
    if value:
        state.quiet = True
        set_level()
    return value


def _set_debug(value: bool) -> bool:
    if value:
        state.debug = True
        set_level()
    return value


LogLevel = Annotated[
    str | None,
    typer.Option(
        "--log-level",
        callback=_set_level,
        expose_value=False,
        help=f"Messages to show: {', '.join(LEVELS)}. Default: {env.LOG}, or warning.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", callback=_set_quiet, expose_value=False, help="Show results, warnings and errors only, no progress."
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, expose_value=False, help="Show tracebacks and every message.")
]


def set_up() -> None:
    """Direct messages to standard error, and leave out those that do not concern the user."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    set_level()
    if not sys.warnoptions and not state.debug:
        for category in (FutureWarning, DeprecationWarning):
            modules = "|".join(map(re.escape, _LIBRARIES))
            warnings.filterwarnings("ignore", category=category, module=rf"({modules})(\.|$)")
    for name in env.unknown_names():
        logging.getLogger("lowbit").warning("%s is set, and lowbit reads no such variable", name)


def set_level() -> None:
    """Show lowbit's messages from the level on that the user chose."""
    logging.getLogger("lowbit").setLevel(_level())


def reset(arguments: Sequence[str]) -> None:
    """Forget what the user chose in an earlier run in this process; prepare for what ``arguments`` say."""
    state.level, state.quiet, state.debug = None, False, False
    if "--quiet" in arguments:  # before any library is imported
        env.hide_progress()


def _level() -> int:
    given = state.level or (env.read(env.LOG) or None)
    default = "debug" if state.debug else "warning"
    chosen = default if given is None else _known(given, env.LOG)
    return int(getattr(logging, chosen.upper()))


def _known(level: str, option: str) -> str:
    if level.lower() not in LEVELS:
        raise ConfigError(f"Unknown {option}: {level!r}. {expected_one_of(LEVELS)}")
    return level.lower()


def say(text: str = "") -> None:
    """Print a line on how it goes, unless the user wants quiet."""
    if not state.quiet:
        typer.echo(text)


@contextmanager
def bar(unit: str) -> Iterator[Any]:
    """Show a progress bar that leaves no trace, unless the user wants quiet; messages are written above it."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    look: dict[str, Any] = {"bar_format": f"{{desc}}: {{n_fmt}}/{{total_fmt}} {unit}s, {{elapsed}}", "delay": 0.1}
    with logging_redirect_tqdm(), tqdm(leave=False, disable=state.quiet, **look) as shown:
        yield shown


def silence_libraries() -> None:
    """Turn off the bars with which diffusers and transformers show the parts of loading: lowbit shows its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    for library in libraries:
        library.disable_progress_bar()
