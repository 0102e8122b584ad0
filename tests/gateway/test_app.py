"""The whole house behind a real port, with a fake engine in real workers."""

import asyncio
import json
import os
import signal
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from fake_house import describe_model, fake_backend, sockets_below, until, worker_pids

from gateway.app import bind, run, serve
from gateway.settings import Settings

LONG = " ".join(f"word{n}" for n in range(300))


class Running:
    """A server in this process."""

    def __init__(self, root: Path, settings: Settings, listener: socket.socket) -> None:
        self.root = root
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.http = httpx.AsyncClient(base_url=self.url, timeout=30, trust_env=False)
        self.task = asyncio.create_task(run(settings, listener, fake_backend(root)))

    def rows(self) -> list[dict[str, Any]]:
        """What is committed in the ledger, as another process sees it."""
        with sqlite3.connect(self.root / "data" / "usage.db") as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("select * from requests order by rowid")]

    async def chat(self, text: str = "one two three", **fields: Any) -> httpx.Response:
        """A whole answer in the OpenAI dialect."""
        body = {"model": "demo", "messages": [{"role": "user", "content": text}], **fields}
        return await self.http.post("/v1/chat/completions", json=body)

    @asynccontextmanager
    async def stream(self, text: str = LONG) -> AsyncIterator[AsyncIterator[str]]:
        """The lines of a streamed answer in the Ollama dialect; leaving the block early hangs up."""
        body = {"model": "demo", "messages": [{"role": "user", "content": text}]}
        async with self.http.stream("POST", "/api/chat", json=body) as response:
            assert response.status_code == 200
            yield response.aiter_lines()

    async def num_active(self) -> int:
        """Requests that the server holds now, by its own gauge."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        gauges = ("headwater_requests_in_flight{", "headwater_requests_waiting{")
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith(gauges))

    def end(self) -> None:
        """What `kill` and the service manager send."""
        os.kill(os.getpid(), signal.SIGTERM)


@asynccontextmanager
async def serving(root: Path, model: dict[str, Any] | None = None, **env: str) -> AsyncIterator[Running]:
    """A server for the length of a test; nothing is left of it, and nothing went unrecorded."""
    describe_model(root, **(model or {}))
    settings = Settings.from_env(
        {"OLLAMA_HOST": "127.0.0.1:0", "OLLAMA_MODELS": f"{root}/models", "HEADWATER_DATA": f"{root}/data", **env}
    )
    server = Running(root, settings, bind(settings))
    try:
        assert (await server.http.get("/health")).status_code == 200
        yield server
    finally:
        await server.http.aclose()
        if not server.task.done():
            server.end()
        await asyncio.wait_for(server.task, 30)
        assert worker_pids() == []
        assert await asyncio.to_thread(sockets_below, root) == []


async def test_the_house_answers_before_any_model_is_loaded(tmp_path: Path) -> None:
    """Health, readiness, metrics and the usage report; none of them wakes a model or is usage."""
    async with serving(tmp_path) as server:
        assert (await server.http.get("/health")).json()["server"] == "headwater"
        assert (await server.http.get("/ready")).json() == {"status": "ready", "runners": 0}
        assert "headwater_models_loaded" in (await server.http.get("/metrics")).text
        usage = (await server.http.get("/admin/usage")).json()
        assert usage["totals"]["num_requests"] == 0
        assert (await server.http.get("/")).text == "Ollama is running"
        assert worker_pids() == []


async def test_each_dialect_answers_and_is_on_record_under_its_surface(tmp_path: Path) -> None:
    """One house, one model, every way in."""
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "/api/chat": ("ollama/completion", {"messages": [{"role": "user", "content": "one two"}]}),
        "/api/generate": ("ollama/completion", {"prompt": "one two"}),
        "/v1/chat/completions": ("openai/chat", {"messages": [{"role": "user", "content": "one two"}]}),
        "/v1/completions": ("openai/completion", {"prompt": "one two"}),
    }
    async with serving(tmp_path) as server:
        for path, (surface, body) in ways.items():
            answer = await server.http.post(path, json={"model": "demo", **body})
            assert answer.status_code == 200, answer.text
            assert "two" in answer.text
            row = server.rows()[-1]
            assert (row["route"], row["surface"], row["finish_reason"]) == (path, surface, "stop")
            assert row["id"] == answer.headers["x-request-id"]
            assert answer.headers["x-request-origin"].startswith(f'{surface}; caller="httpx@127.0.0.1"')
        assert len(server.rows()) == 4
        assert (await server.http.get("/admin/usage")).json()["totals"]["num_requests"] == 4


async def test_metrics_show_the_workers_under_their_model(tmp_path: Path) -> None:
    """A worker's own numbers, told apart by backend, model and mode."""
    async with serving(tmp_path) as server:
        await server.chat()
        text = (await server.http.get("/metrics")).text
        labels = '{backend="llama.cpp",mode="completion",model="demo:latest"}'
        assert f"headwater_engine_sequences_running{labels} 0.0" in text
        assert 'headwater_models_loaded{backend="llama.cpp",mode="completion",model="demo:latest"} 1.0' in text
        assert 'headwater_completion_tokens_total{caller="httpx@127.0.0.1"' in text
        assert (await server.http.get("/ready")).json()["runners"] == 1


@pytest.mark.parametrize("path", ["/v1/nope", "/engines/nope", "/engines/v1/nope"])
async def test_an_unknown_path_of_openai_is_answered_in_its_shape(tmp_path: Path, path: str) -> None:
    """An object with an error in it."""
    async with serving(tmp_path) as server:
        answer = await server.http.post(path, json={})
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/nope", "/api/nope", "/v2/nope"])
async def test_any_other_unknown_path_is_answered_as_ollama_does(tmp_path: Path, path: str) -> None:
    """Plain text."""
    async with serving(tmp_path) as server:
        answer = await server.http.get(path)
        assert (answer.status_code, answer.text) == (404, "404 page not found")
        assert answer.headers["x-request-id"]


async def test_every_refusal_names_its_request_and_is_on_record(tmp_path: Path) -> None:
    """Bad bodies, unknown models, foreign pages."""
    async with serving(tmp_path) as server:
        refused = [
            await server.http.post("/api/chat", content=b"{"),
            await server.http.post("/v1/chat/completions", content=b"[]"),
            await server.http.post("/api/chat", json={"model": "nope", "messages": []}),
            await server.http.post("/api/chat", json={}, headers={"Origin": "https://evil.example"}),
        ]
        assert [answer.status_code for answer in refused] == [400, 400, 404, 403]
        assert [row["status"] for row in server.rows()] == [400, 400, 404, 403]
        assert {row["finish_reason"] for row in server.rows()} == {"refused"}
        assert [row["id"] for row in server.rows()] == [answer.headers["x-request-id"] for answer in refused]


async def test_a_body_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    """Before it is read to its end."""
    async with serving(tmp_path, HEADWATER_BODY_LIMIT="1000") as server:
        assert (await server.chat("x" * 2000)).status_code == 413
        assert server.rows()[0]["error_code"] == "body_too_large"


async def test_a_client_that_hangs_up_in_the_stream_is_a_cancel(tmp_path: Path) -> None:
    """Its place is free at once, and what it had cost is on record."""
    async with serving(tmp_path, {"tokens_per_s": 100}, OLLAMA_NUM_PARALLEL="1") as server:
        async with server.stream() as lines:
            for _ in range(3):
                await anext(lines)
        await until(server.rows)
        (row,) = server.rows()
        assert (row["status"], row["finish_reason"], row["prompt_tokens"]) == (499, "cancel", 300)
        assert 3 <= row["completion_tokens"] < 200
        assert (await server.chat("free")).status_code == 200
        assert await server.num_active() == 0


async def test_a_client_that_hangs_up_while_the_model_loads_is_a_cancel(tmp_path: Path) -> None:
    """The load goes on for whoever asks next."""
    async with serving(tmp_path, {"load_s": 1.0}) as server:
        with pytest.raises(httpx.ReadTimeout):
            await server.http.post("/api/generate", json={"model": "demo", "prompt": "hi"}, timeout=0.3)
        await until(server.rows)
        (row,) = server.rows()
        assert (row["status"], row["finish_reason"], row["model"]) == (499, "cancel", "demo:latest")
        assert await server.num_active() == 0
        (pid,) = worker_pids()
        assert (await server.chat()).status_code == 200
        assert worker_pids() == [pid]


async def test_shutdown_lets_running_streams_end(tmp_path: Path) -> None:
    """Within the grace time a client notices nothing; new ones are not let in."""
    async with serving(tmp_path, {"tokens_per_s": 200}, HEADWATER_SHUTDOWN_GRACE="20s") as server:
        async with server.stream(" ".join("x" * 100)) as lines:
            await anext(lines)
            server.end()
            *_, last = [json.loads(line) async for line in lines]
        assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "stop", 100)
        await asyncio.wait_for(server.task, 20)
        with pytest.raises(httpx.ConnectError):
            await server.http.get("/health")
        (row,) = server.rows()
        assert (row["status"], row["completion_tokens"]) == (200, 100)


async def test_shutdown_ends_what_outlasts_the_grace_time_and_keeps_its_record(tmp_path: Path) -> None:
    """Nothing goes unrecorded, and nothing is left running."""
    async with serving(tmp_path, {"tokens_per_s": 20}, HEADWATER_SHUTDOWN_GRACE="1s") as server:
        async with server.stream() as lines:
            await anext(lines)
            server.end()
            *_, last = [json.loads(line) async for line in lines]
        assert "shutting down" in last["error"]
        await asyncio.wait_for(server.task, 20)
        (row,) = server.rows()
        assert (row["finish_reason"], row["error_code"]) == ("error", "server_busy")
        assert row["prompt_tokens"] == 300
        assert row["completion_tokens"] > 1


async def test_shutdown_during_a_load_does_not_wait_for_it(tmp_path: Path) -> None:
    """Who waits for the model is answered, and the half-loaded worker is gone."""
    async with serving(tmp_path, {"load_s": 600}, HEADWATER_SHUTDOWN_GRACE="1s") as server:
        asking = asyncio.create_task(server.chat())
        await until(worker_pids)
        server.end()
        await asyncio.wait_for(server.task, 20)
        with pytest.raises(httpx.HTTPError):
            (await asking).raise_for_status()
        (row,) = server.rows()
        assert (row["finish_reason"], row["status"], row["model"]) == ("refused", 503, "demo:latest")


class Talker(BaseHTTPRequestHandler):
    """A program that answers everything with one text."""

    text = b""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.text)))
        self.end_headers()
        self.wfile.write(self.text)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def listen(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a program that answers with the test's parameter."""
    talker = type("Named", (Talker,), {"text": request.param})
    with HTTPServer(("127.0.0.1", 0), talker) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(
    ("listen", "who"),
    [
        (b"Ollama is running", "Ollama"),
        (b'{"status":"ok","server":"headwater"}', "Headwater"),
        (b"hello", "another program"),
    ],
    indirect=["listen"],
)
def test_a_taken_port_says_who_has_it_and_what_to_do(
    listen: int, who: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start fails at once, proxies notwithstanding, and before anything was written."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    settings = Settings.from_env({"OLLAMA_HOST": f"127.0.0.1:{listen}", "HEADWATER_DATA": f"{tmp_path}/data"})
    assert serve(settings) == 1
    said = capsys.readouterr().err
    assert f"headwater: cannot listen on 127.0.0.1:{listen}: {who} is already listening there" in said
    assert "OLLAMA_HOST=" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a..b"])
def test_an_address_that_is_not_ours_is_a_clear_error(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback."""
    settings = Settings.from_env({"OLLAMA_HOST": f"{host}:1", "HEADWATER_DATA": f"{tmp_path}/data"})
    assert serve(settings) == 1
    assert f"headwater: cannot listen on {host}:1: " in capsys.readouterr().err


def test_a_data_directory_that_cannot_be_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback."""
    (tmp_path / "file").write_text("")
    settings = Settings.from_env({"OLLAMA_HOST": "127.0.0.1:0", "HEADWATER_DATA": f"{tmp_path}/file/data"})
    assert serve(settings) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_database_that_cannot_be_opened_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ledger's own words."""
    settings = Settings.from_env(
        {
            "OLLAMA_HOST": "127.0.0.1:0",
            "OLLAMA_MODELS": f"{tmp_path}/models",
            "HEADWATER_DATA": f"{tmp_path}/data",
            "HEADWATER_DATABASE_URL": "oracle://nowhere",
        }
    )
    assert serve(settings) == 1
    assert "headwater: " in capsys.readouterr().err
