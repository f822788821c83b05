"""The Typer application that commands register with, and how errors reach the user."""

from __future__ import annotations

import errno
import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgeprune.errors import EdgepruneError


class Commands(TyperGroup):
    """All commands. Typer has no options whose value may be left out: `--recover` alone becomes `--recover=`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        following = [*args[1:], "-"]
        alone = [arg == "--recover" and after.startswith("-") for arg, after in zip(args, following, strict=False)]
        return super().parse_args(ctx, [f"{a}=" if is_alone else a for a, is_alone in zip(args, alone, strict=True)])


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune the tokens of timm Vision Transformers along the latency staircase of the target device.",
)


def main() -> None:
    """Entry point: an EdgepruneError or a file that cannot be used is one line on stderr and exit 1; Ctrl-C 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names that the terminal's encoding lacks
    try:
        app()
    except EdgepruneError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        if not full and (error.filename is None or error.strerror is None):  # not about a file
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        advice = "free some space" if full else "check the path and its permissions"
        typer.echo(f"error: {where}{error.strerror}: {advice}", err=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == 130:  # Ctrl-C, as Typer reports it
            typer.echo("interrupted: finished steps are kept; run the same command again to continue", err=True)
        raise


def _version(value: bool) -> None:
    if value:
        from edgeprune.version import __version__

        typer.echo(f"edgeprune {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass
