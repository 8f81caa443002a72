"""The commands and the options that all of them have. A command's module is imported when it is to run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

import lowbit
from lowbit.cli import interrupt, messages
from lowbit.cli.status import USAGE, end_with, report

# Command -> what it does; ``lowbit.cli.<command>`` has the function ``<command>`` and ``EXAMPLES``.
COMMANDS: Mapping[str, str] = {
    "generate": "Make a picture from a prompt.",
    "serve": "Serve a model with OpenAI's API.",
    "quantize": "Quantize a model and write a checkpoint.",
    "info": "Show what runs here, or what would be quantized in a model.",
    "compare": "Compare a quantized model with its reference.",
    "validate": "Compare a method with the unquantized model on fixed prompts.",
    "sensitivity": "Rank layers by the damage that quantizing each does.",
    "tune": "Find the smallest recipe that meets a gate.",
    "calibrate-cache": "Fit TeaCache's coefficients to a model.",
    "bench": "Time a denoising step in several precisions.",
}

EXAMPLES = """Examples:

  lowbit generate "a large red circle left of a small blue square" --quantization int8   # no download

  lowbit serve --quantization int8   # http://127.0.0.1:8000/docs

  lowbit quantize Tongyi-MAI/Z-Image-Turbo -q int8 --output ./z-image-int8

  lowbit info ./z-image -q fp8

  lowbit COMMAND --help
"""


class Commands(TyperGroup):
    """A group whose commands are imported one by one, and take the group's options too."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        names: Any = dict.fromkeys(COMMANDS)  # enough for suggestions
        self.commands = names

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command; ``None`` for a name that is none."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        module = importlib.import_module(f"lowbit.cli.{name}")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name, epilog=module.EXAMPLES)(getattr(module, name))
        interrupt.with_clean_up()
        command = get_command(single)
        command.params += getattr(module, "more_params", list)()
        command.params += [option for option in self.params if option.name in messages.SHARED]
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the names and what they do, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    name="lowbit",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"lowbit {lowbit.__version__}")
        raise typer.Exit


@app.callback(epilog=EXAMPLES)
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    log_level: messages.LogLevel = None,
    quiet: messages.Quiet = False,
    debug: messages.Debug = False,
) -> None:
    """Run diffusion transformers in 8 bits and below."""
    messages.set_up()


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status; never raises."""
    messages.reset(arguments)
    try:
        found = app(list(arguments), prog_name="lowbit", standalone_mode=False)
        status = found if isinstance(found, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        status = interrupt.STATUS
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else USAGE
    except Exception as error:
        status = _end_with(error)
    if status == interrupt.STATUS:
        report("interrupted")
    return status


def _end_with(error: Exception) -> int:
    if interrupt.was_asked():
        return interrupt.STATUS
    if hasattr(error, "exit_code") and hasattr(error, "show"):  # typer's own, of bad usage
        error.show()
        return int(error.exit_code)
    return end_with(error, messages.state.debug)
