import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from usage_records import HOUR_0, make_record, moments, record_lists

from engines.errors import BadRequest
from engines.events import Timings, Usage
from engines.request import Origin, Trust
from gateway.usage.database import LedgerError
from gateway.usage.ledger import Ledger
from gateway.usage.record import FAILURES, UsageRecord, bounded_text
from gateway.usage.reports import DIMENSIONS, recent_requests, total, usage_report


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """An open, empty ledger."""
    ledger = await Ledger.open(f"sqlite+aiosqlite:///{tmp_path}/usage.db")
    yield ledger
    await ledger.close()


_DIMENSION: dict[str, Callable[[UsageRecord], Any]] = {
    "caller": lambda r: (bounded_text(r.origin.caller, 512), r.origin.trust.value),
    "client": lambda r: r.origin.client,
    "user": lambda r: r.origin.user,
    "surface": lambda r: r.origin.surface,
    "model": lambda r: bounded_text(r.model, 512),
    "hour": lambda r: int(r.started_at // 3600) * 3600,
}


def brute_force(
    records: list[UsageRecord], by: list[str], since: float | None, until: float | None
) -> dict[Any, list[float]]:
    """The report as a loop over all records."""
    groups: dict[Any, list[float]] = defaultdict(lambda: [0] * 13)
    for r in records:
        if (since is None or r.started_at >= since) and (until is None or r.started_at < until):
            usage, timings = r.usage, r.timings
            amounts = (
                1,
                r.finish_reason in FAILURES,
                timings.ttft_s > 0,
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens,
                usage.thinking_tokens,
                usage.truncated_tokens,
                r.wasted_tokens,
                r.accepted_tokens,
                timings.ttft_s,
                timings.decode_s,
                timings.total_s,
            )
            group = tuple(_DIMENSION[name](r) for name in by)
            groups[group] = [old + new for old, new in zip(groups[group], amounts, strict=True)]
    return groups


def as_groups(rows: list[dict[str, Any]], by: list[str]) -> dict[Any, list[float]]:
    """A report in the shape of `brute_force`."""
    counts = ["num_requests", "num_errors", "num_ttft"]
    tokens = [f"{kind}_tokens" for kind in ("prompt", "cached", "completion", "thinking", "truncated", "wasted")]
    columns = [*counts, *tokens, "accepted_tokens", "ttft_s", "decode_s", "total_s"]
    return {
        tuple((row[name], row["trust"]) if name == "caller" else row[name] for name in by): [row[c] for c in columns]
        for row in rows
    }


@settings(max_examples=40, deadline=None)
@given(
    batches=st.lists(record_lists, max_size=3),
    spans=st.lists(st.tuples(st.none() | moments, st.none() | moments), min_size=1, max_size=6),
    by=st.lists(st.sampled_from(sorted(DIMENSIONS)), min_size=1, unique=True),
)
def test_reports_equal_a_loop_over_all_records(
    batches: list[list[UsageRecord]], spans: list[tuple[float | None, float | None]], by: list[str]
) -> None:
    """For any records, span and grouping, to the last token and second; whole hours and both edges included."""

    async def check(directory: str) -> None:
        ledger = await Ledger.open(f"sqlite+aiosqlite:///{directory}/usage.db")
        for batch in batches:
            assert all(await asyncio.gather(*map(ledger.record, batch)))
        records = [record for batch in batches for record in batch]
        for since, until in [(None, None), *spans]:
            rows = await usage_report(ledger, by=by, since=since, until=until)
            assert as_groups(rows, by) == brute_force(records, by, since, until)
            tokens = [row["total_tokens"] for row in rows]
            assert tokens == sorted(tokens, reverse=True)
        await ledger.close()

    with TemporaryDirectory() as directory:
        asyncio.run(check(directory))


async def test_the_span_begins_with_since_and_ends_before_until(ledger: Ledger) -> None:
    """Two reports side by side count every request once, also in the middle of an hour."""
    for n in range(4):
        await ledger.record(make_record(f"req_{n}", started_at=HOUR_0 + 10.0 * n))
    for middle in (HOUR_0 + 10.0, HOUR_0 + 10.5, float(HOUR_0), HOUR_0 + 3600.0):
        before = total(await usage_report(ledger, by=["model"], since=None, until=middle))
        after = total(await usage_report(ledger, by=["model"], since=middle, until=None))
        assert before["num_requests"] + after["num_requests"] == 4


async def test_a_claimed_name_is_never_added_to_a_verified_one(ledger: Ledger) -> None:
    """Who says to be alice does not appear on alice's line."""
    for trust in (Trust.VERIFIED, Trust.CLAIMED):
        await ledger.record(make_record(trust.value, origin=Origin("openai/chat", "alice", trust=trust)))
    rows = await usage_report(ledger, by=["caller"], since=None, until=None)
    assert [(row["caller"], row["trust"], row["num_requests"]) for row in rows] == [
        ("alice", "claimed", 1),
        ("alice", "verified", 1),
    ]


async def test_speed_and_latency_are_derived_from_sums(ledger: Ledger) -> None:
    """Tokens per second weigh each request by its length, and requests without a first token do not dilute the TTFT."""
    await ledger.record(make_record("1", usage=Usage(5, 0, 30), timings=Timings(decode_s=1.0, ttft_s=0.5)))
    await ledger.record(make_record("2", usage=Usage(5, 0, 10), timings=Timings(decode_s=3.0, ttft_s=1.5)))
    await ledger.record(make_record("3", finish_reason="refused", usage=Usage(), timings=Timings()))
    (row,) = await usage_report(ledger, by=["model"], since=None, until=None)
    assert (row["tokens_per_second"], row["mean_ttft_s"], row["total_tokens"]) == (10.0, 1.0, 50)
    assert total([row]) == {name: value for name, value in row.items() if name != "model"}


async def test_empty_ledger_reports_nothing(ledger: Ledger) -> None:
    """No rows, and totals of zero."""
    rows = await usage_report(ledger, by=["model"], since=HOUR_0 + 1.0, until=None)
    assert rows == []
    assert total(rows)["num_requests"] == 0
    assert total(rows)["tokens_per_second"] is None


@pytest.mark.parametrize("by", [[], ["prompt"], ["caller", "user_name"]])
async def test_unknown_dimensions_are_named(ledger: Ledger, by: list[str]) -> None:
    """The error lists what can be grouped by."""
    with pytest.raises(BadRequest, match=r"cannot group by (nothing|prompt|user_name); choose from caller, client"):
        await usage_report(ledger, by=by, since=None, until=None)


async def test_recent_requests_are_newest_first(ledger: Ledger) -> None:
    """Whole rows, as many as asked for."""
    for n in range(3):
        await ledger.record(make_record(f"req_{n}", started_at=HOUR_0 + n))
    rows = await recent_requests(ledger, 2)
    assert [row["id"] for row in rows] == ["req_2", "req_1"]
    assert rows[0]["caller"] == "alice"
    assert rows[0]["user"] == ""
    assert rows[0]["stream"] is False


async def test_unreadable_database_is_one_of_our_errors(ledger: Ledger) -> None:
    """Readers see no SQLAlchemy exception."""
    async with ledger.database.begin() as connection:
        await connection.exec_driver_sql("DROP TABLE usage_hourly")
    with pytest.raises(LedgerError, match="cannot read the usage database"):
        await usage_report(ledger, by=["model"], since=None, until=None)
