"""`POST /models/create` over a library that says what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette

from compat.model_runner.library import ModelRunnerLibraryRoutes
from compat.model_runner.pull import decode_create, reference, speaks_http
from engines.errors import BadRequest, InvalidModelName, ModelNotFound, NotInRegistry, RegistryDenied, RegistryError
from engines.library import Progress

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
MANIFEST, SUCCESS = Progress("pulling manifest"), Progress("success")
STEPS = [
    MANIFEST,
    Progress("pulling 111111111111", ONE, 2_000_000, 0),
    Progress("pulling 111111111111", ONE, 2_000_000, 2_000_000),
    Progress("pulling 222222222222", TWO, 500, 500),
    Progress("verifying sha256 digest"),
    SUCCESS,
]
CACHED = [MANIFEST, Progress("pulling 111111111111", ONE, 2_000_000, 2_000_000), SUCCESS]


class FakeHouse:
    """Says `steps`, of which an exception is raised; has the model already or not."""

    def __init__(self, *steps: Progress | Exception, has_it: bool = False) -> None:
        self.steps = steps
        self.has_it = has_it
        self.asked: list[tuple[str, str]] = []
        self.left = asyncio.Event()

    async def find(self, name: str) -> None:
        """Whether it is there."""
        if not self.has_it:
            raise ModelNotFound(name)

    async def pull(self, name: str, *, insecure: bool = False, token: str = "") -> AsyncIterator[Progress]:
        """As the real one."""
        self.asked.append((name, token))
        return self._say()

    async def _say(self) -> AsyncIterator[Progress]:
        try:
            for step in self.steps:
                if isinstance(step, Exception):
                    raise step
                yield step
        finally:
            self.left.set()


async def create(house: Any, body: bytes | dict[str, str], accept: str = "application/json") -> httpx.Response:
    """One request."""
    app = Starlette(routes=ModelRunnerLibraryRoutes(house, house, body_limit_bytes=10_000).routes())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await client.post("/models/create", content=data, headers={"Accept": accept})


def lines(response: httpx.Response) -> list[Any]:
    """The lines of JSON."""
    return [json.loads(line) for line in response.text.splitlines()]


async def test_a_pull_is_told_layer_by_layer() -> None:
    """In Docker's form to the field."""
    house = FakeHouse(*STEPS)
    response = await create(house, {"from": "ai/smollm2", "bearer-token": "secret"})
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert lines(response) == [
        {"type": "progress", "message": "Downloaded: 0.00B", "total": 2_000_000,
         "layer": {"id": ONE, "size": 2_000_000, "current": 0}, "mode": "pull"},
        {"type": "progress", "message": "Downloaded: 2.00MB", "total": 2_000_000,
         "layer": {"id": ONE, "size": 2_000_000, "current": 2_000_000}, "mode": "pull"},
        {"type": "progress", "message": "Downloaded: 2.00MB", "total": 2_000_500,
         "layer": {"id": TWO, "size": 500, "current": 500}, "mode": "pull"},
        {"type": "success", "message": "Model pulled successfully", "total": 2_000_500,
         "layer": {"id": "", "size": 0, "current": 0}, "mode": "pull"},
    ]  # fmt: skip
    assert house.asked == [("docker.io/ai/smollm2:latest", "secret")]
    assert house.left.is_set()


async def test_without_asking_for_json_lines_are_escaped() -> None:
    """As text that a page may show."""
    response = await create(FakeHouse(*STEPS), {"from": "ai/smollm2"}, accept="*/*")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    first, *_ = response.text.splitlines()
    assert first.startswith("{&#34;type&#34;:&#34;progress&#34;,")
    assert json.loads(html.unescape(first))["layer"]["id"] == ONE


async def test_a_model_that_is_here_is_one_line() -> None:
    """Unless there was something new in it."""
    response = await create(FakeHouse(*CACHED, has_it=True), {"from": "ai/smollm2"})
    assert [(line["type"], line["message"]) for line in lines(response)] == [("success", "Using cached model: 2.00MB")]
    again = await create(FakeHouse(*STEPS, has_it=True), {"from": "ai/smollm2"})
    assert lines(again)[-1]["message"] == "Model pulled successfully"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (NotInRegistry("pull model manifest: file does not exist"), 404, "Model not found"),
        (RegistryDenied(), 401, "Unauthorized"),
        (RegistryError("the registry is asleep"), 500, "the registry is asleep"),
        (RuntimeError("secret"), 500, "internal server error"),
    ],
)
async def test_what_fails_at_once_has_a_status(error: Exception, status: int, text: str) -> None:
    """And later two last words, for those who read lines and for those who read text."""
    early = await create(FakeHouse(MANIFEST, error), {"from": "ai/smollm2"})
    assert (early.status_code, early.text) == (status, f"{text}\n")
    assert early.headers["content-type"] == "text/plain; charset=utf-8"
    late = await create(FakeHouse(*STEPS[:2], error), {"from": "ai/smollm2"})
    assert late.status_code == 200
    *_, line, rest = late.text.splitlines()
    assert (json.loads(line)["type"], json.loads(line)["message"], rest) == ("error", text, text)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b'{"from": 1}', b"\xff", b"[" * 9000])
async def test_a_body_that_is_none_is_refused(content: bytes) -> None:
    """In Docker's words."""
    response = await create(FakeHouse(), content)
    assert (response.status_code, response.text) == (400, "invalid request body\n")


@pytest.mark.parametrize("name", ["", " ", "a/b/c/d", "ai/sm ollm", "-x", "docker.io/a.b/c"])
async def test_what_is_no_reference_is_refused(name: str) -> None:
    """Before anybody is asked."""
    house = FakeHouse(*STEPS)
    response = await create(house, {"from": name})
    assert (response.status_code, response.text, house.asked) == (400, "Invalid model reference\n", [])


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("smollm2", "docker.io/ai/smollm2:latest"),
        ("AI/SmolLM2:360M-Q4_K_M", "docker.io/ai/smollm2:360M-Q4_K_M"),
        ("me/mine", "docker.io/me/mine:latest"),
        ("registry.lan:5000/team/model:1", "registry.lan:5000/team/model:1"),
        ("localhost:5000/team/model", "localhost:5000/team/model:latest"),
        ("hf.co/User/Repo-GGUF:Q4_K_M", "hf.co/User/Repo-GGUF:Q4_K_M"),
        ("huggingface.co/User/Repo", "huggingface.co/User/Repo:latest"),
    ],
)
def test_references_are_read_as_docker_reads_them(text: str, whole: str) -> None:
    """Hugging Face's keep their case."""
    assert reference(text) == whole


@pytest.mark.parametrize(
    ("host", "may"),
    [("localhost:5000", True), ("127.0.0.1:5000", True), ("box.local", True), ("docker.io", False), ("a.lan", False)],
)
def test_only_registries_nearby_may_do_without_https(host: str, may: bool) -> None:
    """As in Docker."""
    assert speaks_http(f"{host}/team/model:latest") is may


@given(st.binary(), st.text())
def test_anything_is_read_or_refused(data: bytes, text: str) -> None:
    """There is no third way."""
    for read in (lambda: decode_create(data), lambda: reference(text)):
        with contextlib.suppress(BadRequest, InvalidModelName):
            read()
