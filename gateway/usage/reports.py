"""Questions to the ledger: who used what, and what happened last.

Whole hours come from the hourly sums, the rest of a span from the requests themselves, so an answer is exact for any
span and still fast for a year. Reading never waits for the writer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Executable, Select, func, select, union_all
from sqlalchemy.exc import SQLAlchemyError

from engines.errors import BadRequest
from gateway.usage.database import LedgerError
from gateway.usage.ledger import Ledger
from gateway.usage.tables import HOUR_S, SUMS, requests, usage_hourly

Row = dict[str, Any]

DIMENSIONS: dict[str, tuple[str, ...]] = {
    # A caller is a name and how sure we are of it: what somebody claims is never added to what somebody proved.
    "caller": ("caller", "trust"),
    "client": ("client",),
    "user": ("user_name",),
    "surface": ("surface",),
    "model": ("model",),
    "hour": ("hour",),
}
"""What a report may be grouped by, and the columns that mean it."""


async def usage_report(ledger: Ledger, *, by: Sequence[str], since: float | None, until: float | None) -> list[Row]:
    """The sums of all requests with `since <= started_at < until`, most tokens first.

    Each row has the `by` dimensions (and `trust` beside `caller`), the summed columns of `usage_hourly`,
    `total_tokens`, and `tokens_per_second` and `mean_ttft_s`, which are None where nothing was generated.

    Args:
        ledger: an open ledger.
        by: names from `DIMENSIONS`, at least one.
        since: seconds since the epoch; None is the beginning.
        until: seconds since the epoch; None is the end.

    Raises:
        BadRequest: `by` names no or unknown dimensions.
        LedgerError: the database cannot be read.
    """
    unknown = [name for name in by if name not in DIMENSIONS]
    if unknown or not by:
        raise BadRequest(f"cannot group by {', '.join(unknown) or 'nothing'}; choose from {', '.join(DIMENSIONS)}")
    columns = tuple(dict.fromkeys(column for name in by for column in DIMENSIONS[name]))
    found = await _read(ledger, _sums(columns, since, until))
    keys = [("user" if column == "user_name" else column, column) for column in columns]
    rows = [{key: row[column] for key, column in keys} | _derived(row) for row in found]
    return sorted(rows, key=lambda row: (-row["total_tokens"], *(row[key] for key, _ in keys)))


def total(rows: Sequence[Row]) -> Row:
    """The rows of a report added up to one, without its dimensions."""
    return _derived({name: sum(row[name] for row in rows) for name in SUMS})


async def recent_requests(ledger: Ledger, limit: int) -> list[Row]:
    """The last `limit` requests, newest first, as rows of `requests`.

    Raises:
        LedgerError: the database cannot be read.
    """
    newest = select(requests).order_by(requests.c.started_at.desc(), requests.c.id).limit(limit)
    rows = await _read(ledger, newest)
    for row in rows:
        row["user"] = row.pop("user_name")
    return rows


async def _read(ledger: Ledger, statement: Executable) -> list[Row]:
    try:
        async with ledger.database.connect() as connection:
            return [dict(row) for row in (await connection.execute(statement)).mappings()]
    except (SQLAlchemyError, OSError) as error:
        raise LedgerError(f"cannot read the usage database: {error}") from error


def _sums(columns: Sequence[str], since: float | None, until: float | None) -> Executable:
    """One statement, so that a commit between two cannot be half in the answer."""
    parts = union_all(*_parts(columns, since, until)).subquery()
    keys = [parts.c[column] for column in columns]
    return select(*keys, *(func.sum(parts.c[name]).label(name) for name in SUMS)).group_by(*keys)


def _parts(columns: Sequence[str], since: float | None, until: float | None) -> list[Select[Any]]:
    """The span as its whole hours and what is left of it at either end."""
    first = None if since is None else -(-math.ceil(since) // HOUR_S) * HOUR_S
    last = None if until is None else math.floor(until) // HOUR_S * HOUR_S
    if first is not None and last is not None and first > last:  # both ends within one hour
        return [_of_requests(columns, since, until)]
    whole = select(*(usage_hourly.c[name] for name in (*columns, *SUMS)))
    if first is not None:
        whole = whole.where(usage_hourly.c.hour >= first)
    if last is not None:
        whole = whole.where(usage_hourly.c.hour < last)
    parts = [whole]
    if first is not None and first != since:
        parts.append(_of_requests(columns, since, first))
    if last is not None and last != until:
        parts.append(_of_requests(columns, last, until))
    return parts


def _of_requests(columns: Sequence[str], since: float | None, until: float | None) -> Select[Any]:
    amounts = (amount.label(name) for name, amount in SUMS.items())
    span = (requests.c.started_at >= since, requests.c.started_at < until)
    return select(*(requests.c[column] for column in columns), *amounts).where(*span)


def _derived(row: Row) -> Row:
    """The sums as plain numbers (PostgreSQL adds integers to decimals), and what follows from them."""
    sums: Row = {name: float(row[name]) if name.endswith("_s") else int(row[name]) for name in SUMS}
    return sums | {
        "total_tokens": sums["prompt_tokens"] + sums["completion_tokens"],
        "tokens_per_second": sums["completion_tokens"] / sums["decode_s"] if sums["decode_s"] else None,
        "mean_ttft_s": sums["ttft_s"] / sums["num_ttft"] if sums["num_ttft"] else None,
    }
