"""The whole house on the demo model, asked by the clients that people use."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import psutil
import pytest
from serving import Server, serving, start, workers_of

pytestmark = pytest.mark.e2e

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
PARIS = "The capital of France is Paris."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests that leave it as they found it."""
    with serving(tmp_path_factory.mktemp("house")) as running:
        yield running


@contextmanager
def asking(server: Server) -> Iterator[Any]:
    """An unmodified Ollama client."""
    with closing(ollama.Client(server.url)) as opened:
        yield opened


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    """An unmodified Ollama client for the shared server."""
    with asking(server) as opened:
        yield opened


@pytest.fixture
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    """An unmodified OpenAI client."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def usage_by_surface(server: Server) -> dict[str, dict[str, int]]:
    """What `/admin/usage` says of each surface."""
    rows = httpx.get(f"{server.url}/admin/usage", params={"by": "surface"}).json()["rows"]
    return {row["surface"]: row for row in rows}


def metric(server: Server, name: str, **labels: str) -> float:
    """The sum of a metric's series that have these labels."""
    total = 0.0
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
        if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
            total += float(found[2])
    return total


def rows(server: Server) -> list[sqlite3.Row]:
    """Every row of the ledger, oldest first."""
    with sqlite3.connect(server.database) as database:
        database.row_factory = sqlite3.Row
        return list(database.execute("select * from requests order by started_at"))


def test_the_demo_model_answers_an_ollama_client_at_first_start(client: Any) -> None:
    """An empty model directory is enough for the first request, with the right fact in the answer."""
    answer = client.chat("demo", messages=FRANCE, think=False, options={"temperature": 0})
    assert answer.message.content == PARIS
    assert answer.done_reason == "stop"
    assert answer.prompt_eval_count == 21
    assert answer.eval_count == 13
    assert answer.eval_duration
    assert answer.total_duration


def test_ollama_client_lists_shows_and_sees_what_runs(client: Any) -> None:
    """list, show and ps agree on the demo model's name."""
    client.generate("demo", prompt="", keep_alive="1h")
    assert [model.model for model in client.list().models] == ["demo:latest"]
    shown = client.show("demo")
    assert shown.modelinfo["general.architecture"] == "llama"
    assert "completion" in shown.capabilities
    running = client.ps().models
    assert [model.model for model in running] == ["demo:latest"]
    assert running[0].context_length == 4096


def test_streams_and_whole_answers_agree_across_dialects(client: Any, sdk: Any) -> None:
    """At temperature 0 every way of asking gives the same text."""
    options = {"temperature": 0}
    chat = client.chat("demo", messages=FRANCE, think=False, options=options).message.content
    streamed = "".join(
        part.message.content or ""
        for part in client.chat("demo", messages=FRANCE, think=False, options=options, stream=True)
    )
    generated = client.generate("demo", prompt=FRANCE[0]["content"], think=False, options=options).response
    whole = sdk.chat.completions.create(model="demo", messages=FRANCE, temperature=0).choices[0].message.content
    chunks = sdk.chat.completions.create(
        model="demo", messages=FRANCE, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    pieces, usage = [], None
    for chunk in chunks:
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    assert {chat, streamed, generated, whole, "".join(pieces)} == {PARIS}
    assert usage is not None
    assert usage.prompt_tokens == 21


def test_raw_completions_agree_across_dialects(client: Any, sdk: Any) -> None:
    """Ollama's raw generate and OpenAI's completions continue a text alike."""
    options = {"temperature": 0, "num_predict": 20}
    raw = client.generate("demo", prompt="Once upon a time", raw=True, options=options)
    text = sdk.completions.create(model="demo", prompt="Once upon a time", temperature=0, max_tokens=20)
    assert raw.response == text.choices[0].text
    assert raw.done_reason == text.choices[0].finish_reason == "length"
    assert raw.eval_count == text.usage.completion_tokens == 20


def test_thinking_is_kept_apart_from_the_answer(client: Any, sdk: Any) -> None:
    """A thinking model thinks by default towards Ollama clients, and tags never reach the content."""
    answer = client.chat("demo", messages=FRANCE, options={"temperature": 0})
    assert answer.message.content == PARIS
    assert answer.message.thinking
    effort = sdk.chat.completions.create(model="demo", messages=FRANCE, temperature=0, reasoning_effort="high")
    assert effort.choices[0].message.content == PARIS
    assert effort.choices[0].message.model_extra["reasoning_content"] == answer.message.thinking


def test_tools_are_called_in_both_dialects(client: Any, sdk: Any) -> None:
    """The same call comes back as an object to Ollama clients and as text to OpenAI's."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "get_weather", "description": "w", "parameters": parameters}}
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    call = client.chat("demo", messages=question, tools=[tool], think=False, options={"temperature": 0})
    assert call.message.tool_calls[0].function.name == "get_weather"
    assert call.message.tool_calls[0].function.arguments == {"city": "Paris"}
    choice = sdk.chat.completions.create(model="demo", messages=question, tools=[tool], temperature=0).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Paris"}


def test_sixteen_clients_share_steps_and_every_count_agrees(tmp_path: Path) -> None:
    """What the clients saw, the ledger and the metrics are the same numbers, and decoding was shared."""
    with serving(tmp_path, OLLAMA_NUM_PARALLEL="16") as server:
        seen = asyncio.run(_sixteen_chats(server))
        ledger = usage_by_surface(server)
        for surface, (prompt, completion) in seen.items():
            row = ledger[surface]
            assert (row["prompt_tokens"], row["completion_tokens"]) == (prompt, completion)
            assert metric(server, "headwater_prompt_tokens_total", surface=surface) == prompt
            assert metric(server, "headwater_completion_tokens_total", surface=surface) == completion
        assert sum(row["num_requests"] for row in ledger.values()) == 16
        completion = sum(count for _, count in seen.values())
        assert metric(server, "headwater_engine_steps_total") < completion / 3
        assert metric(server, "headwater_usage_unrecorded_total") == 0


async def _sixteen_chats(server: Server) -> dict[str, tuple[int, int]]:
    """Four chats of each of four kinds at once; prompt and completion tokens as each kind's clients saw them."""
    kinds = {
        _ollama_chat: "ollama/completion",
        _ollama_generate: "ollama/completion",
        _openai_chat: "openai/chat",
        _model_runner_completion: "model-runner/completion",
    }
    async with asyncio.TaskGroup() as group:
        asked = [(surface, group.create_task(ask(server, seed))) for ask, surface in kinds.items() for seed in range(4)]
    seen: dict[str, tuple[int, int]] = {}
    for surface, answer in asked:
        prompt, completion = seen.get(surface, (0, 0))
        seen[surface] = (prompt + answer.result()[0], completion + answer.result()[1])
    return seen


class AsyncOllama(ollama.AsyncClient):
    """Ollama's client, closed as asynchronous things usually are."""

    async def aclose(self) -> None:
        await self.close()  # type: ignore[no-untyped-call]  # the package leaves it untyped


async def _ollama_chat(server: Server, seed: int) -> tuple[int, int]:
    options = {"temperature": 0.7, "num_predict": 60, "seed": seed}
    async with aclosing(AsyncOllama(server.url)) as client:
        answer: Any = await client.chat("demo", messages=STORY, options=options)
    return answer.prompt_eval_count, answer.eval_count


async def _ollama_generate(server: Server, seed: int) -> tuple[int, int]:
    options = {"temperature": 0.7, "num_predict": 60, "seed": seed}
    async with aclosing(AsyncOllama(server.url)) as client:
        parts = await client.generate("demo", "Tell me a story.", stream=True, options=options)
        last: Any = [part async for part in parts][-1]
    return last.prompt_eval_count, last.eval_count


async def _openai_chat(server: Server, seed: int) -> tuple[int, int]:
    sdk: Any
    options = {"max_tokens": 60, "seed": seed, "stream": True, "stream_options": {"include_usage": True}}
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as sdk:
        *_, last = [chunk async for chunk in await sdk.chat.completions.create(model="demo", messages=STORY, **options)]
    return last.usage.prompt_tokens, last.usage.completion_tokens


async def _model_runner_completion(server: Server, seed: int) -> tuple[int, int]:
    sdk: Any
    async with openai.AsyncOpenAI(base_url=f"{server.url}/engines/v1", api_key="x") as sdk:
        answer = await sdk.completions.create(model="demo", prompt="Once upon a time", seed=seed, max_tokens=60)
    return answer.usage.prompt_tokens, answer.usage.completion_tokens


def test_a_kill_loses_nothing_that_a_client_saw_finish(tmp_path: Path) -> None:
    """Ten kill -9 under load: the ledger holds every request whose end reached its client."""
    finished: list[str] = []
    for _ in range(10):
        server = start(tmp_path)
        done = threading.Event()
        asking = [threading.Thread(target=_ask_until, args=(server.url, done, finished)) for _ in range(6)]
        for thread in asking:
            thread.start()
        target = len(finished) + 20
        while len(finished) < target:
            time.sleep(0.005)
        server.kill()
        done.set()
        for thread in asking:
            thread.join()
    recorded = {row["id"] for row in rows(server)}
    assert len(finished) >= 200
    assert not [request_id for request_id in finished if request_id not in recorded]


def _ask_until(url: str, done: threading.Event, finished: list[str]) -> None:
    """Ask again and again; note the id of each request once its last byte is here."""
    body = {"model": "demo", "messages": FRANCE, "stream": True, "options": {"temperature": 0}}
    while not done.is_set():
        try:
            with httpx.stream("POST", f"{url}/api/chat", json=body, timeout=30) as response:
                last = [line for line in response.iter_lines() if line][-1]
                if json.loads(last).get("done"):
                    finished.append(response.headers["x-request-id"])
        except httpx.HTTPError:
            return


def test_a_killed_server_leaves_no_worker_behind(tmp_path: Path) -> None:
    """Workers end when their parent dies, whatever killed it."""
    server = start(tmp_path)
    with asking(server) as client:
        client.generate("demo", prompt="")
    (worker,) = workers_of(server)
    arguments = psutil.Process(worker).cmdline()
    socket = Path(arguments[arguments.index("--socket") + 1])
    server.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with serving(tmp_path):
        assert not socket.parent.exists(), "the next server removes what the killed one left"


def test_sigterm_lets_a_stream_finish_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """A request that runs at SIGTERM is answered to its end and recorded; no process and no socket remains."""
    server = start(tmp_path)
    with asking(server) as client:
        stream = client.chat("demo", messages=STORY, options={"temperature": 0}, stream=True)
        next(stream)
        workers = workers_of(server)
        server.process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].done
    assert server.stop() == 0
    assert [row["finish_reason"] for row in rows(server)] == ["stop"]
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert not list((tmp_path / "data").rglob("*.sock"))


def test_what_outlasts_the_grace_time_ends_with_an_error_of_its_dialect(tmp_path: Path) -> None:
    """A stream gets a last line that says why, a queued request a real 503, and both are on record."""
    with serving(tmp_path, HEADWATER_SHUTDOWN_GRACE="1s", OLLAMA_NUM_PARALLEL="1") as server, asking(server) as client:
        long = {"temperature": 1.5, "num_predict": 100000, "num_ctx": 4096, "seed": 1, "ignore_eos": True}
        stream = client.generate("demo", "Once upon a time", raw=True, stream=True, options={**long})
        next(stream)
        slow = {"model": "demo", "prompt": "x", "stream": False, "options": long}
        replies: list[Any] = []
        waiting = [threading.Thread(target=_post, args=(server.url, slow, replies)) for _ in range(2)]
        for thread in waiting:
            thread.start()
        while metric(server, "headwater_requests_waiting") < 1:
            time.sleep(0.01)
        os.kill(workers_of(server)[0], signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ollama.ResponseError, match=r"shutting down|unexpectedly stopped"):
            list(stream)
        for thread in waiting:
            thread.join()
        assert server.stop() == 0
    assert all("error" in reply for reply in replies)
    assert len(rows(server)) == 3


def _post(url: str, body: dict[str, Any], replies: list[Any]) -> None:
    replies.append(httpx.post(f"{url}/api/generate", json=body, timeout=60).json())


def test_a_worker_that_is_killed_mid_stream_is_an_error_on_record_and_is_replaced(tmp_path: Path) -> None:
    """The stream ends with an error line, the row says so, and the next request is served."""
    with serving(tmp_path) as server, asking(server) as client:
        long = {"temperature": 1.5, "num_predict": 3000, "seed": 1}
        stream = client.generate("demo", "Once upon a time", raw=True, stream=True, options=long)
        next(stream)
        os.kill(workers_of(server)[0], signal.SIGKILL)
        with pytest.raises(ollama.ResponseError, match="unexpectedly stopped"):
            list(stream)
        assert client.chat("demo", messages=FRANCE, think=False, options={"temperature": 0}).message.content == PARIS
        assert [(row["finish_reason"], row["error_code"]) for row in rows(server)] == [
            ("error", "worker_crashed"),
            ("stop", ""),
        ]


def test_a_client_that_leaves_is_recorded_with_what_it_cost(tmp_path: Path) -> None:
    """A hang-up mid-stream cancels the sequence at once, and the row has the tokens that were generated."""
    with serving(tmp_path) as server:
        body = {"model": "demo", "prompt": "Once upon a time", "raw": True}
        body["options"] = {"temperature": 1.5, "num_predict": 4000, "seed": 1}
        with httpx.stream("POST", f"{server.url}/api/generate", json=body) as response:
            lines = response.iter_lines()
            for _ in range(5):
                next(lines)
        deadline = time.monotonic() + 5
        while not (found := rows(server)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert found[0]["finish_reason"] == "cancel"
        assert 5 <= found[0]["completion_tokens"] < 4000
        assert metric(server, "headwater_engine_kv_cells_free") == metric(server, "headwater_engine_kv_cells")


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/api/chat", b"{", 400, "invalid_request"),
        ("/api/chat", b'{"model": 5}', 400, "invalid_request"),
        ("/api/chat", b"{}", 400, "invalid_request"),
        ("/api/chat", b'{"model": "nope", "messages": [{"role": "user", "content": "x"}]}', 404, "model_not_found"),
        ("/v1/chat/completions", b"[]", 400, "invalid_request"),
        ("/v1/chat/completions", b'{"messages": []}', 400, "invalid_request"),
        (
            "/v1/chat/completions",
            b'{"model": "nope", "messages": [{"role": "user", "content": "x"}]}',
            404,
            "model_not_found",
        ),
        ("/v1/completions", b'{"model": "demo", "prompt": [99999999]}', 400, "invalid_request"),
    ],
)
def test_bad_input_gets_its_status_and_its_row(server: Server, path: str, body: bytes, status: int, code: str) -> None:
    """Whatever is wrong with a request, it is answered, recorded as refused, and the server lives on."""
    response = httpx.post(server.url + path, content=body)
    assert response.status_code == status
    assert response.json()["error"]
    row = next(row for row in rows(server) if row["id"] == response.headers["x-request-id"])
    assert (row["status"], row["finish_reason"]) == (status, "refused")
    assert row["error_code"] == code


def test_an_over_long_prompt_is_refused_in_each_dialects_words_or_cut(server: Server) -> None:
    """The window is named, and nothing was streamed; where Ollama cuts the prompt, the answer says so."""
    words = "word " * 6000
    chat = {"model": "demo", "messages": [{"role": "user", "content": words}]}
    openai_reply = httpx.post(f"{server.url}/v1/chat/completions", json={**chat, "stream": True}, timeout=30)
    assert openai_reply.status_code == 400
    assert openai_reply.json()["error"]["code"] == "context_length_exceeded"
    ollama_reply = httpx.post(f"{server.url}/api/chat", json={**chat, "truncate": False}, timeout=30)
    assert ollama_reply.status_code == 400
    assert "longer than the context length" in ollama_reply.json()["error"]
    short = {"stream": False, "options": {"num_predict": 4}}
    cut_reply = httpx.post(f"{server.url}/api/chat", json=chat | short, timeout=30).json()
    assert cut_reply["truncated"] is True
    assert cut_reply["prompt_eval_count"] < 4096 < cut_reply["prompt_tokens_sent"]


def test_a_body_over_the_limit_is_refused(tmp_path: Path) -> None:
    """413 in both dialects, before anything is parsed."""
    with serving(tmp_path, HEADWATER_BODY_LIMIT="1000") as server:
        for path in ("/api/chat", "/v1/chat/completions"):
            assert httpx.post(server.url + path, content=b"x" * 1001).status_code == 413
        assert [row["status"] for row in rows(server)] == [413, 413]


def test_a_damaged_model_is_a_clear_error_and_harms_nobody_else(tmp_path: Path) -> None:
    """A truncated weights file cannot be loaded, says why, and the demo still answers."""
    with serving(tmp_path) as server:
        demo = tmp_path / "models/manifests/registry.ollama.ai/library/demo/latest"
        manifest = json.loads(demo.read_text())
        layer = next(layer for layer in manifest["layers"] if layer["mediaType"].endswith(".model"))
        weights = (tmp_path / "models/blobs" / layer["digest"].replace(":", "-")).read_bytes()
        for name, content in (("cut", weights[: len(weights) // 2]), ("text", b"this is no model")):
            digest = "sha256:" + ("0" * 63) + str(len(name))
            (tmp_path / "models/blobs" / digest.replace(":", "-")).write_bytes(content)
            broken = {**manifest, "layers": [{**layer, "digest": digest, "size": len(content)}]}
            target = tmp_path / f"models/manifests/registry.ollama.ai/library/{name}/latest"
            target.parent.mkdir(parents=True)
            target.write_text(json.dumps(broken))
            reply = httpx.post(f"{server.url}/api/generate", json={"model": name, "prompt": "x"}, timeout=30)
            assert reply.status_code == 500
            assert "GGUF" in reply.json()["error"]
        assert httpx.post(f"{server.url}/api/chat", json={"model": "demo", "messages": FRANCE}).status_code == 200


def test_origin_is_derived_and_cannot_be_asserted_from_outside(server: Server) -> None:
    """A header that claims a name is dropped and counted, and the answer shows who we think is asking."""
    before = metric(server, "headwater_origin_asserted_dropped_total")
    headers = {"X-Request-Origin": "boss", "User-Agent": "curl/8"}
    body = {"model": "demo", "messages": FRANCE, "stream": False}
    response = httpx.post(f"{server.url}/exp/vDD4.40/engines/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 200
    assert response.headers["x-request-origin"].startswith('model-runner/chat; caller="curl@127.0.0.1"')
    assert metric(server, "headwater_origin_asserted_dropped_total") == before + 1


def test_a_trusted_proxy_vouches_for_a_caller(tmp_path: Path) -> None:
    """Behind a trusted peer the asserted name is what usage is booked on."""
    with serving(tmp_path, HEADWATER_TRUSTED_PROXIES="127.0.0.1/32") as server:
        body = {"model": "demo", "messages": FRANCE, "stream": False}
        httpx.post(f"{server.url}/api/chat", json=body, headers={"X-Request-Origin": "alice"}).raise_for_status()
        assert [(row["caller"], row["trust"]) for row in rows(server)] == [("alice", "vouched")]


def test_the_demo_stays_deleted(tmp_path: Path) -> None:
    """A user who removes the demo does not find it again at the next start."""
    with serving(tmp_path):
        pass
    (tmp_path / "models/manifests/registry.ollama.ai/library/demo/latest").unlink()
    with serving(tmp_path) as server, asking(server) as client:
        assert client.list().models == []


def test_more_models_than_fit_take_turns(tmp_path: Path) -> None:
    """With room for one model, two are served one after the other and only one stays."""
    with serving(tmp_path, OLLAMA_MAX_LOADED_MODELS="1") as server, asking(server) as client:
        manifests = tmp_path / "models/manifests/registry.ollama.ai/library"
        manifest = json.loads((manifests / "demo/latest").read_text())
        layer = next(layer for layer in manifest["layers"] if layer["mediaType"].endswith(".model"))
        weights = tmp_path / "models/blobs" / layer["digest"].replace(":", "-")
        other = "sha256:" + "ab" * 32
        (tmp_path / "models/blobs" / other.replace(":", "-")).symlink_to(weights)
        (manifests / "other").mkdir()
        (manifests / "other/latest").write_text(json.dumps({**manifest, "layers": [{**layer, "digest": other}]}))
        for name in ("demo", "other", "demo"):
            options = {"temperature": 0}
            assert client.chat(name, messages=FRANCE, think=False, options=options).message.content == PARIS
            assert [model.model for model in client.ps().models] == [f"{name}:latest"]
