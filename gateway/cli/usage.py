"""`headwater usage`: who used which model, and what it cost.

The server adds up; this draws the table. In a narrow terminal the names fold and the less important numbers are left
out; a pipe gets them all.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import typer

from gateway.cli import format as human
from gateway.cli.client import connect
from gateway.cli.models import AsJSON
from gateway.cli.output import make_console, print_json, print_table

_WIDE = 100  # columns of a terminal that has room for every number
_WIDE_ONLY = ("CACHED", "TTFT", "SHARE")
_YEAR_10000 = 253_402_300_800
_PLAIN_TRUST = ("", "derived")
"""How a caller is known that its name already shows: `<client>@<address>`."""


class _Sums(msgspec.Struct):
    num_requests: int = 0
    num_errors: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    tokens_per_second: float | None = None
    mean_ttft_s: float | None = None


class _Row(_Sums):
    """Sums and what they are grouped by; of these names, only those in the report's `by` are there."""

    caller: str = ""
    trust: str = ""
    client: str = ""
    user: str = ""
    surface: str = ""
    model: str = ""
    hour: Annotated[int, msgspec.Meta(ge=0, lt=_YEAR_10000)] = 0


class _Report(msgspec.Struct):
    by: list[str]
    rows: list[_Row]
    totals: _Sums


def usage(
    by: Annotated[
        str, typer.Option(help="What to group by: caller, client, user, surface, model, hour.")
    ] = "caller,model",
    since: Annotated[str, typer.Option(help="Beginning: an age such as 24h or 7d, or a date and time.")] = "24h",
    until: Annotated[str, typer.Option(help="End, in the same form; without it, now.")] = "",
    as_json: AsJSON = False,
) -> None:
    """Show who used what: requests, tokens and speed."""
    span = {"since": since, "until": until}
    query = {"by": by, **{name: value for name, value in span.items() if value}}
    with connect() as client:
        if as_json:
            print_json(client.get("/admin/usage", dict, **query))
            return
        _print_report(client.get("/admin/usage", _Report, **query))


def _print_report(report: _Report) -> None:
    columns = _columns(report.totals.total_tokens, wide=make_console().width >= _WIDE)
    order = sorted(report.rows, key=lambda row: row.hour) if "hour" in report.by else report.rows
    rows = [[*(_name(row, key) for key in report.by), *(text(row) for text in columns.values())] for row in order]
    footer = ["TOTAL", *[""] * (len(report.by) - 1), *(text(report.totals) for text in columns.values())]
    headings = [*(key.upper() for key in report.by), *columns]
    print_table(headings, rows, footer=footer, num_names=len(report.by), numeric=True)


def _name(row: _Row, key: str) -> str:
    if key == "hour":
        return f"{datetime.fromtimestamp(row.hour, UTC).astimezone():%Y-%m-%d %H:%M}"
    name = str(getattr(row, key, "")) or "-"
    return f"{name} ({row.trust})" if key == "caller" and row.trust not in _PLAIN_TRUST else name


def _columns(all_tokens: int, *, wide: bool) -> dict[str, Callable[[_Sums], str]]:
    """Headings of the numbers, and how each is read off; a narrow terminal goes without the less important."""
    columns: dict[str, Callable[[_Sums], str]] = {
        "REQ": lambda sums: human.count(sums.num_requests),
        "ERR": lambda sums: human.count(sums.num_errors),
        "PROMPT": lambda sums: human.count(sums.prompt_tokens),
        "CACHED": lambda sums: human.count(sums.cached_tokens),
        "OUTPUT": lambda sums: human.count(sums.completion_tokens),
        "TOTAL": lambda sums: human.count(sums.total_tokens),
        "TOK/S": lambda sums: "-" if sums.tokens_per_second is None else f"{sums.tokens_per_second:.1f}",
        "TTFT": lambda sums: "-" if sums.mean_ttft_s is None else f"{sums.mean_ttft_s:.2f}s",
        "SHARE": lambda sums: f"{sums.total_tokens / all_tokens:.0%}" if all_tokens else "-",
    }
    return {heading: text for heading, text in columns.items() if wide or heading not in _WIDE_ONLY}
