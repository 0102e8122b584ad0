"""Uploads to registries that redirect, forget, break and refuse."""

from __future__ import annotations

import asyncio
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from registries import MB, Asked, digest_of, install, pushed, reply, scripted, steps, transfers

from engines.errors import RegistryDenied, RegistryError
from engines.store.blobs import StoreUnreadable, blob_path
from engines.store.manifests import manifest_path
from engines.store.names import ModelName

DATA = os.urandom(2_500_000)


@dataclass
class Storehouse:
    """A registry for one upload after another.

    Attributes:
        elsewhere: where chunks are redirected to, `host:port`, if they are.
        breaks: how many next chunks are answered with 503. knows: whether it says how much it has of a broken upload.
        blobs, parts: what it has been sent whole, and elsewhere.
    """

    elsewhere: str = ""
    breaks: int = 0
    knows: bool = False
    blobs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[int, bytes] = field(default_factory=dict)
    etags: list[str] = field(default_factory=list)
    manifest: tuple[bytes, str] = (b"", "")
    num_sessions: int = 0
    arrived: bytearray = field(default_factory=bytearray)

    async def answer(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        """Answer as Ollama's registry does."""
        url = urlsplit(asked.target)
        if asked.method == "HEAD":
            return reply(writer, 200 if url.path.rpartition("/")[2] in self.blobs else 404)
        if asked.method == "POST":
            self.num_sessions += 1
            self.arrived.clear()
            return reply(writer, 202, location=f"/upload/{self.num_sessions}?state=0")
        if asked.method == "PATCH":
            return self._patch(asked, writer)
        if asked.method == "GET":
            if not self.knows:
                return reply(writer, 404)
            return reply(
                writer, 204, range=f"0-{len(self.arrived) - 1}", location=f"/upload/again?at={len(self.arrived)}"
            )
        if "/manifests/" in url.path:
            self.manifest = (asked.body, asked.headers["content-type"])
            return reply(writer, 201)
        query = parse_qs(url.query)
        whole = b"".join(self.parts[start] for start in sorted(self.parts)) if self.parts else bytes(self.arrived)
        self.etags.append(query["etag"][0])
        if digest_of(whole) != query["digest"][0]:
            return reply(writer, 400, b"digest invalid")
        self.blobs[query["digest"][0]] = whole
        self.parts.clear()
        return reply(writer, 201)

    def _patch(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        assert asked.headers["x-redirect-uploads"] == "1"
        start, _, stop = asked.headers["content-range"].partition("-")
        assert int(stop) - int(start) + 1 == len(asked.body)
        if self.elsewhere:
            where = f"http://{self.elsewhere}/part/{start}"
            return reply(writer, 307, location=where, docker_upload_location=f"/upload/1?state={stop}")
        if self.breaks:
            self.breaks -= 1
            self.arrived += asked.body[:100_000]
            return reply(writer, 503)
        assert int(start) == len(self.arrived)
        self.arrived += asked.body
        return reply(writer, 202, location=f"/upload/1?state={stop}")


async def push_to(root: Path, house: Storehouse) -> list[str]:
    """Push a model of `DATA`; what was done."""
    async with scripted(house.answer) as server, transfers(root) as mine:
        name = ModelName(server.address, "library", "m", "latest")
        install(root / "models", name, DATA)
        said = await pushed(mine, name)
        assert house.blobs[digest_of(DATA)] == DATA
        assert house.manifest == (
            manifest_path(root / "models", name).read_bytes(),
            "application/vnd.docker.distribution.manifest.v2+json",
        )
    return steps(said)


async def test_chunks_go_where_the_registry_redirects_them(tmp_path: Path) -> None:
    """The storage gets the chunks without credentials, and the registry the hash of their hashes."""
    house = Storehouse()

    async def store(asked: Asked, writer: asyncio.StreamWriter) -> None:
        assert asked.method == "PUT"
        assert "authorization" not in asked.headers
        house.parts[int(asked.target.rpartition("/")[2])] = asked.body
        reply(writer, 200)

    async with scripted(store) as storage:
        house.elsewhere = storage.address
        assert (await push_to(tmp_path, house))[-1] == "success"
    md5s = [hashlib.md5(DATA[start : start + MB], usedforsecurity=False).digest() for start in range(0, len(DATA), MB)]
    assert house.etags[0] == f"{hashlib.md5(b''.join(md5s), usedforsecurity=False).hexdigest()}-3"


async def test_a_redirected_chunk_is_tried_again(tmp_path: Path) -> None:
    """A storage that fails twice costs two tries."""
    house = Storehouse()
    failures = [503, 500]

    async def store(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if failures:
            return reply(writer, failures.pop())
        house.parts[int(asked.target.rpartition("/")[2])] = asked.body
        return reply(writer, 200)

    async with scripted(store) as storage:
        house.elsewhere = storage.address
        assert (await push_to(tmp_path, house))[-1] == "success"


async def test_an_upload_goes_on_where_the_registry_says(tmp_path: Path) -> None:
    """What arrived of a broken chunk is not sent again when the registry knows how much that is."""
    house = Storehouse(breaks=3, knows=True)
    assert (await push_to(tmp_path, house))[-1] == "success"
    assert house.num_sessions == 2  # the weights' and the config's


async def test_an_upload_that_is_forgotten_starts_again(tmp_path: Path) -> None:
    """A registry that cannot say what it has gets everything in a new session."""
    house = Storehouse(breaks=2)
    assert (await push_to(tmp_path, house))[-1] == "success"
    assert house.num_sessions == 4


async def test_a_registry_that_never_takes_a_chunk_is_given_up(tmp_path: Path) -> None:
    """After six tries."""
    with pytest.raises(RegistryError, match="max retries exceeded: 503"):
        await push_to(tmp_path, Storehouse(breaks=100))


@pytest.mark.parametrize(("status", "kind"), [(401, RegistryDenied), (400, RegistryError), (413, RegistryError)])
async def test_refusals_are_not_tried_again(tmp_path: Path, status: int, kind: type[Exception]) -> None:
    """A registry that says no is believed."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        reply(writer, 404 if asked.method == "HEAD" else status)

    async with scripted(answer) as server, transfers(tmp_path) as mine:
        name = ModelName(server.address, "library", "m", "latest")
        install(tmp_path / "models", name, DATA)
        with pytest.raises(kind):
            await pushed(mine, name)
        assert len(server.targets("POST")) == 1


async def test_a_blob_that_is_missing_here_is_told(tmp_path: Path) -> None:
    """With its path, and the registry is left without a manifest."""
    house = Storehouse()
    async with scripted(house.answer) as server, transfers(tmp_path) as mine:
        name = ModelName(server.address, "library", "m", "latest")
        install(tmp_path / "models", name, DATA)
        blob_path(tmp_path / "models", digest_of(DATA)).unlink()
        with pytest.raises(StoreUnreadable, match="No such file"):
            await pushed(mine, name)
    assert house.manifest == (b"", "")


async def test_leaving_ends_a_push(tmp_path: Path) -> None:
    """Whoever stops iterating hangs up on the registry."""
    hung_up = asyncio.Event()

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.method != "HEAD":
            try:
                await asyncio.Event().wait()
            finally:
                hung_up.set()
        reply(writer, 404)

    async with scripted(answer) as server, transfers(tmp_path) as mine:
        name = ModelName(server.address, "library", "m", "latest")
        install(tmp_path / "models", name, DATA)
        push = mine.push(name, insecure=True)
        await anext(push)
        assert (await anext(push)).status.startswith("pushing ")
        await push.aclose()
    assert hung_up.is_set()
