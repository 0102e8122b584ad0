"""`/api/pull` and `/api/push` over a library that says what it is told to."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from ollama_fakes import BODY_LIMIT_BYTES, Server
from starlette.applications import Starlette

from compat.ollama.transfers import TransferRoutes
from engines.errors import InvalidModelName, RegistryDenied, RegistryError
from engines.library import Progress

DIGEST = "sha256:" + "8" * 64
STEPS = [
    Progress("pulling manifest"),
    Progress("pulling 888888888888", DIGEST, 100, 0),
    Progress("pulling 888888888888", DIGEST, 100, 100),
    Progress("success"),
]


class FakeLibrary:
    """Says `steps`, of which an exception is raised and an event waited for.

    Attributes:
        asked: what was asked for. left: set once an iterator has been closed.
    """

    def __init__(self, *steps: Progress | Exception | asyncio.Event) -> None:
        self.steps = steps
        self.asked: list[tuple[str, str, bool]] = []
        self.left = asyncio.Event()

    async def pull(self, name: str, *, insecure: bool = False, token: str = "") -> AsyncIterator[Progress]:
        """As the real one."""
        if not name:
            raise InvalidModelName(name)
        self.asked.append(("pull", name, insecure))
        return self._say()

    async def push(self, name: str, *, insecure: bool = False, token: str = "") -> AsyncIterator[Progress]:
        """As the real one."""
        self.asked.append(("push", name, insecure))
        return self._say()

    async def _say(self) -> AsyncIterator[Progress]:
        try:
            for step in self.steps:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
        finally:
            self.left.set()


def app(library: Any) -> Starlette:
    """The routes alone."""
    return Starlette(routes=TransferRoutes(library, body_limit_bytes=BODY_LIMIT_BYTES).routes())


async def ask(library: Any, path: str, body: Any) -> httpx.Response:
    """A whole answer."""
    transport = httpx.ASGITransport(app(library))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, content=body if isinstance(body, bytes) else json.dumps(body))


@pytest.mark.parametrize("path", ["/api/pull", "/api/push"])
async def test_progress_is_an_object_a_line(path: str) -> None:
    """Without what is zero or empty, as Ollama's Go writes it (section 7.1)."""
    response = await ask(FakeLibrary(*STEPS), path, {"model": "m"})
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.content.splitlines() == [
        b'{"status":"pulling manifest"}',
        b'{"status":"pulling 888888888888","digest":"%s","total":100}' % DIGEST.encode(),
        b'{"status":"pulling 888888888888","digest":"%s","total":100,"completed":100}' % DIGEST.encode(),
        b'{"status":"success"}',
    ]


@pytest.mark.parametrize("path", ["/api/pull", "/api/push"])
async def test_without_a_stream_only_the_last_step_is_told(path: str) -> None:
    """With a content type that has no charset, which is Ollama's here."""
    response = await ask(FakeLibrary(*STEPS), path, {"name": "m", "stream": False, "model": ""})
    assert (response.status_code, response.content) == (200, b'{"status":"success"}')
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("insecure", [True, False, None])
async def test_what_was_asked_is_passed_on(insecure: bool | None) -> None:
    """`model` wins over `name`; users and passwords are ignored."""
    library = FakeLibrary(*STEPS)
    await ask(library, "/api/pull", {"model": "m", "name": "n", "insecure": insecure, "username": "u", "password": 1})
    assert library.asked == [("pull", "m", bool(insecure))]


async def test_a_failure_on_the_way_is_the_last_line() -> None:
    """The status is sent by then."""
    library = FakeLibrary(STEPS[0], RegistryError("pull model manifest: file does not exist"))
    response = await ask(library, "/api/pull", {"model": "m"})
    assert response.status_code == 200
    assert response.content.splitlines()[-1] == b'{"error":"pull model manifest: file does not exist"}'


async def test_a_failure_without_a_stream_has_status_500() -> None:
    """Ollama's status for whatever fails on the way."""
    library = FakeLibrary(STEPS[0], RegistryDenied())
    response = await ask(library, "/api/push", {"model": "m", "stream": False})
    assert (response.status_code, response.json()) == (500, {"error": "unauthorized: access denied"})


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/api/pull", b"", 400, "missing request body"),
        ("/api/pull", {}, 400, "invalid model name"),
        ("/api/push", {}, 400, "model is required"),
        ("/api/pull", {"model": "big:cloud"}, 403, "ollama cloud is disabled: remote model is unavailable"),
        (
            "/api/pull",
            {"model": 1},
            400,
            "json: cannot unmarshal number into Go struct field PullRequest.model of type string",
        ),
    ],
)
async def test_what_cannot_be_asked_has_a_status_of_its_own(path: str, body: Any, status: int, error: str) -> None:
    """Before anything is done (section 6)."""
    response = await ask(FakeLibrary(*STEPS), path, body)
    assert (response.status_code, response.json()) == (status, {"error": error})


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_one_caller_less(stream: bool) -> None:
    """The iterator is closed, in whichever form the answer was to come."""
    library = FakeLibrary(STEPS[0], asyncio.Event())
    server = Server(app(library))
    running = asyncio.create_task(server.serve())
    await server.ready.wait()
    async with httpx.AsyncClient(timeout=0.3) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(f"{server.url}/api/pull", json={"model": "m", "stream": stream})
    await asyncio.wait_for(library.left.wait(), 5)
    server.should_exit = True
    await running
