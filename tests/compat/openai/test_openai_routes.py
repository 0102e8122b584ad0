"""The dialect on a real server, spoken to over plain HTTP."""

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai_fakes import BODY_LIMIT_BYTES, CREATED, FakeServices, Server, app, card, finished, says, serving

from compat.openai.routes import surfaces
from engines.errors import ModelLoadFailed, PromptTooLong, ServerBusy, WorkerCrashed
from engines.events import Event, FinishReason, TextDelta
from engines.options import FURTHER_SAMPLERS
from engines.request import GenerateRequest, Message

BODY: dict[str, Any] = {"model": "qwen3:8b", "messages": [{"role": "user", "content": "hi"}]}


def payloads(text: str) -> list[str]:
    """The data of each frame of an event stream, which must consist of nothing else."""
    *frames, rest = text.split("\n\n")
    assert rest == ""
    assert all(frame.startswith("data: ") for frame in frames)
    return [frame.removeprefix("data: ") for frame in frames]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/chat/completions/", "/chat/completions"])
async def test_a_chat_is_answered_on_every_spelling_of_its_path(path: str) -> None:
    """With and without `/v1` and a trailing slash, never by a redirect, whatever the content type says."""
    services = FakeServices(says("Hel", "lo"))
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post(path, content=json.dumps(BODY), headers={"Content-Type": "text/plain"})
    body = response.json()
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert body["choices"][0]["message"]["content"] == "Hello"
    assert (body["created"], body["system_fingerprint"], body["model"]) == (CREATED, "fp_1a2b3c4d", "qwen3:8b")
    assert len(body["id"]) >= len("chatcmpl-") + 24
    assert services.requests[0].messages == (Message("user", "hi"),)


async def test_a_stream_ends_with_done_and_shares_one_head() -> None:
    """Id, time and model are the same in every chunk; `[DONE]` is last and the body ends there."""
    async with serving(FakeServices(says("Hel", "lo"))) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post("/v1/chat/completions", json=BODY | {"stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = payloads(response.text)
    assert done == "[DONE]"
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in map(json.loads, chunks)}) == 1


async def test_a_compressed_body_is_read() -> None:
    """gzip, as some clients send large conversations."""
    async with serving(FakeServices()) as url, httpx.AsyncClient(base_url=url) as client:
        data = gzip.compress(json.dumps(BODY).encode())
        response = await client.post("/v1/chat/completions", content=data, headers={"Content-Encoding": "gzip"})
    assert response.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (PromptTooLong(99, 10), 400, "context_length_exceeded"),
        (ServerBusy("the queue is full", 3), 503, "server_overloaded"),
        (ModelLoadFailed("out of memory"), 500, "model_load_failed"),
    ],
)
async def test_a_refusal_is_a_status_even_when_streaming(
    stream: bool, refusal: Exception, status: int, code: str
) -> None:
    """Nothing of a stream is sent before the house has admitted the request."""
    services = FakeServices()
    services.refusal = refusal
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post("/v1/chat/completions", json=BODY | {"stream": stream})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers["content-type"] == "application/json"


async def test_an_overflow_names_the_field_that_holds_the_prompt() -> None:
    """`messages` for a chat, `prompt` for a completion."""
    services = FakeServices()
    services.refusal = PromptTooLong(99, 10)
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        chat = await client.post("/v1/chat/completions", json=BODY)
        completion = await client.post("/v1/completions", json={"model": "qwen3:8b", "prompt": "x"})
    assert [r.json()["error"]["param"] for r in (chat, completion)] == ["messages", "prompt"]


@pytest.mark.parametrize(("failure", "logged"), [(WorkerCrashed("gone"), False), (ZeroDivisionError("secret"), True)])
async def test_a_failure_in_a_stream_is_its_last_frame(
    failure: Exception, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """One error frame, no finish chunk, no `[DONE]`; what is not ours is logged and not shown."""
    services = FakeServices([TextDelta("Hi"), failure])
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post("/v1/chat/completions", json=BODY | {"stream": True})
    *_, text, last = payloads(response.text)
    assert json.loads(text)["choices"][0]["finish_reason"] is None
    assert json.loads(last)["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert any(record.exc_info for record in caplog.records) is logged
    assert services.playbacks[0].closed.is_set()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_closes_its_answer(stream: bool) -> None:
    """A hang-up ends the work whether the answer is streamed or not."""
    services = FakeServices([TextDelta("Hi"), asyncio.Event()])
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=BODY | {"stream": stream}))
        await services.asked.wait()
        asking.cancel()
        await asyncio.wait({asking})
        async with asyncio.timeout(5):
            await services.playbacks[0].closed.wait()


async def test_a_client_that_leaves_while_waiting_for_admission_cancels_the_wait() -> None:
    """Queued and loading requests end with their client too."""
    cancelled, asked = asyncio.Event(), asyncio.Event()

    class Loading(FakeServices):
        async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
            """Never admitted."""
            asked.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
            raise AssertionError

    async with serving(Loading()) as url, httpx.AsyncClient(base_url=url) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=BODY | {"stream": True}))
        await asked.wait()
        asking.cancel()
        await asyncio.wait({asking})
        async with asyncio.timeout(5):
            await cancelled.wait()


async def test_a_stream_runs_on_while_the_server_stops() -> None:
    """A graceful shutdown lets running answers finish to their `[DONE]`."""
    gate = asyncio.Event()
    services = FakeServices([TextDelta("a"), gate, *says("b")])
    server = Server(app(services))
    running = asyncio.create_task(server.serve())
    await server.ready.wait()
    async with httpx.AsyncClient(base_url=server.url) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=BODY | {"stream": True}))
        await services.asked.wait()
        server.should_exit = True
        await server.stopping.wait()
        gate.set()
        assert payloads((await asking).text)[-1] == "[DONE]"
    await running


async def test_a_list_of_prompts_is_one_answer() -> None:
    """Choices of two prompts with two samples each are numbered 0 to 3 and sorted."""
    script = [TextDelta("a", 0), TextDelta("b", 1), *finished(num_choices=2, prompt_tokens=2, completion_tokens=2)]
    services = FakeServices(script)
    body = {"model": "qwen3:8b", "prompt": ["x", "y"], "n": 2}
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        whole = (await client.post("/v1/completions", json=body)).json()
        streamed = await client.post("/v1/completions", json=body | {"stream": True})
    assert [(choice["index"], choice["text"]) for choice in whole["choices"]] == list(enumerate("abab"))
    assert whole["usage"]["total_tokens"] == 8
    assert len({request.id for request in services.requests[:2]}) == 2
    *chunks, done = payloads(streamed.text)
    ends = [choice for chunk in chunks for choice in json.loads(chunk)["choices"] if choice["finish_reason"]]
    assert (sorted(choice["index"] for choice in ends), done) == ([0, 1, 2, 3], "[DONE]")


async def test_models_are_listed_and_shown() -> None:
    """Slashes in ids work encoded and raw, with and without `/v1`, and the id comes back as asked for."""
    services = FakeServices(cards=[card("hf.co/a/b:Q4_K_M", namespace="a"), card("llama3.2:latest")])
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        listed = (await client.get("/v1/models")).json()
        paths = ["/v1/models/hf.co%2Fa%2Fb:Q4_K_M", "/v1/models/hf.co/a/b:Q4_K_M", "/models/hf.co/a/b%3AQ4_K_M/"]
        shown = [(await client.get(path)).json() for path in paths]
        short = (await client.get("/v1/models/llama3.2")).json()
        missing = await client.get("/v1/models/gpt-9")
        same = [(await client.get(path)).json() for path in ("/models", "/v1/models/", "/models/")]
    assert [model["id"] for model in listed["data"]] == ["hf.co/a/b:Q4_K_M", "llama3.2:latest"]
    assert shown == [listed["data"][0]] * 3
    assert short == listed["data"][1] | {"id": "llama3.2"}
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert same == [listed] * 3


async def test_no_models_are_an_empty_list() -> None:
    """Never null."""
    services = FakeServices()
    services.cards = []
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/v1/models")).json() == {"object": "list", "data": []}


async def test_unknown_paths_and_methods_have_bodies_too() -> None:
    """Starlette's own 404 and 405 in OpenAI's shape."""
    async with serving(FakeServices()) as url, httpx.AsyncClient(base_url=url) as client:
        unknown = await client.get("/v1/nothing")
        wrong = await client.get("/v1/chat/completions")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_supported")
    assert wrong.headers["allow"] == "POST"


async def test_a_body_that_is_too_large_is_413() -> None:
    """And says so in OpenAI's shape."""
    async with serving(FakeServices()) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post("/v1/chat/completions", content=b" " * (BODY_LIMIT_BYTES + 1))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


async def test_an_unexpected_fault_before_the_answer_is_a_plain_500(caplog: pytest.LogCaptureFixture) -> None:
    """Its text goes to the log and not to the client."""
    services = FakeServices()
    services.refusal = ZeroDivisionError("secret")
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post("/v1/chat/completions", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert [record.levelno for record in caplog.records if record.name == "compat.openai.routes"] == [logging.ERROR]


def test_surfaces_name_every_inference_path() -> None:
    """The gateway labels requests by path before any handler runs."""
    named = {
        "/chat/completions": "openai/chat",
        "/completions": "openai/completion",
        "/embeddings": "openai/embedding",
        "/rerank": "rerank",
        "/reranking": "rerank",
        "/score": "rerank",
    }
    spelled = {base + path: surface for path, surface in named.items() for base in ("/v1", "")}
    spelled |= {"/v2/rerank": "rerank"}
    assert surfaces() == {path + end: surface for path, surface in spelled.items() for end in ("", "/")}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
# fmt: off
FIELDS = [
    "stream", "stream_options", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "response_format", "tools",
    "tool_choice", "reasoning", "options", "keep_alive", "logit_bias", "chat_template_kwargs", "modalities", "prompt",
    "best_of", "echo", "logprobs", "suffix", "json_schema", "top_logprobs", "n_probs", "grammar", "grammar_lazy",
    "grammar_triggers", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs",
    "truncate", "truncation", "service_tier", "mirostat", "mirostat_tau", "xtc_probability", "dry_base",
    "dry_sequence_breakers", "dynatemp_range", "ignore_eos", "top_n_sigma",
]
OPTIONS = [*FURTHER_SAMPLERS, "temperature", "seed", "stop", "num_ctx", "num_keep", "num_predict", "repeat_penalty"]
# fmt: on
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "refusal", "x"])},
    optional={"text": json_values, "image_url": json_values, "refusal": json_values},
)
message_bodies = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "function", "x"])},
    optional={
        "content": st.text() | st.lists(parts, max_size=3) | json_values,
        "tool_calls": json_values | st.lists(st.fixed_dictionaries({"function": json_values}), max_size=2),
        "tool_call_id": json_values,
    },
)
bodies = json_values | st.fixed_dictionaries(
    {"model": st.just("qwen3:8b") | json_values},
    optional={"messages": st.lists(message_bodies, max_size=3)}
    | dict.fromkeys(FIELDS, json_values)
    | {"options": st.dictionaries(st.sampled_from(OPTIONS), json_values | st.just(10**400)) | json_values},
)


async def ask(path: str, data: bytes) -> tuple[int, bytes]:
    """One request through the ASGI interface; hypothesis asks too often for real connections."""
    body = iter([{"type": "http.request", "body": data}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(body, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "root_path": ""}
    await app(FakeServices(finished(FinishReason.STOP)))(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def is_error(status: int, reply: bytes) -> bool:
    """Whether this is a refusal in OpenAI's shape."""
    return 400 <= status < 500 and json.loads(reply)["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(body=bodies)
async def test_any_json_is_answered_or_refused_in_openai_s_shape(path: str, body: Any) -> None:
    """Nothing that a client sends is a 500."""
    status, reply = await ask(path, json.dumps(body).encode())
    assert status == 200 or is_error(status, reply)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@settings(deadline=None)
@given(data=st.binary(max_size=200))
async def test_any_bytes_are_refused_in_openai_s_shape(path: str, data: bytes) -> None:
    """Nor is anything that is no JSON."""
    assert is_error(*await ask(path, data))


@pytest.mark.parametrize(
    "text", [r'"\ud800"', r'"\ud800x y"', r'"\udc00"', r'"\ud83d\ude00"', '"' + "\\u0000" + '"', "1e400", "9" * 5000]
)
async def test_strange_json_is_answered_or_refused(text: str) -> None:
    """Lone surrogates, NUL and numbers without end, as content and as a vendor's extra."""
    for body in (
        '{"model":"qwen3:8b","messages":[{"role":"user","content":%s}]}',
        '{"model":"qwen3:8b","prompt":"","x":%s}',
    ):
        status, reply = await ask("/v1/chat/completions", (body % text).encode())
        assert status == 200 or is_error(status, reply)
