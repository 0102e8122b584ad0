"""The ledger's two tables, what a row of them looks like, and how rows add up to an hour.

`requests` has one row a request; `usage_hourly` has their sums by hour and origin, so that a year of history is read in
milliseconds. `SUMS` is the only place that says what is summed: the writer and the reports both use it. `migrations/`
creates the tables; a test holds the two equal. The column is `user_name` because PostgreSQL reserves `user`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Double,
    Index,
    MetaData,
    String,
    Table,
    case,
    literal_column,
)
from sqlalchemy.types import TypeEngine

from gateway.usage.record import FAILURES, UsageRecord, bounded_text

REVISION = "0001_ledger"
"""The migration that these tables are the outcome of."""

HOUR_S = 3600
MAX_COUNT = 2**40
"""More tokens than any request has; sums over years of such rows still fit 64 bits."""
MAX_SECONDS = 1e11


def _text(name: str, max_bytes: int) -> Column[str]:
    return Column(name, String(max_bytes), nullable=False)


def _key(name: str, max_bytes: int) -> Column[str]:
    return Column(name, String(max_bytes), primary_key=True)


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _seconds(name: str) -> Column[float]:
    return Column(name, Double, nullable=False)


metadata = MetaData()

# Text lengths are limits in UTF-8 bytes. Those of the rollup's key add up to less than 2,704 bytes, the most that
# PostgreSQL takes into an index entry.
requests = Table(
    "requests",
    metadata,
    _key("id", 64),
    _seconds("started_at"),
    _count("hour"),
    _text("surface", 64),
    _text("caller", 512),
    _text("client", 64),
    _text("user_name", 512),
    _text("trust", 16),
    _text("route", 128),
    _text("model", 512),
    _text("model_digest", 80),
    _text("backend", 64),
    _text("mode", 32),
    _count("status"),
    _text("finish_reason", 32),
    _text("error_code", 64),
    Column("stream", Boolean, nullable=False),
    _count("prompt_tokens"),
    _count("cached_tokens"),
    _count("completion_tokens"),
    _count("thinking_tokens"),
    _count("truncated_tokens"),
    _count("wasted_tokens"),
    _count("draft_tokens"),
    _count("accepted_tokens"),
    _seconds("queue_s"),
    _seconds("load_s"),
    _seconds("prefill_s"),
    _seconds("decode_s"),
    _seconds("ttft_s"),
    _seconds("total_s"),
    Index("ix_requests_started_at", "started_at"),
    Index("ix_requests_caller_started_at", "caller", "started_at"),
    Index("ix_requests_model_started_at", "model", "started_at"),
)

usage_hourly = Table(
    "usage_hourly",
    metadata,
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    _key("surface", 64),
    _key("caller", 512),
    _key("client", 64),
    _key("user_name", 512),
    _key("trust", 16),
    _key("model", 512),
    _count("num_requests"),
    _count("num_errors"),
    _count("num_ttft"),
    _count("prompt_tokens"),
    _count("cached_tokens"),
    _count("completion_tokens"),
    _count("thinking_tokens"),
    _count("truncated_tokens"),
    _count("wasted_tokens"),
    _count("draft_tokens"),
    _count("accepted_tokens"),
    _seconds("queue_s"),
    _seconds("load_s"),
    _seconds("prefill_s"),
    _seconds("decode_s"),
    _seconds("ttft_s"),
    _seconds("total_s"),
    sqlite_with_rowid=False,  # keeps an hour's rows together on disk, and the long key only once
)

KEYS = tuple(column.name for column in usage_hourly.primary_key)

# What is not a column of `requests` by the same name is counted: all, failures, and those that had a first token.
_COUNTED: dict[str, ColumnElement[int]] = {
    "num_requests": literal_column("1", BigInteger),
    "num_errors": case((requests.c.finish_reason.in_(FAILURES), 1), else_=0),
    "num_ttft": case((requests.c.ttft_s > 0, 1), else_=0),
}
SUMS: dict[str, ColumnElement[Any]] = {
    column.name: _COUNTED[column.name] if column.name in _COUNTED else requests.c[column.name]
    for column in usage_hourly.c
    if not column.primary_key
}
"""Each summed column of `usage_hourly`, and what one row of `requests` adds to it."""


def request_row(record: UsageRecord) -> dict[str, Any]:
    """The record as a row of `requests`, every value within what both databases can hold."""
    origin, usage, timings = record.origin, record.usage, record.timings
    started_at = _storable_seconds(record.started_at)
    values = {
        "id": record.id,
        "started_at": started_at,
        "hour": int(started_at) // HOUR_S * HOUR_S,
        "surface": origin.surface,
        "caller": origin.caller,
        "client": origin.client,
        "user_name": origin.user,
        "trust": origin.trust.value,
        "route": record.route,
        "model": record.model,
        "model_digest": record.model_digest,
        "backend": record.backend,
        "mode": record.mode,
        "status": record.status,
        "finish_reason": record.finish_reason,
        "error_code": record.error_code,
        "stream": record.stream,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "thinking_tokens": usage.thinking_tokens,
        "truncated_tokens": usage.truncated_tokens,
        "wasted_tokens": record.wasted_tokens,
        "draft_tokens": record.draft_tokens,
        "accepted_tokens": record.accepted_tokens,
        "queue_s": timings.queue_s,
        "load_s": timings.load_s,
        "prefill_s": timings.prefill_s,
        "decode_s": timings.decode_s,
        "ttft_s": timings.ttft_s,
        "total_s": timings.total_s,
    }
    return {name: _STORABLE[name](value) for name, value in values.items()}


def _storable_count(value: int) -> int:
    return min(max(value, 0), MAX_COUNT)


def _storable_seconds(value: float) -> float:
    """Zero for what no clock shows: SQLite would turn NaN into NULL, and infinity would spoil every sum."""
    return float(value) if 0 <= value <= MAX_SECONDS else 0.0


def _storable(column_type: TypeEngine[Any]) -> Callable[[Any], Any]:
    match column_type:
        case String(length=int(max_bytes)):
            return lambda text: bounded_text(text, max_bytes)
        case BigInteger():
            return _storable_count
        case Double():
            return _storable_seconds
        case _:
            return bool


_STORABLE = {column.name: _storable(column.type) for column in requests.c}
