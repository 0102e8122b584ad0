import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import OperationalError
from usage_records import make_record

from engines.events import Timings, Usage
from gateway.usage import ledger as ledger_module
from gateway.usage.ledger import Ledger, _statements
from gateway.usage.tables import SUMS, requests, usage_hourly


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database file that does not exist yet, nor does its directory."""
    return tmp_path / "data" / "usage.db"


@pytest.fixture
async def ledger(path: Path) -> AsyncIterator[Ledger]:
    """An open, empty ledger."""
    ledger = await Ledger.open(f"sqlite+aiosqlite:///{path}")
    yield ledger
    await ledger.close()


def count(path: Path) -> int:
    """How many rows another process sees."""
    connection = sqlite3.connect(path)
    (rows,) = connection.execute("SELECT count(*) FROM requests").fetchone()
    connection.close()
    return int(rows)


def sums(path: Path) -> tuple[list[Any], list[Any]]:
    """Every summed column, once from the hourly sums and once from the requests."""
    connection = sqlite3.connect(path)
    hourly = select(*(func.sum(usage_hourly.c[name]) for name in SUMS))
    single = select(*(func.sum(amount) for amount in SUMS.values()))
    both = [
        connection.execute(str(s.compile(compile_kwargs={"literal_binds": True}))).fetchone() for s in (hourly, single)
    ]
    connection.close()
    return list(both[0]), list(both[1])


async def test_what_record_confirmed_is_visible_to_other_processes(ledger: Ledger, path: Path) -> None:
    """`record` returns only once the row is committed."""
    assert await ledger.record(make_record())
    assert count(path) == 1


async def test_hourly_sums_equal_the_rows(ledger: Ledger, path: Path) -> None:
    """Row and sums are written together, over commits and hours."""
    for n in range(5):
        assert await ledger.record(make_record(f"req_{n}", started_at=1_800_000_000.0 + n * 1800))
    hourly, single = sums(path)
    assert hourly == single


async def test_the_same_id_is_counted_once(ledger: Ledger, path: Path) -> None:
    """Recording again, in the same commit or a later one, is confirmed and adds nothing."""
    assert all(await asyncio.gather(*(ledger.record(make_record()) for _ in range(3))))
    assert await ledger.record(make_record(usage=Usage(prompt_tokens=99)))
    hourly, single = sums(path)
    assert hourly == single
    assert hourly[0] == 1


async def test_200_callers_at_once_share_commits(ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that queued up while a commit ran is one commit."""
    commits: list[int] = []
    commit = ledger._commit

    async def counting(rows: Any) -> None:
        commits.append(len(rows))
        await commit(rows)

    monkeypatch.setattr(ledger, "_commit", counting)
    assert all(await asyncio.gather(*(ledger.record(make_record(f"req_{n}")) for n in range(200))))
    assert count(path) == 200
    assert len(commits) < 5


async def test_more_rows_than_one_commit_takes_are_all_written(ledger: Ledger, path: Path) -> None:
    """A long queue becomes several commits."""
    num_rows = 2 * ledger_module.MAX_BATCH + 1
    assert all(await asyncio.gather(*(ledger.record(make_record(f"req_{n}")) for n in range(num_rows))))
    assert count(path) == num_rows


async def test_cancelled_callers_row_is_written(ledger: Ledger, path: Path) -> None:
    """A client that leaves while its row is being committed is in the ledger, and harms nobody else's row."""
    tasks = [asyncio.create_task(ledger.record(make_record(f"req_{n}"))) for n in range(10)]
    await asyncio.sleep(0)  # each has queued its row
    for task in tasks[::2]:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert done[1::2] == [True] * 5
    await ledger.close()
    assert count(path) == 10


async def test_close_commits_what_is_queued(ledger: Ledger, path: Path) -> None:
    """Nobody has to wait for their rows before closing."""
    tasks = [asyncio.create_task(ledger.record(make_record(f"req_{n}"))) for n in range(50)]
    await asyncio.sleep(0)
    await ledger.close()
    assert count(path) == 50
    assert all(await asyncio.gather(*tasks))


async def test_closing_twice_is_harmless_and_later_rows_are_counted(ledger: Ledger) -> None:
    """A closed ledger says that it does not record."""
    await ledger.close()
    await ledger.close()
    assert not await ledger.record(make_record())
    assert ledger.num_unrecorded == 1


async def test_locked_database_is_survived(ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While somebody else holds the write lock rows wait, through a failed attempt too, and then they are there."""
    async with ledger.database.connect() as connection:
        await connection.exec_driver_sql("PRAGMA busy_timeout=1")  # the pool hands this connection to the writer
    other = sqlite3.connect(path)
    other.execute("BEGIN IMMEDIATE")
    refused = asyncio.Event()
    commit = ledger._commit

    async def watched(rows: Any) -> None:
        try:
            await commit(rows)
        except OperationalError:
            refused.set()
            raise

    monkeypatch.setattr(ledger, "_commit", watched)
    waiting = asyncio.create_task(ledger.record(make_record()))
    await refused.wait()
    other.rollback()
    other.close()
    assert await waiting
    assert count(path) == 1
    assert ledger.num_unrecorded == 0


async def test_full_disk_is_counted_and_the_writer_recovers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that SQLite refuses are given up after a few attempts; once there is room, recording goes on."""
    monkeypatch.setattr(ledger_module, "_BACKOFFS_S", (0.001, 0.001))
    unrecorded: list[int] = []
    ledger = await Ledger.open(f"sqlite+aiosqlite:///{path}", unrecorded.append)

    async def limit_pages(pages: int) -> None:
        async with ledger.database.connect() as connection:
            await connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    await limit_pages(1)  # SQLite takes the present size, so the file cannot grow: "database or disk is full"
    many = [ledger.record(make_record(f"req_{n}", model="m" * 500)) for n in range(300)]
    assert not any(await asyncio.gather(*many))
    assert ledger.num_unrecorded == sum(unrecorded) == 300
    assert count(path) == 0

    await limit_pages(1_000_000)
    assert await ledger.record(make_record())
    assert count(path) == 1
    await ledger.close()


async def test_failure_after_commit_does_not_count_twice(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that committed but looked failed is repeated without effect."""
    monkeypatch.setattr(ledger_module, "_BACKOFFS_S", (0.001,))
    commit, failures = ledger._commit, iter([True])

    async def failing_once(rows: Any) -> None:
        await commit(rows)
        if next(failures, False):
            raise ConnectionResetError("the answer was lost")

    monkeypatch.setattr(ledger, "_commit", failing_once)
    assert await ledger.record(make_record())
    hourly, single = sums(path)
    assert hourly == single
    assert hourly[0] == 1


async def test_queue_is_bounded(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that does not answer cannot fill the memory: rows beyond the bound are given up at once."""
    monkeypatch.setattr(ledger_module, "MAX_QUEUED", 3)
    done = await asyncio.gather(*(ledger.record(make_record(f"req_{n}")) for n in range(10)))
    assert done == [True] * 3 + [False] * 7
    assert ledger.num_unrecorded == 7


async def test_nothing_a_client_or_engine_says_is_refused_by_the_database(ledger: Ledger, path: Path) -> None:
    """Texts of any length and kind, and impossible numbers, are made storable."""
    wild = make_record(
        caller="a\0b",
        model="\ud800" + "é" * 5_000_000,
        error_code="x" * 1000,
        status=-1,
        usage=Usage(prompt_tokens=10**30, completion_tokens=-5),
        timings=Timings(decode_s=float("nan"), total_s=float("inf"), queue_s=-1.0),
    )
    assert await ledger.record(wild)
    connection = sqlite3.connect(path)
    (row,) = connection.execute("SELECT caller, length(CAST(model AS BLOB)), prompt_tokens, decode_s FROM requests")
    connection.close()
    assert row == ("a\N{REPLACEMENT CHARACTER}b", 511, 2**40, 0.0)


_RECORDER = """
import asyncio, sys, uuid
sys.path.insert(0, sys.argv[2])
from usage_records import make_record
from gateway.usage.ledger import Ledger

async def record(ledger):
    while True:
        record_id = str(uuid.uuid4())
        if await ledger.record(make_record(record_id)):
            print(record_id, flush=True)

async def main():
    ledger = await Ledger.open("sqlite+aiosqlite:///" + sys.argv[1])
    await asyncio.gather(*(record(ledger) for _ in range(4)))

asyncio.run(main())
"""


async def test_killed_process_loses_no_confirmed_row(path: Path) -> None:
    """After SIGKILL at any moment, every id that was confirmed is in the database, and the sums agree with the rows."""
    confirmed: set[str] = set()
    random = Random(7)
    for _ in range(4):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _RECORDER, str(path), str(Path(__file__).parent), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        for _ in range(random.randint(1, 150)):
            confirmed.add((await process.stdout.readline()).decode().strip())
        process.kill()
        rest = (await process.stdout.read()).decode()
        confirmed.update(rest[: rest.rfind("\n") + 1].split())
        await process.wait()
    connection = sqlite3.connect(path)
    stored = {row[0] for row in connection.execute("SELECT id FROM requests")}
    connection.close()
    assert confirmed <= stored
    hourly, single = sums(path)
    assert hourly == single


def test_statements_are_what_postgresql_understands() -> None:
    """The same two statements compile for the other database."""
    texts = [str(statement.compile(dialect=postgresql.dialect())) for statement in _statements("postgresql")]  # type: ignore[attr-defined, no-untyped-call]  # SQLAlchemy's dialects are untyped
    assert all("ON CONFLICT" in text for text in texts)
    assert "RETURNING requests.id" in texts[0]
    assert len(requests.c) * ledger_module.MAX_BATCH < 32_767  # parameters in one statement
