"""The command line as a whole: which commands there are, and how a failure is told.

Importing it is quick and imports neither the server nor llama.cpp; what is heavy is imported inside its command.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gateway.cli.client import CommandFailed
from gateway.cli.create import copy, create, remove
from gateway.cli.doctor import doctor
from gateway.cli.models import list_loaded, list_models, show, stop
from gateway.cli.run import RunCommand, run
from gateway.cli.serve import serve
from gateway.cli.transfer import pull, push
from gateway.cli.usage import usage


class _Commands(TyperGroup):
    """Turns a failed command into one line on stderr and an exit code, as Ollama does."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CommandFailed as failure:
            typer.echo(f"Error: {failure}", err=True)
            raise typer.Exit(failure.exit_code) from None


app = typer.Typer(name="headwater", cls=_Commands, no_args_is_help=True, pretty_exceptions_show_locals=False)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"headwater version is {version('headwater')}")
    except PackageNotFoundError:  # run from a source tree
        typer.echo("headwater version is unknown: it is not installed as a package")
    raise typer.Exit


@app.callback()
def headwater(
    print_version: Annotated[
        bool, typer.Option("--version", "-v", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """A server for local models that knows where every request comes from."""


app.command("serve")(serve)
app.command("run", cls=RunCommand)(run)
app.command("list")(list_models)
app.command("ls", hidden=True)(list_models)
app.command("ps")(list_loaded)
app.command("show")(show)
app.command("pull")(pull)
app.command("push")(push)
app.command("create")(create)
app.command("cp")(copy)
app.command("rm")(remove)
app.command("stop")(stop)
app.command("usage")(usage)
app.command("doctor")(doctor)
