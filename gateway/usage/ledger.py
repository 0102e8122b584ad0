"""The writer of the usage ledger: what `record` has answered for is on disk, row and hourly sums in one transaction.

One task writes. While it commits, further records queue up and become the next commit together, so a lone record is
never held back and a crowd shares its commits. Reading is left to `reports`. The surprise: cancelling a caller of
`record` does not cancel its row; the request happened.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Executable, bindparam, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.usage.database import open_database
from gateway.usage.record import UsageRecord
from gateway.usage.tables import KEYS, SUMS, request_row, requests, usage_hourly

logger = logging.getLogger(__name__)

MAX_BATCH = 500
MAX_QUEUED = 20_000
"""Rows that may wait for a database that does not answer, before further ones are given up at once."""
_BACKOFFS_S = (0.05, 0.25, 1.0)

_Row = dict[str, Any]
_Entry = tuple[_Row, "asyncio.Future[bool]"]


class Ledger:
    """The open ledger. Open it with `open`, close it with `close`.

    Attributes:
        database: for reading. num_unrecorded: rows given up because the database refused them or did not answer.
    """

    def __init__(self, database: AsyncEngine, on_unrecorded: Callable[[int], None]) -> None:
        self.database = database
        self.num_unrecorded = 0
        self._on_unrecorded = on_unrecorded
        self._insert, self._upsert = _statements(database.dialect.name)
        self._queue: asyncio.Queue[_Entry | None] = asyncio.Queue()
        self._closed = False
        self._writer = asyncio.create_task(self._write(), name="usage-ledger-writer")

    @classmethod
    async def open(cls, url: str, on_unrecorded: Callable[[int], None] = lambda _: None) -> Ledger:
        """Open or create the database, bring its schema up to date and start writing.

        `on_unrecorded` is called with the number of rows whenever some are given up.

        Raises:
            LedgerError: see `open_database`.
        """
        return cls(await open_database(url), on_unrecorded)

    async def record(self, record: UsageRecord) -> bool:
        """Whether the request is committed. Never raises for the database's sake.

        Waits for the commit, through retries if need be. Recording the same id again changes nothing.
        """
        if self._closed or self._queue.qsize() >= MAX_QUEUED:
            self._give_up(1, "the ledger is closed" if self._closed else "too many rows are waiting")
            return False
        committed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((request_row(record), committed))
        return await committed

    async def close(self) -> None:
        """Commit everything queued, then let go of the database."""
        if not self._closed:
            self._closed = True
            self._queue.put_nowait(None)
        await self._writer
        await self.database.dispose()

    async def _write(self) -> None:
        closing = False
        while not closing:
            taken = [await self._queue.get()]
            while len(taken) < MAX_BATCH and not self._queue.empty():
                taken.append(self._queue.get_nowait())
            entries = [entry for entry in taken if entry is not None]
            closing = len(entries) < len(taken)
            committed = not entries or await self._commit_patiently([row for row, _ in entries])
            for _, waiter in entries:
                if not waiter.done():  # its caller was cancelled
                    waiter.set_result(committed)

    async def _commit_patiently(self, rows: Sequence[_Row]) -> bool:
        backoffs = iter(_BACKOFFS_S)
        while True:
            try:
                await self._commit(rows)
            except Exception as error:  # noqa: BLE001  (whatever a driver raises, the writer lives on)
                backoff_s = next(backoffs, None)
                if backoff_s is None:
                    self._give_up(len(rows), error)
                    return False
                logger.warning("usage ledger: trying again in %s s: %s", backoff_s, error)
                await asyncio.sleep(backoff_s)
            else:
                return True

    async def _commit(self, rows: Sequence[_Row]) -> None:
        """One transaction. A row that is there already, perhaps by an attempt thought lost, is not added again."""
        async with self.database.begin() as connection:
            inserted = (await connection.scalars(self._insert, rows)).all()
            if inserted:
                await connection.execute(self._upsert, {"ids": inserted})

    def _give_up(self, num_rows: int, reason: object) -> None:
        self.num_unrecorded += num_rows
        logger.error("usage ledger: %d requests are not recorded: %s", num_rows, reason)
        self._on_unrecorded(num_rows)


def _statements(dialect: str) -> tuple[Executable, Executable]:
    """The insert of new rows, returning their ids, and the addition of the rows with those ids to their hours."""
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    new_rows = insert(requests).on_conflict_do_nothing(index_elements=["id"]).returning(requests.c.id)

    keys = [requests.c[name] for name in KEYS]
    added = (
        select(*keys, *(func.sum(amount).label(name) for name, amount in SUMS.items()))
        .where(requests.c.id.in_(bindparam("ids", expanding=True)))
        .group_by(*keys)
        .order_by(*keys)  # two gateways that lock the same hours lock them in the same order
    )
    hours = insert(usage_hourly).from_select([*KEYS, *SUMS], added)
    total = {name: usage_hourly.c[name] + hours.excluded[name] for name in SUMS}
    return new_rows, hours.on_conflict_do_update(index_elements=KEYS, set_=total)
