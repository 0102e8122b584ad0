"""Registries for tests: Debian's real one, a wire that breaks, and a server that answers whatever a test says.

`docker-registry` is Debian's package of the reference registry (distribution/distribution).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engines.library import Progress
from engines.store.blobs import write_blob
from engines.store.disk import Disk
from engines.store.download import Pace
from engines.store.gojson import encode_json
from engines.store.manifests import CONFIG_TYPE, LAYER_TYPE, Layer, Manifest, write_manifest
from engines.store.names import ModelName
from engines.store.transfer import Access, Transfers
from engines.store.writer import StoreWriter

MB = 1_000_000
REGISTRY = shutil.which("docker-registry")
START_S = 20.0
PASSWORD = "s3cret"
BCRYPT = "$2b$04$7sNST4rpI9MDql7YhSolZuygY3Ha69MO/JGeSjYcaY.7wnH7dC3la"
"""The password as the registry's user file wants it."""

needs_registry = pytest.mark.skipif(REGISTRY is None, reason="Debian's package docker-registry is not installed")


@contextmanager
def docker_registry(root: Path, **auth: dict[str, str]) -> Iterator[str]:
    """A registry of its own on a free port; `host:port` is yielded. `auth` is that section of its configuration."""
    assert REGISTRY, "Debian's package docker-registry is not installed"
    port = free_port()
    config: dict[str, Any] = {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(root / "registry")}, "delete": {"enabled": True}},
        "http": {"addr": f"127.0.0.1:{port}", "secret": "not very"},
    }
    if auth:
        config["auth"] = auth
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    with (root / "registry.log").open("wb") as log:
        process = subprocess.Popen(
            [REGISTRY, "serve", str(root / "config.yml")],
            stdout=log,
            stderr=log,
            env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((root / "registry.log").read_text()) from None
                time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def htpasswd(path: Path, username: str) -> dict[str, str]:
    """A registry's `auth.htpasswd` for one user with `PASSWORD`."""
    path.write_text(f"{username}:{BCRYPT}\n")
    return {"realm": "test", "path": str(path)}


@asynccontextmanager
async def transfers(
    root: Path, *, docker_config: Path | None = None, mirrors: dict[str, str] | None = None, keeps_unused: bool = False
) -> AsyncIterator[Transfers]:
    """Pulls and pushes of the store below `root`, in small parts and without patience."""
    access = Access(
        "ollama/0.33.0 (amd64 linux)", docker_config or root / "none.json", root / "id_ed25519", mirrors or {}
    )
    writer, disk = StoreWriter(root / "models", keeps_unused=keeps_unused), Disk()
    opened = Transfers(writer, access, disk, pace=Pace(min_part_bytes=MB, backoff_s=0.01))
    try:
        yield opened
    finally:
        await opened.close()
        disk.close()


async def pulled(opened: Transfers, name: ModelName, *, insecure: bool = True) -> list[Progress]:
    """A whole pull."""
    return [progress async for progress in opened.pull(name, insecure=insecure)]


async def pushed(opened: Transfers, name: ModelName, *, insecure: bool = True) -> list[Progress]:
    """A whole push."""
    return [progress async for progress in opened.push(name, insecure=insecure)]


def steps(progress: list[Progress]) -> list[str]:
    """What was done, each step once."""
    return list(dict.fromkeys(each.status for each in progress))


def visible(models: Path) -> set[str]:
    """The digests of the blobs that anybody can see."""
    return {path.name.replace("-", ":") for path in (models / "blobs").glob("sha256-*") if len(path.name) == 71}


def leftovers(models: Path) -> list[str]:
    """Files of a download that has not ended."""
    return sorted(path.name for path in (models / "blobs").iterdir() if len(path.name) != 71)


def docker_login(directory: Path, host: str, username: str, password: str) -> Path:
    """The file that `docker login` writes."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "docker.json"
    auth = base64.b64encode(f"{username}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return path


def install(models: Path, name: ModelName, *contents: bytes, kind: str = "model", source: str = "") -> Manifest:
    """Put a model of those layers into a store."""
    config = encode_json({"model_format": "gguf", "model_family": "test", "os": "linux"})
    layers = tuple(
        Layer(f"{LAYER_TYPE}{kind}", write_blob(models, content), len(content), source) for content in contents
    )
    manifest = Manifest(config=Layer(CONFIG_TYPE, write_blob(models, config), len(config)), layers=layers)
    write_manifest(models, name, manifest)
    return manifest


@dataclass
class Wire:
    """A TCP proxy that breaks connections.

    Attributes:
        address: `host:port` to connect to.
        cuts: how many bytes towards the client, or the server, each next connection lets through before it is cut;
            once the list is empty, connections live. num_cut: how many were.
        upwards: bytes towards the server are what counts.
    """

    address: str = ""
    cuts: list[int] = field(default_factory=list)
    num_cut: int = 0
    upwards: bool = False


@asynccontextmanager
async def wire(target: str, *cuts: int, upwards: bool = False) -> AsyncIterator[Wire]:
    """A wire to a registry."""
    host, _, port = target.partition(":")
    state = Wire(cuts=list(cuts), upwards=upwards)
    running: set[asyncio.Task[Any]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        far_reader, far_writer = await asyncio.open_connection(host, int(port))

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter, counted: bool) -> None:
            seen = 0
            while data := await source.read(1 << 14):
                seen += len(data)
                # Only what carries a blob is long enough to be cut.
                if counted and state.cuts and seen > state.cuts[0]:
                    state.cuts.pop(0)
                    state.num_cut += 1
                    writer.transport.abort()
                    far_writer.transport.abort()
                    return
                sink.write(data)
                await sink.drain()
            sink.close()

        try:
            with suppress(OSError, asyncio.CancelledError):
                await asyncio.gather(copy(far_reader, writer, not upwards), copy(reader, far_writer, upwards))
        finally:
            running.discard(task)
            writer.close()
            far_writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    state.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield state
    finally:
        server.close()
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@dataclass
class Asked:
    """One request that a `Script` received; the body is read only as far as its Content-Length says."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


Answering = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Script:
    """A server that a test writes the answers of, byte by byte if it must."""

    address: str = ""
    asked: list[Asked] = field(default_factory=list)

    def targets(self, method: str = "GET") -> list[str]:
        """What was asked for, in order."""
        return [each.target for each in self.asked if each.method == method]


@asynccontextmanager
async def scripted(answer: Answering, tls: ssl.SSLContext | None = None) -> AsyncIterator[Script]:
    """A server that hands every request to `answer`, one a connection."""
    script = Script()
    running: set[asyncio.Task[Any]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                first = await reader.readexactly(1)
                if first == b"\x16":  # a TLS handshake, of which a server without TLS makes nothing
                    return
                head = (first + await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, target, _ = head[0].split(" ", 2)
                headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in head[1:])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                asked = Asked(method, target, headers, body)
                script.asked.append(asked)
                await answer(asked, writer)
                await writer.drain()
        finally:
            running.discard(task)
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 20, ssl=tls)
    script.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield script
    finally:
        server.close()
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def reply(writer: asyncio.StreamWriter, status: int, body: bytes = b"", **headers: str) -> None:
    """Write a whole answer; `content_range="..."` is the header Content-Range."""
    fields = {"content-length": str(len(body)), **{key.replace("_", "-"): value for key, value in headers.items()}}
    head = "".join(f"{key}: {value}\r\n" for key, value in fields.items())
    writer.write(f"HTTP/1.1 {status} x\r\nConnection: close\r\n{head}\r\n".encode() + body)


class Shelf:
    """What a small registry has: one model, by path. `answer` serves it as a registry does, ranges included."""

    def __init__(self, *contents: bytes, media_type: str = f"{LAYER_TYPE}model") -> None:
        config = encode_json({"model_format": "gguf"})
        self.blobs = {digest_of(content): content for content in (*contents, config)}
        layers = [{"mediaType": media_type, "digest": digest_of(c), "size": len(c)} for c in contents]
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
                "config": {"mediaType": CONFIG_TYPE, "digest": digest_of(config), "size": len(config)},
                "layers": layers,
            }
        ).encode()

    async def answer(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        """Answer as a registry does."""
        what, _, which = asked.target.partition("?")[0].rpartition("/")
        if what.endswith("/manifests"):
            reply(writer, 200, self.manifest)
        elif which in self.blobs:
            self.send_blob(asked, writer, self.blobs[which])
        else:
            reply(writer, 404)

    def send_blob(self, asked: Asked, writer: asyncio.StreamWriter, blob: bytes) -> None:
        """A blob, or a part of it."""
        wanted = asked.headers.get("range", "").removeprefix("bytes=")
        if not wanted:
            return reply(writer, 200, blob)
        first, _, last = wanted.partition("-")
        part = blob[int(first) : int(last) + 1]
        return reply(writer, 206, part, content_range=f"bytes {first}-{last}/{len(blob)}")


def digest_of(data: bytes) -> str:
    """A blob's name."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
