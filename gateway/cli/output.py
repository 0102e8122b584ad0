"""How results reach the screen: tables, JSON, and the console they are printed on.

Everything from the server passes through `printable`: names of callers and models are what clients made of them. In a
terminal tables fold to its width; in a pipe they are plain text, one row a line, however long.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from engines.request import JSON
from gateway.cli.format import printable

_PIPE_WIDTH = 100_000  # no row is folded where nobody looks at a screen


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: no markup, no guessing of what to highlight."""
    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def print_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    footer: Sequence[str] = (),
    num_names: int = 1,
    numeric: bool = False,
) -> None:
    """Print rows under headings. The first `num_names` columns may fold, the others stay on one line.

    `numeric` aligns those others to the right.
    """
    columns = [
        Column(
            heading,
            footer=_cell(footer[index]) if footer else "",
            overflow="fold" if index < num_names else "ellipsis",
            no_wrap=index >= num_names,
            justify="right" if numeric and index >= num_names else "left",
        )
        for index, heading in enumerate(headings)
    ]
    padding = (0, 2 if numeric else 4, 0, 0)
    table = Table(*columns, box=None, pad_edge=False, padding=padding, show_footer=bool(footer))
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    make_console().print(table)


def _cell(value: str) -> Text:
    return Text(printable(value).replace("\n", " ").replace("\t", " "))


def print_json(value: JSON) -> None:
    """Print JSON for programs; in ASCII, so that no terminal and no encoding can spoil it."""
    typer.echo(json.dumps(value, indent=2))
