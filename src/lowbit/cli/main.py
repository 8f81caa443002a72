"""The ``lowbit`` command."""

from __future__ import annotations

import logging
import sys

import typer

import lowbit
from lowbit.cli import bench, calibrate_cache, compare, generate, info, quantize, sensitivity, tune, validate

app = typer.Typer(
    name="lowbit",
    help="Run diffusion transformers in 8 bits and below.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("quantize", epilog=quantize.EXAMPLES)(quantize.quantize)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("sensitivity", epilog=sensitivity.EXAMPLES)(sensitivity.sensitivity)
app.command("tune", epilog=tune.EXAMPLES)(tune.tune)
app.command("validate", epilog=validate.EXAMPLES)(validate.validate)
app.command("calibrate-cache", epilog=calibrate_cache.EXAMPLES)(calibrate_cache.calibrate_cache)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("info", epilog=info.EXAMPLES)(info.info)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"lowbit {lowbit.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Set up messages before any command."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


def main() -> None:
    """Run the command line; bad input ends with its message and exit status 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
