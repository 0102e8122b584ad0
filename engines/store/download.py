"""Blobs on their way from a registry: in parts side by side, each shared by however many callers want it.

A download goes on from where an earlier one stopped. Nothing is visible under a blob's name before all of it has
arrived and its digest is right. The manifest's size is the limit, whatever the server says or sends. A caller who
leaves ends the download only if nobody else waits for it; what has arrived stays for the next one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from engines.errors import RegistryError
from engines.library import Progress
from engines.store.blobs import keep_blob
from engines.store.disk import Disk
from engines.store.manifests import Layer
from engines.store.parts import MIN_PART_BYTES, NUM_PARTS, Part, PartialBlob, WrongBlob
from engines.store.registry import Repository

log = logging.getLogger(__name__)

MAX_TRIES = 6
"""Of a part, one after another, none of which brings a single byte."""

MAX_DOWNLOADS = 8
"""At once, whoever they are for; others wait. A part has some MiB in memory."""

WRITE_BYTES = 1 << 20
REPORT_S = 0.06
_LOCK_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Pace:
    """How a blob is divided and how patient a transfer is; tests have less time than users.

    Attributes:
        min_part_bytes: parts are no smaller, unless the blob is. backoff_s: before the first repetition; it doubles.
    """

    min_part_bytes: int = MIN_PART_BYTES
    backoff_s: float = 1.0


class Download:
    """One blob on its way. `Downloads.join` makes it and ends it.

    Attributes:
        num_callers: who wait for it.
    """

    def __init__(
        self, models: Path, layer: Layer, repository: Repository, disk: Disk, pace: Pace, turns: asyncio.Semaphore
    ) -> None:
        self._models = models
        self._layer = layer
        self._repository = repository
        self._disk = disk
        self._pace = pace
        self._blob = PartialBlob(models, layer.digest, layer.size, pace.min_part_bytes)
        self._turns = turns
        self._places = asyncio.Semaphore(NUM_PARTS)
        self._arrived = asyncio.Event()
        self.num_callers = 0
        self.task = asyncio.create_task(self._run())

    async def progress(self) -> AsyncGenerator[Progress, None]:
        """How far it is, every 60 ms and at the end, until everything has arrived.

        Raises:
            RegistryError, StoreNotWritable: it failed.
        """
        arrived = asyncio.ensure_future(self._arrived.wait())
        try:
            while not arrived.done() and not self.task.done():
                await asyncio.wait({arrived, self.task}, timeout=REPORT_S, return_when=asyncio.FIRST_COMPLETED)
                yield self._report()
        finally:
            arrived.cancel()
        if self.task.done():
            self.task.result()

    async def verified(self) -> None:
        """Return once the blob is there. Raises as `progress` does."""
        await asyncio.shield(self.task)

    async def stop(self) -> None:
        """End it, unless it has ended, and wait for that."""
        self.task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await self.task

    def _report(self) -> Progress:
        completed = sum(part.completed for part in self._blob.parts)
        if self._arrived.is_set() or (self.task.done() and not self.task.cancelled() and not self.task.exception()):
            completed = self._layer.size
        return pulling(self._layer, completed)

    async def _run(self) -> None:
        try:
            if await self._lock():
                async with self._turns:
                    await self._go_on()
        finally:
            await self._disk.run(self._blob.close)

    async def _go_on(self) -> None:
        """Complete what an earlier download left, or all of the blob."""
        if await self._disk.run(self._blob.open):
            try:
                return await self._complete()
            except WrongBlob:  # perhaps what was left came from elsewhere
                self._arrived.clear()
                await self._disk.run(self._blob.begin_afresh)
        try:
            return await self._complete()
        except WrongBlob:
            await self._disk.run(self._blob.discard)
            raise

    async def _complete(self) -> None:
        """Fetch what is missing and publish the blob."""
        await self._fetch_all([part for part in self._blob.parts if part.missing])
        self._arrived.set()
        offset = 0
        while offset < self._layer.size:
            offset = await self._disk.run(self._blob.hash_some, offset)
        await self._disk.run(self._blob.publish)
        log.info("pulled %s, %d bytes", self._layer.digest[7:19], self._layer.size)

    async def _lock(self) -> bool:
        """Wait for whoever else is at this blob, in this process or another; False if it is there afterwards."""
        while not await self._disk.run(self._blob.try_lock):  # noqa: ASYNC110  another process sets no event
            await asyncio.sleep(_LOCK_POLL_S)
        if await self._disk.run(keep_blob, self._models, self._layer.digest, self._layer.size):
            await self._disk.run(self._blob.discard)
            return False
        return True

    async def _fetch_all(self, parts: list[Part]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for part in parts:
                    group.create_task(self._fetch(part))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _fetch(self, part: Part) -> None:
        """Fetch a part, trying again for as long as each try brings something or the next one may."""
        num_failures = 0
        async with self._places:
            while part.missing:
                before = part.missing
                try:
                    await self._fetch_once(part)
                except RegistryError as error:
                    num_failures = 1 if part.missing < before else num_failures + 1
                    if not error.transient:
                        raise
                    if num_failures >= MAX_TRIES:
                        raise RegistryError(f"max retries exceeded: {error.message}") from error
                    log.info("%s part %d: %s", self._layer.digest[7:19], part.n, error.message)
                    await asyncio.sleep(self._pace.backoff_s * 2 ** (num_failures - 1))

    async def _fetch_once(self, part: Part) -> None:
        start = part.offset + part.completed
        stop = part.offset + part.size
        waiting: list[bytes] = []
        num_waiting = 0
        try:
            async with aclosing(self._repository.read_blob(self._layer.digest, start, stop)) as chunks:
                async for chunk in chunks:
                    waiting.append(chunk)
                    num_waiting += len(chunk)
                    if num_waiting >= WRITE_BYTES:
                        data, waiting, num_waiting = b"".join(waiting), [], 0
                        await self._disk.run(self._blob.write, part, data)
        finally:
            if waiting:
                await self._disk.run(self._blob.write, part, b"".join(waiting))


class Downloads:
    """The downloads of a house, each shared by everybody who wants the same blob from the same repository."""

    def __init__(self, models: Path, disk: Disk, pace: Pace) -> None:
        self._models = models
        self._disk = disk
        self._pace = pace
        self._turns = asyncio.Semaphore(MAX_DOWNLOADS)
        self._running: dict[tuple[str, str], Download] = {}

    @asynccontextmanager
    async def join(self, repository: Repository, layer: Layer) -> AsyncIterator[Download]:
        """The download of that blob, started if nobody has; it ends when the last caller leaves."""
        key = (repository.address, layer.digest)
        download = self._running.get(key)
        if download is None or download.task.done():
            download = Download(self._models, layer, repository, self._disk, self._pace, self._turns)
            self._running[key] = download
        download.num_callers += 1
        try:
            yield download
        finally:
            download.num_callers -= 1
            if not download.num_callers:
                if self._running.get(key) is download:
                    del self._running[key]
                await download.stop()

    async def close(self) -> None:
        """End every download."""
        for download in list(self._running.values()):
            await download.stop()


def pulling(layer: Layer, completed_bytes: int) -> Progress:
    """How far a blob is, in Ollama's words."""
    return Progress(f"pulling {layer.digest[7:19]}", layer.digest, layer.size, completed_bytes)
