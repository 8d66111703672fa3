"""The table of commands, and the typer application made from it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from stratakv.cli.bench import attention, scaling
from stratakv.cli.bench_fidelity import fidelity
from stratakv.cli.bench_speed import batch, decode, prefill
from stratakv.cli.chat import chat
from stratakv.cli.failures import OneLineFailures
from stratakv.cli.generate import generate
from stratakv.cli.verify import verify
from stratakv.errors import ConfigurationError

COMMANDS: Mapping[str, Callable[..., Any]] = {
    "generate": generate,
    "chat": chat,
    "bench scaling": scaling,
    "bench attention": attention,
    "bench fidelity": fidelity,
    "bench decode": decode,
    "bench prefill": prefill,
    "bench batch": batch,
    "verify": verify,
}
"""Every command by its full name. A new one is a file and a line here; "group command" puts it in a group."""

GROUPS: Mapping[str, str] = {"bench": "Measure on this machine."}
"""What the help says about the groups."""


def build_app(commands: Mapping[str, Callable[..., Any]] = COMMANDS) -> typer.Typer:
    """The application that offers `commands`."""
    app = typer.Typer(cls=OneLineFailures, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_root)
    groups: dict[str, typer.Typer] = {}
    for full_name, function in commands.items():
        group, _, name = full_name.rpartition(" ")
        if group and group not in groups:
            groups[group] = typer.Typer(rich_markup_mode=None)
            # Without a callback typer makes a group of one command that command itself.
            groups[group].callback(invoke_without_command=True)(_need_command)
            app.add_typer(groups[group], name=group, help=GROUPS.get(group))
        (groups[group] if group else app).command(name)(function)
    return app


def main() -> None:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # a terminal that cannot show a character shows "?"
            reconfigure(errors="replace")
    build_app()()


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """A paged, verified key/value cache for autoregressive Transformers."""
    if version:
        from stratakv import __version__

        typer.echo(f"stratakv {__version__}")
        raise typer.Exit
    _need_command(context)


def _need_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        raise ConfigurationError(f"no command was given; `{context.command_path} --help` lists them")
