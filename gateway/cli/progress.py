"""How far long work is: a bar for each blob in a terminal, a line for each step elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gateway.cli.format import printable, size
from gateway.cli.output import make_console


class Step(msgspec.Struct, omit_defaults=True):
    """What the server says on the way (spec/ollama.md section 7.1)."""

    status: str = ""
    digest: str = ""
    total: int = 0
    completed: int = 0


def print_steps(steps: Iterable[Step]) -> None:
    """Print every step as a line of JSON, for programs."""
    for step in steps:
        typer.echo(json.dumps(msgspec.to_builtins(step)))


def show_steps(steps: Iterable[Step]) -> None:
    """Show the steps to a person, on stderr."""
    console = make_console(stderr=True)
    if console.is_terminal:
        _draw(console, steps)
    else:
        _tell(console, steps)


def _draw(console: Console, steps: Iterable[Step]) -> None:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    bars: dict[str, TaskID] = {}
    said = ""
    with Progress(*columns, console=console, transient=False) as progress:
        for step in steps:
            if step.digest:
                if step.digest not in bars:
                    bars[step.digest] = progress.add_task(_title(step), total=step.total or None)
                progress.update(bars[step.digest], completed=step.completed, total=step.total or None)
            elif step.status != said:
                said = step.status
                progress.console.print(printable(said))


def _tell(console: Console, steps: Iterable[Step]) -> None:
    """Each step once, a blob's when it begins."""
    said: set[str] = set()
    for step in steps:
        key = step.digest or step.status
        if key not in said:
            said.add(key)
            console.print(f"{_title(step)} ({size(step.total)})" if step.total else printable(step.status))


def _title(step: Step) -> str:
    return printable(step.status or step.digest.removeprefix("sha256:")[:12])
