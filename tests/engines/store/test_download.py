"""Downloads from servers that break, lie, trickle and never end."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path

import pytest
from registries import (
    MB,
    Answering,
    Asked,
    Shelf,
    digest_of,
    leftovers,
    pulled,
    reply,
    scripted,
    transfers,
    visible,
)

from engines.errors import RegistryDenied, RegistryError
from engines.store import download, registry
from engines.store.blobs import StoreNotWritable, blob_path
from engines.store.manifests import manifest_path
from engines.store.names import ModelName
from engines.store.parts import PartialBlob

DATA = os.urandom(3 * MB)


def at(address: str) -> ModelName:
    """A model there."""
    return ModelName(address, "library", "m", "latest")


async def refusal(root: Path, answer: Answering, kind: type[Exception] = RegistryError) -> str:
    """The text with which a pull fails; afterwards nothing is visible."""
    async with scripted(answer) as server, transfers(root) as mine:
        with pytest.raises(kind) as failed:
            await pulled(mine, at(server.address))
        assert visible(root / "models") <= {digest_of(b'{"model_format":"gguf"}\n')}
        assert not manifest_path(root / "models", at(server.address)).exists()
    return str(failed.value)


async def test_a_server_without_ranges_is_good_enough(tmp_path: Path) -> None:
    """An answer with everything serves for a part: what comes before it is passed over."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        asked.headers.pop("range", None)
        await Shelf(DATA).answer(asked, writer)

    async with scripted(answer) as server, transfers(tmp_path) as mine:
        await pulled(mine, at(server.address))
    assert blob_path(tmp_path / "models", digest_of(DATA)).read_bytes() == DATA


async def test_other_bytes_than_promised_never_become_a_blob(tmp_path: Path) -> None:
    """A wrong digest is told with both digests, and nothing of the data is left."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        shelf = Shelf(DATA)
        shelf.blobs[digest_of(DATA)] = DATA[:-1] + b"x"
        await shelf.answer(asked, writer)

    said = await refusal(tmp_path, answer)
    assert said.startswith(f"digest mismatch, file must be downloaded again: want {digest_of(DATA)}, got sha256:")
    assert not any(digest_of(DATA)[7:] in name for name in leftovers(tmp_path / "models"))


async def test_a_blob_without_end_is_read_as_far_as_the_manifest_says(tmp_path: Path) -> None:
    """The manifest's size is the limit for an answer that never ends."""
    sent = 0

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        if "/blobs/" not in asked.target or digest_of(DATA) not in asked.target:
            return await Shelf(DATA).answer(asked, writer)
        writer.write(b"HTTP/1.1 200 x\r\nConnection: close\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            sent += 65536
            await writer.drain()

    assert "digest mismatch" in await refusal(tmp_path, answer)
    assert sent < 40 * MB  # what buffers of the network take beyond three parts


@pytest.mark.parametrize(
    ("declared", "sent"), [(len(DATA), 10), (10, 10), (10**15, 10)], ids=["more", "less", "far more"]
)
async def test_a_content_length_that_lies_is_an_early_end(tmp_path: Path, declared: int, sent: int) -> None:
    """However much was declared, too few bytes are a failure after some tries, not a hang and not a blob."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if digest_of(DATA) not in asked.target:
            return await Shelf(DATA).answer(asked, writer)
        first = asked.headers["range"].removeprefix("bytes=").partition("-")[0]
        head = f"HTTP/1.1 206 x\r\nConnection: close\r\nContent-Range: bytes {first}-{first}/1\r\n"
        # The same ten bytes each time: nothing new after the first.
        writer.write(f"{head}Content-Length: {declared}\r\n\r\n".encode() + (b"" if int(first) else b"x" * sent))
        return None

    assert "max retries exceeded" in await refusal(tmp_path, answer)


async def test_a_server_that_falls_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stall is a failed try, and six of them end the pull."""
    monkeypatch.setattr(registry, "STALL_S", 0.1)

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if digest_of(DATA) not in asked.target:
            return await Shelf(DATA).answer(asked, writer)
        writer.write(b"HTTP/1.1 200 x\r\nContent-Length: 100\r\n\r\n")
        await writer.drain()
        await asyncio.Event().wait()
        return None

    assert "max retries exceeded" in await refusal(tmp_path, answer)


async def test_a_manifest_that_trickles_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small exchange has a limit as a whole."""
    monkeypatch.setattr(registry, "SMALL_S", 0.3)

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 x\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    assert "took longer than 0.3 s" in await refusal(tmp_path, answer)


async def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    """100 MB where a manifest should be are refused after a few."""
    sent = 0

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 x\r\nContent-Length: 100000000\r\n\r\n")
        while sent < 100 * MB:
            writer.write(b" " * MB)
            sent += MB
            await writer.drain()

    assert "sent more than" in await refusal(tmp_path, answer)
    assert sent < 30 * MB


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (b"<html>", "is damaged"),
        (b"[]", "is damaged"),
        (b'{"schemaVersion":2,"manifests":[]}', "is damaged"),
        (b'{"config":{"mediaType":"x","digest":"sha256:../../etc/passwd","size":1},"layers":[]}', "is damaged"),
        (b'{"config":{"mediaType":"x","digest":"sha256:' + b"0" * 64 + b'","size":-1},"layers":[]}', "is damaged"),
        (b"[" * 100_000, "is damaged"),
    ],
)
async def test_what_is_no_manifest_is_told(tmp_path: Path, manifest: bytes, said: str) -> None:
    """Nothing a registry sends in a manifest's place does more than fail the pull."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        reply(writer, 200, manifest)

    text = await refusal(tmp_path, answer)
    assert text.startswith("pull model manifest: ")
    assert said in text


@pytest.mark.parametrize(
    ("media_type", "said"),
    [
        ("application/vnd.oci.image.layer.v1.tar+gzip", "is a container image and not a model"),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", "is a container image and not a model"),
        ("application/vnd.ollama.image.tensor", "this model requires MLX support"),
    ],
)
async def test_what_cannot_run_is_not_fetched(tmp_path: Path, media_type: str, said: str) -> None:
    """Container images and models for other engines are refused before gigabytes of them arrive."""
    assert said in await refusal(tmp_path, Shelf(b"x", media_type=media_type).answer)


async def test_errors_of_the_registry_are_passed_on_in_ollamas_form(tmp_path: Path) -> None:
    """Status and text, of which no more than a screenful."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        reply(writer, 418, b"short and stout " * 1000)

    said = await refusal(tmp_path, answer)
    assert said.startswith("pull model manifest: 418: short and stout")
    assert len(said) < 1100


async def test_a_model_too_large_for_the_disk_is_refused_at_once(tmp_path: Path) -> None:
    """Nothing is fetched of what will not fit, and the text has both numbers."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        shelf = Shelf(b"x")
        reply(writer, 200, shelf.manifest.replace(b'"size": 1}', b'"size": 200000000000000}'))

    assert "200000.0 GB are to be stored in" in await refusal(tmp_path, answer, StoreNotWritable)


async def test_a_disk_that_fills_up_ends_the_pull_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room is an error of its own, not tried again, and the next pull goes on."""
    written = 0
    write = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal written
        if written > 1_500_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += len(data)
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    said = await refusal(tmp_path, Shelf(DATA).answer, StoreNotWritable)
    assert said.endswith("No space left on device")
    monkeypatch.setattr(os, "pwrite", write)
    async with scripted(Shelf(DATA).answer) as server, transfers(tmp_path) as mine:
        again = await pulled(mine, at(server.address))
    assert next(each for each in again if each.completed_bytes).completed_bytes >= MB
    assert blob_path(tmp_path / "models", digest_of(DATA)).read_bytes() == DATA


async def test_credentials_do_not_follow_a_redirect_to_another_host(tmp_path: Path) -> None:
    """The storage that a registry redirects to never sees the token, and gets the range."""
    shelf = Shelf(DATA)

    async def store(asked: Asked, writer: asyncio.StreamWriter) -> None:
        shelf.send_blob(asked, writer, shelf.blobs[asked.target.rpartition("/")[2]])

    async with scripted(store) as storage, transfers(tmp_path) as mine:

        async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
            if asked.headers.get("authorization") != "Bearer letmein":
                return reply(writer, 401, www_authenticate='Bearer realm="https://elsewhere.invalid/"')
            if "/blobs/" in asked.target:
                return reply(writer, 307, location=f"http://{storage.address}/{asked.target.rpartition('/')[2]}")
            return await shelf.answer(asked, writer)

        async with scripted(answer) as server:
            said = [each async for each in mine.pull(at(server.address), insecure=True, token="letmein")]
    assert said[-1].status == "success"
    assert all("authorization" not in asked.headers for asked in storage.asked)
    assert all("range" in asked.headers for asked in storage.asked)


async def test_redirects_in_a_circle_end(tmp_path: Path) -> None:
    """Ten redirects are followed and no more."""
    num_asked = 0

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal num_asked
        num_asked += 1
        reply(writer, 302, location=asked.target)

    assert "maximum redirects exceeded (10)" in await refusal(tmp_path, answer)
    assert num_asked == 11


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/x", "file:///etc/passwd"])
async def test_redirects_to_nowhere_are_refused(tmp_path: Path, location: str) -> None:
    """Only http and https are followed."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        reply(writer, 302, location=location)

    assert "where we do not go" in await refusal(tmp_path, answer)


async def test_cookies_are_not_kept(tmp_path: Path) -> None:
    """What one registry sets, no other is told, and nothing piles up."""
    shelf = Shelf(DATA)

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        assert "cookie" not in asked.headers
        if "/manifests/" in asked.target:
            return reply(writer, 200, shelf.manifest, set_cookie="a=b; Path=/")
        return await shelf.answer(asked, writer)

    async with scripted(answer) as server, transfers(tmp_path) as mine:
        await pulled(mine, at(server.address))


async def test_requests_name_ollama(tmp_path: Path) -> None:
    """Registries look for its name; they are asked for both kinds of manifest, uncompressed."""
    async with scripted(Shelf(DATA).answer) as server, transfers(tmp_path) as mine:
        await pulled(mine, at(server.address))
    first = next(asked for asked in server.asked if asked.method == "GET")
    assert first.headers["user-agent"].startswith("ollama/")
    assert first.headers["accept"].startswith("application/vnd.docker.distribution.manifest.v2+json")
    assert first.headers["accept-encoding"] == "identity"


async def test_a_second_refusal_is_final(tmp_path: Path) -> None:
    """Whoever is not let in with a fresh answer is not let in."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.target.startswith("/token"):
            return reply(writer, 200, b'{"token":"t"}')
        return reply(writer, 401, www_authenticate=f'Bearer realm="http://{asked.headers["host"]}/token"')

    said = await refusal(tmp_path, answer, RegistryDenied)
    assert said == "pull model manifest: unauthorized: access denied"


@pytest.mark.parametrize(
    "notes",
    [
        [b"{"],
        [b""],
        [b'{"N":0,"Offset":0,"Size":10,"Completed":10}'],
        [b'{"N":0,"Offset":0,"Size":3000000,"Completed":3000001}'],
        [b'{"N":0,"Offset":0,"Size":1500000,"Completed":0}', b'{"N":1,"Offset":1400000,"Size":1600000,"Completed":0}'],
        [b'{"N":1,"Offset":0,"Size":3000000,"Completed":3000000}'],
        [b'{"N":0,"Offset":-1,"Size":3000001,"Completed":5}'],
    ],
)
async def test_damaged_notes_cost_a_download_and_no_more(tmp_path: Path, notes: list[bytes]) -> None:
    """What an unfinished download says of itself is believed only if it makes sense."""
    blobs = tmp_path / "models" / "blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{digest_of(DATA).replace(':', '-')}-partial"
    partial.write_bytes(bytes(len(DATA)))
    for n, note in enumerate(notes):
        partial.with_name(f"{partial.name}-{n}").write_bytes(note)
    async with scripted(Shelf(DATA).answer) as server, transfers(tmp_path) as mine:
        await pulled(mine, at(server.address))
    assert blob_path(tmp_path / "models", digest_of(DATA)).read_bytes() == DATA
    assert leftovers(tmp_path / "models") == []


async def test_downloads_beyond_the_limit_wait_for_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many models are pulled at once, all arrive."""
    monkeypatch.setattr(download, "MAX_DOWNLOADS", 2)
    num_open = most_open = 0

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal num_open, most_open
        num_open += "/blobs/" in asked.target
        most_open = max(most_open, num_open)
        await asyncio.sleep(0.02)
        await Shelf(asked.target.split("/")[3].encode()).answer(asked, writer)
        num_open -= "/blobs/" in asked.target

    async with scripted(answer) as server, transfers(tmp_path) as mine:
        names = [ModelName(server.address, "library", f"m{number}", "latest") for number in range(6)]
        ends = await asyncio.gather(*(pulled(mine, name) for name in names))
    assert [end[-1].status for end in ends] == ["success"] * 6
    assert most_open == 2


async def test_what_somebody_else_left_does_not_spoil_a_pull(tmp_path: Path) -> None:
    """Where the beginning of a blob turns out to be another's, it is fetched again, once, from the start."""
    blobs = tmp_path / "models" / "blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{digest_of(DATA).replace(':', '-')}-partial"
    partial.write_bytes(b"x" * len(DATA))
    note = {"N": 0, "Offset": 0, "Size": len(DATA), "Completed": MB}
    partial.with_name(f"{partial.name}-0").write_text(json.dumps(note))
    async with scripted(Shelf(DATA).answer) as server, transfers(tmp_path) as mine:
        await pulled(mine, at(server.address))
    assert blob_path(tmp_path / "models", digest_of(DATA)).read_bytes() == DATA


def test_notes_without_their_file_say_nothing(tmp_path: Path) -> None:
    """After a kill between publishing and tidying, a blob that is deleted later is fetched from the start."""
    blob = PartialBlob(tmp_path, digest_of(DATA), len(DATA))
    assert blob.try_lock()
    blob.open()
    blob.write(blob.parts[0], DATA)
    blob.close()
    partial = blob_path(tmp_path, digest_of(DATA)).with_name(f"sha256-{digest_of(DATA)[7:]}-partial")
    assert json.loads(partial.with_name(f"{partial.name}-0").read_text())["Completed"] == len(DATA)
    partial.unlink()
    again = PartialBlob(tmp_path, digest_of(DATA), len(DATA))
    assert again.try_lock()
    again.open()
    assert again.parts[0].completed == 0
    again.close()


def test_a_blob_of_no_bytes_has_no_parts(tmp_path: Path) -> None:
    """The empty blob is published like any other."""
    blob = PartialBlob(tmp_path, digest_of(b""), 0)
    assert blob.try_lock()
    blob.open()
    blob.publish()
    blob.close()
    assert blob_path(tmp_path, digest_of(b"")).read_bytes() == b""


def test_large_blobs_are_divided_as_ollama_divides_them(tmp_path: Path) -> None:
    """Sixteen parts between 100 MB and 1000 MB (server/download.go)."""
    for size, expected in ((50 * MB, 1), (250 * MB, 3), (4000 * MB, 16), (40_000 * MB, 40)):
        blob = PartialBlob(tmp_path, digest_of(str(size).encode()), size)
        assert blob.try_lock()
        blob.open()
        assert len(blob.parts) == expected
        assert sum(part.size for part in blob.parts) == size
        blob.discard()
        blob.close()
