"""Blobs on their way to a registry: chunk by chunk, on from where the registry says after a broken connection.

A registry that redirects chunks to its storage gets them there side by side. Registries that append what they are sent
may keep half a chunk when a connection breaks; they are asked how much they have, and when they cannot say, the blob is
sent from the beginning (Ollama would repeat the chunk and spoil the blob).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from pathlib import Path

import httpx

from engines.errors import InvalidModelName, RegistryError
from engines.library import Progress
from engines.store.blobs import StoreUnreadable, blob_path
from engines.store.disk import Disk
from engines.store.download import MAX_TRIES, REPORT_S, Pace
from engines.store.manifests import Layer
from engines.store.names import ModelName, parse_name
from engines.store.parts import NUM_PARTS, part_size
from engines.store.registry import Repository

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 20


class Upload:
    """One blob on its way."""

    def __init__(
        self, models: Path, name: ModelName, layer: Layer, repository: Repository, disk: Disk, pace: Pace
    ) -> None:
        self._path = blob_path(models, layer.digest)
        self._layer = layer
        self._source = _mountable(layer, name)
        self._repository = repository
        self._disk = disk
        self._pace = pace
        self._places = asyncio.Semaphore(NUM_PARTS)
        self._sent_bytes: dict[int, int] = {}  # by the offset that a chunk begins at
        self._hashes: dict[int, bytes] = {}
        self._descriptor = -1

    async def progress(self) -> AsyncGenerator[Progress, None]:
        """Send the blob, unless the registry has it; how far that is, every 60 ms and at the end.

        Whoever stops iterating ends it. Raises RegistryDenied, RegistryError, StoreUnreadable.
        """
        sending = asyncio.create_task(self._run())
        try:
            while not sending.done():
                await asyncio.wait({sending}, timeout=REPORT_S)
                if not sending.done():
                    yield self._report(sum(self._sent_bytes.values()))
            sending.result()
            yield self._report(self._layer.size)
        finally:
            sending.cancel()
            await asyncio.wait({sending})

    def _report(self, completed_bytes: int) -> Progress:
        layer = self._layer
        return Progress(f"pushing {layer.digest[7:19]}", layer.digest, layer.size, completed_bytes)

    async def _run(self) -> None:
        if await self._repository.has_blob(self._layer.digest):
            return
        try:
            self._descriptor = await self._disk.run(os.open, self._path, os.O_RDONLY)
        except OSError as error:
            raise StoreUnreadable(f"cannot read {self._path}: {error.strerror}") from error
        try:
            await self._send()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            await self._disk.run(os.close, self._descriptor)

    async def _send(self) -> None:
        url = await self._repository.begin_upload(self._layer.digest, self._source)
        if url is None:
            return
        step = part_size(self._layer.size, self._pace.min_part_bytes)
        offset = num_failures = 0
        async with asyncio.TaskGroup() as elsewhere:
            while offset < self._layer.size:
                stop = min(offset + step, self._layer.size)
                try:
                    sent = await self._repository.send_chunk(url, offset, stop, partial(self._content, offset, stop))
                except RegistryError as error:
                    num_failures += 1
                    await self._back_off(error, num_failures)
                    before = offset
                    url, offset = await self._find_way_on(url)
                    num_failures = 0 if offset > before else num_failures
                    continue
                if sent.redirected:
                    elsewhere.create_task(self._send_elsewhere(sent.redirected, offset, stop))
                url, offset, num_failures = sent.next_url, stop, 0
        await self._finish(url)

    async def _find_way_on(self, url: httpx.URL) -> tuple[httpx.URL, int]:
        """Where to send which byte after a broken chunk."""
        if found := await self._repository.resume_upload(url):
            arrived, url = found
            if arrived <= self._layer.size:
                self._sent_bytes = {0: arrived}
                return url, arrived
        self._sent_bytes = {}
        self._hashes = {}
        fresh = await self._repository.begin_upload(self._layer.digest)
        assert fresh is not None, "only a source makes it superfluous"
        return fresh, 0

    async def _send_elsewhere(self, url: httpx.URL, start: int, stop: int) -> None:
        num_failures = 0
        async with self._places:
            while True:
                try:
                    await self._repository.send_redirected(url, stop - start, partial(self._content, start, stop))
                    return
                except RegistryError as error:
                    num_failures += 1
                    await self._back_off(error, num_failures)

    async def _finish(self, url: httpx.URL) -> None:
        md5s = b"".join(self._hashes[start] for start in sorted(self._hashes))
        etag = f"{hashlib.md5(md5s, usedforsecurity=False).hexdigest()}-{len(self._hashes)}"
        num_failures = 0
        while True:
            try:
                await self._repository.finish_upload(url, self._layer.digest, etag)
                return
            except RegistryError as error:
                if await self._repository.has_blob(self._layer.digest):
                    return  # it was only the answer that got lost
                num_failures += 1
                await self._back_off(error, num_failures)

    async def _back_off(self, error: RegistryError, num_failures: int) -> None:
        """Wait before the next try. Raises the error if there is none to come."""
        if not error.transient:
            raise error
        if num_failures >= MAX_TRIES:
            raise RegistryError(f"max retries exceeded: {error.message}") from error
        log.info("pushing %s: %s", self._layer.digest[7:19], error.message)
        await asyncio.sleep(self._pace.backoff_s * 2 ** (num_failures - 1))

    async def _content(self, start: int, stop: int) -> AsyncIterator[bytes]:
        """A stretch of the blob, counted as it leaves. Raises StoreUnreadable."""
        md5 = hashlib.md5(usedforsecurity=False)
        self._sent_bytes[start] = 0
        offset = start
        while offset < stop:
            try:
                data = await self._disk.run(os.pread, self._descriptor, min(_READ_BYTES, stop - offset), offset)
            except OSError as error:
                raise StoreUnreadable(f"cannot read {self._path}: {error.strerror}") from error
            if not data:
                raise StoreUnreadable(f"{self._path} is shorter than its manifest says")
            md5.update(data)
            yield data
            offset += len(data)
            self._sent_bytes[start] = offset - start
        self._hashes[start] = md5.digest()


def _mountable(layer: Layer, name: ModelName) -> str:
    """The repository of the same registry that the layer says it came from, if any."""
    if not layer.source:
        return ""
    try:
        source = parse_name(layer.source)
    except InvalidModelName:  # a file's name
        return ""
    return f"{source.namespace}/{source.model}" if source.host == name.host else ""
