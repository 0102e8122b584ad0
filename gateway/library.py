"""The models on disk as the dialects may change them: made, copied, deleted, and their blobs stored.

What `compat.services.Library` promises ends here. Every call to the disk runs in a thread, and nothing here knows of
requests for inference. Its surprise: only Ollama's directory is ever changed; models of other stores are shown and
served, and whoever wants to change one is told whose it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from engines.errors import AccessDenied, BadRequest, ModelNotFound
from engines.library import CreateRequest, Progress
from engines.store.blob_writer import BlobWriter
from engines.store.blobs import blob_path
from engines.store.catalog import Catalog
from engines.store.create import Creator, check_request
from engines.store.disk import Disk
from engines.store.names import parse_name, without_local
from engines.store.transfer import SUCCESS, Transfers
from engines.store.writer import StoreWriter
from gateway.jobs import Job, Jobs

WRITE_BYTES = 1 << 20
"""How much of an upload is gathered in memory before it goes to the disk."""


class DigestMismatch(BadRequest):
    """What was uploaded is another blob than was said."""

    code = "digest_mismatch"

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f'digest mismatch, expected "{expected}", got "{got}"')


class Library:
    """See `compat.services.Library`."""

    def __init__(
        self,
        writer: StoreWriter,
        catalog: Catalog,
        creator: Creator,
        jobs: Jobs,
        transfers: Transfers,
        disk: Disk,
    ) -> None:
        self._writer = writer
        self._catalog = catalog
        self._creator = creator
        self._jobs = jobs
        self._transfers = transfers
        self._disk = disk

    async def create(self, request: CreateRequest) -> AsyncIterator[Progress]:
        """Make a model or replace it; a base that is not there is pulled first."""
        check_request(request)
        if request.base and not await self._disk.run(self._creator.has_base, request):
            await self._explain_foreign(request.base, "built upon")
            return self._pull_and_create(request)
        return self._start(request)

    def _start(self, request: CreateRequest) -> Job:
        return self._jobs.start(lambda report: self._creator.run(request, report))

    async def _pull_and_create(self, request: CreateRequest) -> AsyncIterator[Progress]:
        """Both as one; clients would take the pull's success for the end."""
        async with aclosing(self._transfers.pull(parse_name(without_local(request.base)))) as pulling:
            async for step in pulling:
                if step != SUCCESS:
                    yield step
        async with aclosing(self._start(request)) as creating:
            async for step in creating:
                yield step

    async def pull(self, name: str, *, insecure: bool = False, token: str = "") -> AsyncIterator[Progress]:
        """Fetch a model, or what is new in it."""
        parsed = parse_name(without_local(name))
        return self._transfers.pull(parsed, insecure=insecure or _asks_for_http(name), token=token)

    async def push(self, name: str, *, insecure: bool = False, token: str = "") -> AsyncIterator[Progress]:
        """Send a model to its registry."""
        parsed = parse_name(name)
        return self._transfers.push(parsed, insecure=insecure or _asks_for_http(name), token=token)

    async def copy(self, source: str, destination: str) -> None:
        """Give a model a second name."""
        names = parse_name(source), parse_name(destination)
        try:
            await self._disk.run(self._writer.copy, *names)
        except ModelNotFound:
            await self._explain_foreign(source, "copied")
            raise ModelNotFound(source) from None

    async def delete(self, name: str) -> None:
        """Delete a model and what only it needed."""
        parsed = parse_name(without_local(name))
        try:
            await self._disk.run(self._writer.delete, parsed)
        except ModelNotFound:
            await self._explain_foreign(name, "deleted")
            raise ModelNotFound(name) from None

    async def _explain_foreign(self, name: str, verb: str) -> None:
        """Raise AccessDenied for a model that is in a store which we only read."""
        owner = await self._disk.run(self._catalog.owner_of, name)
        if owner is not None:
            raise AccessDenied(f"model '{name}' cannot be {verb}: it belongs to {owner}, which is only read here")

    async def has_blob(self, digest: str) -> bool:
        """Whether a blob is there."""
        return await self._disk.run(blob_path(self._writer.models, _normal(digest)).is_file)

    async def store_blob(self, digest: str, chunks: AsyncIterator[bytes]) -> bool:
        """Store a blob, unless it is there already; whether it was new."""
        expected = _normal(digest)
        path = blob_path(self._writer.models, expected)
        with self._writer.holds.holding() as hold:
            hold.add(expected)
            is_new = not await self._disk.run(path.is_file)
            if is_new:
                await self._write_blob(digest, chunks)
            self._writer.holds.promise(expected)  # to whoever makes a model of it soon
        return is_new

    async def _write_blob(self, digest: str, chunks: AsyncIterator[bytes]) -> None:
        writer = BlobWriter(self._writer.models)
        try:
            await self._disk.run(writer.open)
            await self._receive(writer, chunks)
            if writer.digest != digest:
                raise DigestMismatch(digest, writer.digest)
            await self._disk.run(writer.publish)
        finally:
            await asyncio.shield(self._disk.run(writer.close))

    async def _receive(self, writer: BlobWriter, chunks: AsyncIterator[bytes]) -> None:
        gathered = bytearray()
        async for chunk in chunks:
            gathered += chunk
            if len(gathered) >= WRITE_BYTES:
                await self._disk.run(writer.write, gathered)
                gathered = bytearray()
        await self._disk.run(writer.write, gathered)


def _asks_for_http(name: str) -> bool:
    """Whether a name has the scheme that allows a registry without https."""
    return name.strip().lower().startswith("http://")


def _normal(digest: str) -> str:
    """A digest as the store writes it; Ollama also takes a hyphen and capitals, and BadRequest comes of the rest."""
    return digest.replace("-", ":", 1).lower()
