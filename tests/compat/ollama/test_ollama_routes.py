"""The dialect on a real server, spoken to over plain HTTP."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ollama_fakes import BODY_LIMIT_BYTES, NOW, NOW_NS, FakeServices, app, card, runner, says, serving

from compat.ollama.errors import PROMPT_TOO_LONG, QUEUE_FULL
from compat.ollama.routes import OllamaRoutes
from compat.services import Refusal
from engines.errors import GoTemplateError, ModelLoadFailed, ModelNotFound, PromptTooLong, ServerBusy, WorkerCrashed
from engines.events import Event, TextDelta
from engines.options import FURTHER_SAMPLERS
from engines.request import GenerateRequest

CHAT: dict[str, Any] = {"model": "llama3.2", "messages": [{"role": "user", "content": "hi"}]}
GENERATE: dict[str, Any] = {"model": "llama3.2", "prompt": "hi"}
JSON = "application/json; charset=utf-8"


async def ask(services: FakeServices, method: str, path: str, **options: Any) -> httpx.Response:
    """One request to a server of its own."""
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        return await client.request(method, path, **options)


async def post(services: FakeServices, path: str, body: Any) -> httpx.Response:
    """One JSON body."""
    return await ask(services, "POST", path, content=json.dumps(body))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_root_says_that_we_run(method: str) -> None:
    """Ollama's exact text, which clients look for."""
    response = await ask(FakeServices(), method, "/")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert response.text == ("Ollama is running" if method == "GET" else "")
    assert response.headers["content-length"] == "17"


async def test_the_version_is_the_one_we_speak_for() -> None:
    """Dotted integers, no line's end."""
    async with serving(FakeServices()) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.get("/api/version")
        head = await client.head("/api/version")
    assert (response.content, response.headers["content-type"]) == (b'{"version":"0.33.0"}', JSON)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/nothing", 404, "404 page not found"),
        ("POST", "/api/nothing/", 404, "404 page not found"),
        ("GET", "/api/chat", 405, "405 method not allowed"),
        ("POST", "/", 405, "405 method not allowed"),
        ("DELETE", "/api/tags", 405, "405 method not allowed"),
        ("HEAD", "/api/ps", 405, ""),
        ("OPTIONS", "/api/show", 405, "405 method not allowed"),
    ],
)
async def test_unknown_paths_and_methods_have_plain_text(method: str, path: str, status: int, text: str) -> None:
    """With the methods that there are."""
    response = await ask(FakeServices(), method, path)
    assert (response.status_code, response.text) == (status, text)
    assert response.headers["content-type"] == "text/plain"
    assert ("allow" in response.headers) is (status == 405)


@pytest.mark.parametrize(
    ("method", "path", "status", "location"),
    [
        ("GET", "/api/tags/?ts=1&x=%20", 301, "/api/tags?ts=1&x=%20"),
        ("HEAD", "/api/version/", 307, "/api/version"),
        ("POST", "/api/chat/", 307, "/api/chat"),
    ],
)
async def test_a_trailing_slash_redirects(method: str, path: str, status: int, location: str) -> None:
    """Keeping method and body where it matters, and the query always."""
    response = await ask(FakeServices(), method, path)
    assert (response.status_code, response.headers["location"]) == (status, location)


def test_surfaces_are_those_of_inference() -> None:
    """Redirects run nothing."""
    assert OllamaRoutes(FakeServices(), body_limit_bytes=1).surfaces() == {
        "/api/chat": "ollama/completion",
        "/api/generate": "ollama/completion",
        "/api/embed": "ollama/embedding",
        "/api/embeddings": "ollama/embedding",
        "/api/rerank": "rerank",
        "/api/tokenize": "ollama/tokenize",
        "/api/detokenize": "ollama/tokenize",
    }


async def test_tags_list_what_is_installed() -> None:
    """GET and HEAD."""
    services = FakeServices(cards=[card("b:latest"), card("a:latest")])
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        listed = await client.get("/api/tags")
        head = await client.head("/api/tags")
    assert [model["name"] for model in listed.json()["models"]] == ["b:latest", "a:latest"]
    assert (head.status_code, head.content) == (200, b"")


async def test_ps_lists_what_is_loaded() -> None:
    """Latest to leave first, by the dialect's clock."""
    services = FakeServices()
    services.runners = [runner(NOW_NS / 1e9 + 1), runner(NOW_NS / 1e9 + 2, num_ctx=8)]
    listed = (await ask(services, "GET", "/api/ps")).json()["models"]
    assert [model["context_length"] for model in listed] == [8, 4096]


@pytest.mark.parametrize(
    "body", [{"model": "llama3.2"}, {"name": "llama3.2"}, {"model": "", "name": "llama3.2:latest"}]
)
async def test_show_takes_model_or_name(body: dict[str, str]) -> None:
    """`model` when both are there."""
    shown = (await post(FakeServices(), "/api/show", body | {"verbose": True})).json()
    assert shown["model_info"] == {"general.architecture": "llama", "general.parameter_count": 32}
    assert shown["tensors"] == [{"name": "token_embd.weight", "type": "Q8_0", "shape": [8, 4]}]


async def test_copilot_sees_the_name_that_it_asked_for() -> None:
    """In place of the base name in the header."""
    headers = {"User-Agent": "GitHubCopilotChat/0.30"}
    response = await ask(FakeServices(), "POST", "/api/show", json={"model": "llama3.2"}, headers=headers)
    assert response.json()["model_info"]["general.basename"] == "llama3.2"


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/show", {}, 400, "model is required"),
        ("/api/show", {"model": "a b"}, 400, "invalid model name"),
        ("/api/show", {"model": "registry.ollama.ai/library/x"}, 404, "model 'x:latest' not found"),
        ("/api/show", {"model": "x:cloud"}, 403, "ollama cloud is disabled: remote model details are unavailable"),
        ("/api/chat", {}, 400, "model is required"),
        ("/api/chat", {"model": "a b"}, 400, "invalid model name"),
        ("/api/chat", {"model": "X:1"}, 404, "model 'X:1' not found"),
        ("/api/chat", {"model": "x:cloud"}, 403, "ollama cloud is disabled: remote model is unavailable"),
        ("/api/chat", {"model": "x:cloud:local"}, 400, 'use either :local or :cloud, not both: "x:cloud:local"'),
        ("/api/chat", {"model": "x", "top_logprobs": 21}, 400, "top_logprobs must be between 0 and 20"),
        ("/api/chat", {"model": "x", "think": True}, 404, "model 'x' not found"),
        ("/api/generate", {}, 404, "model '' not found"),
        ("/api/generate", {"model": "a b"}, 400, "invalid model name"),
        ("/api/generate", {"model": "x"}, 404, "model 'x' not found"),
        ("/api/generate", {"model": "x", "keep_alive": 0}, 404, "model 'x' not found"),
        ("/api/generate", GENERATE | {"options": {"stop": "x"}}, 500, 'option "stop" must be of type array'),
        ("/api/generate", GENERATE | {"think": True}, 400, '"llama3.2" does not support thinking'),
    ],
)
async def test_a_bad_request_is_refused_in_ollama_s_words(path: str, body: Any, status: int, text: str) -> None:
    """In the order of its checks."""
    response = await post(FakeServices(), path, body)
    assert (response.status_code, response.json()) == (status, {"error": text})
    assert response.headers["content-type"] == JSON


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/show"])
async def test_an_empty_body_is_refused(path: str) -> None:
    """Everywhere alike."""
    response = await ask(FakeServices(), "POST", path)
    assert (response.status_code, response.json()) == (400, {"error": "missing request body"})


async def test_a_form_s_content_type_does_not_matter() -> None:
    """As curl sends it by default, and with a second value behind the first."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    response = await ask(FakeServices(), "POST", "/api/chat", content=json.dumps(CHAT) + "{", headers=headers)
    assert response.status_code == 200


async def test_a_large_body_is_refused() -> None:
    """With its own status."""
    response = await post(FakeServices(), "/api/chat", CHAT | {"x": "y" * BODY_LIMIT_BYTES})
    assert (response.status_code, set(response.json())) == (413, {"error"})


async def test_a_chat_streams_by_default() -> None:
    """One object a line, no blank ones, the last one done."""
    response = await post(FakeServices(), "/api/chat", CHAT)
    assert response.headers["content-type"] == "application/x-ndjson"
    *lines, rest = response.text.split("\n")
    assert rest == ""
    pieces = [json.loads(line) for line in lines]
    assert [piece["message"]["content"] for piece in pieces] == ["Hel", "lo", ""]
    assert [piece["done"] for piece in pieces] == [False, False, True]
    assert {piece["model"] for piece in pieces} == {"llama3.2"}


@pytest.mark.parametrize(("path", "body"), [("/api/chat", CHAT), ("/api/generate", GENERATE)])
async def test_a_whole_answer_is_one_object(path: str, body: dict[str, Any]) -> None:
    """Without a line's end; its events are closed."""
    services = FakeServices()
    response = await post(services, path, body | {"stream": False})
    reply = response.json()
    assert response.headers["content-type"] == JSON
    assert not response.content.endswith(b"\n")
    assert (reply["done"], reply["created_at"], reply["eval_count"]) == (True, NOW, 2)
    assert (reply["message"]["content"] if "message" in reply else reply["response"]) == "Hello"
    assert services.requests[0].id == "req_" + "0" * 32
    assert services.playbacks[0].closed.is_set()


@pytest.mark.parametrize(
    ("path", "body"), [("/api/chat", CHAT | {"messages": []}), ("/api/generate", {"model": "llama3.2"})]
)
async def test_nothing_to_say_loads_the_model(path: str, body: dict[str, Any]) -> None:
    """One object, never a stream."""
    services = FakeServices()
    response = await post(services, path, body | {"keep_alive": "1h"})
    assert (response.headers["content-type"], response.json()["done_reason"]) == (JSON, "load")
    assert [request.keep_alive_s for request in services.loads] == [3600]
    assert not services.requests


@pytest.mark.parametrize("keep_alive", [0, "0", "0s"])
@pytest.mark.parametrize(
    ("path", "body"), [("/api/chat", CHAT | {"messages": []}), ("/api/generate", {"model": "llama3.2"})]
)
async def test_nothing_to_say_and_no_time_to_stay_unloads_it(path: str, body: dict[str, Any], keep_alive: Any) -> None:
    """Whatever else the body says."""
    services = FakeServices()
    response = await post(services, path, body | {"keep_alive": keep_alive, "options": {"stop": "x"}, "think": True})
    assert (response.status_code, response.json()["done_reason"]) == (200, "unload")
    assert len(services.unloads) == 1
    assert not services.loads


async def test_no_time_to_stay_with_a_prompt_answers_first() -> None:
    """The house unloads afterwards."""
    services = FakeServices()
    await post(services, "/api/generate", GENERATE | {"keep_alive": 0})
    assert services.requests[0].keep_alive_s == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "text"),
    [
        (PromptTooLong(99, 10), 400, PROMPT_TOO_LONG),
        (ServerBusy("the queue is full", 3), 503, QUEUE_FULL),
        (ModelLoadFailed("out of memory"), 500, "out of memory"),
        (ModelNotFound("llama3.2"), 404, "model 'llama3.2' not found"),
    ],
)
async def test_a_refusal_is_a_status_even_when_streaming(
    stream: bool, refusal: Exception, status: int, text: str
) -> None:
    """Nothing of a stream is sent before the house has admitted the request."""
    services = FakeServices()
    services.refusal = refusal
    response = await post(services, "/api/chat", CHAT | {"stream": stream})
    assert (response.status_code, response.json()) == (status, {"error": text})
    assert (response.headers.get("retry-after") == "3") is (status == 503)


async def test_a_load_may_be_refused() -> None:
    """With the same words."""
    services = FakeServices()
    services.refusal = ServerBusy("the queue is full")
    response = await post(services, "/api/generate", {"model": "llama3.2"})
    assert (response.status_code, response.json()) == (503, {"error": QUEUE_FULL})


@pytest.mark.parametrize(
    ("failure", "text", "traceback"),
    [
        (WorkerCrashed("gone"), "model runner has unexpectedly stopped", False),
        (ZeroDivisionError("secret"), "internal server error", True),
    ],
)
async def test_a_failure_in_a_stream_is_its_last_line(
    failure: Exception, text: str, traceback: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The status stays 200, nothing is `done`, and it is logged."""
    services = FakeServices([TextDelta("Hi"), failure])
    with caplog.at_level(logging.WARNING):
        response = await post(services, "/api/chat", CHAT)
    first, last = map(json.loads, response.text.splitlines())
    assert (response.status_code, first["done"]) == (200, False)
    assert list(last) == ["error"]
    assert last["error"].startswith(text)
    assert "secret" not in response.text
    assert "an answer broke off" in caplog.text
    assert any(record.exc_info for record in caplog.records) is traceback
    assert services.playbacks[0].closed.is_set()


async def test_an_unexpected_failure_before_a_stream_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    """Logged with its traceback, shown without its text."""
    services = FakeServices()
    services.refusal = ZeroDivisionError("secret")
    response = await post(services, "/api/chat", CHAT)
    assert (response.status_code, response.json()) == (500, {"error": "internal server error"})
    assert any(record.exc_info for record in caplog.records)


async def test_the_reason_of_a_refusal_is_left_in_the_request_s_state() -> None:
    """For whoever keeps the books."""
    gateway = app(FakeServices())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://x") as client:
        await client.post("/api/generate", json={"model": "nothing"})
    assert gateway.refusal == Refusal("model_not_found", "nothing")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_closes_its_answer(stream: bool) -> None:
    """A hang-up ends the work whether the answer is streamed or not."""
    services = FakeServices([TextDelta("Hi"), asyncio.Event()])
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        asking = asyncio.create_task(client.post("/api/chat", json=CHAT | {"stream": stream}))
        await services.asked.wait()
        asking.cancel()
        await asyncio.wait({asking})
        async with asyncio.timeout(5):
            await services.playbacks[0].closed.wait()


@pytest.mark.parametrize("body", [GENERATE, {"model": "llama3.2"}])
async def test_a_client_that_leaves_while_waiting_cancels_the_wait(body: dict[str, Any]) -> None:
    """For admission, and for a model to load."""
    cancelled, asked = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    class Loading(FakeServices):
        async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
            """Never admitted."""
            await wait()
            raise AssertionError

        async def load(self, request: GenerateRequest) -> None:
            """Never loaded."""
            await wait()

    async with serving(Loading()) as url, httpx.AsyncClient(base_url=url) as client:
        asking = asyncio.create_task(client.post("/api/generate", json=body))
        await asked.wait()
        asking.cancel()
        await asyncio.wait({asking})
        async with asyncio.timeout(5):
            await cancelled.wait()


async def test_pieces_arrive_as_they_are_made() -> None:
    """The first line is there while the second is not."""
    gate = asyncio.Event()
    services = FakeServices([TextDelta("a"), gate, *says("b")])
    async with (
        serving(services) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("POST", "/api/generate", json=GENERATE) as response,
    ):
        lines = response.aiter_lines()
        assert json.loads(await anext(lines))["response"] == "a"
        gate.set()
        assert [json.loads(line)["response"] async for line in lines] == ["b", ""]


WORDS = st.sampled_from(["llama3.2", "user", "5m", "json", "QUI="])
INNER_FIELDS = [
    *("role", "content", "images", "function", "name", "arguments", "parameters", "properties", "type", "tool_calls"),
    *("stop", "num_ctx", "seed", "temperature", "num_keep", *FURTHER_SAMPLERS),
]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER_FIELDS), inner, max_size=4),
    max_leaves=8,
)
FIELDS = [
    *("messages", "prompt", "stream", "format", "keep_alive", "options", "think", "truncate", "shift", "logprobs"),
    *("top_logprobs", "suffix", "system", "template", "context", "raw", "images", "tools", "verbose", "name", "PROMPT"),
]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/api/chat", "/api/generate", "/api/show"]),
    body=ANYTHING
    | st.dictionaries(st.sampled_from(FIELDS), ANYTHING).map(lambda fields: {"model": "llama3.2"} | fields),
)
def test_any_json_is_answered(path: str, body: Any) -> None:
    """With an answer, or a string that says why not; only options and format make a 500, as in Ollama."""

    async def talk() -> tuple[httpx.Response, object]:
        services = FakeServices(cards=[card("llama3.2:latest", "tools", "thinking")])
        gateway = app(services)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://x") as client:
            return await client.post(path, content=json.dumps(body)), gateway.refusal

    response, error = asyncio.run(talk())
    if response.status_code == 200:
        assert all("error" not in json.loads(line) for line in response.text.splitlines())
        return
    assert list(response.json()) == ["error"]
    assert isinstance(response.json()["error"], str)
    assert response.status_code < 500 or response.json()["error"].startswith(("option ", "invalid format: ")), error


@pytest.mark.parametrize(("path", "body"), [("/api/chat", CHAT), ("/api/generate", GENERATE)])
async def test_a_prompt_can_be_asked_for_alone(path: str, body: dict[str, Any]) -> None:
    """One object, never a stream, and nothing is generated."""
    services = FakeServices()
    response = await post(services, path, body | {"_debug_render_only": True})
    assert (response.status_code, response.headers["content-type"]) == (200, JSON)
    assert response.json()["_debug_info"] == {"rendered_template": "<user>hi"}
    assert response.json()["done"] is False
    assert (len(services.requests), services.playbacks) == (1, [])


async def test_a_template_that_fails_is_the_server_s_fault() -> None:
    """As in Ollama, with Go's words."""
    services = FakeServices()
    services.refusal = GoTemplateError('template: :1: function "x" not defined')
    response = await post(services, "/api/generate", GENERATE | {"template": "{{ x }}"})
    assert (response.status_code, response.json()["error"]) == (500, 'template: :1: function "x" not defined')
