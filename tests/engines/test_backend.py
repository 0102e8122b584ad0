# ruff: noqa: ASYNC240  # a test may look at a path
from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from processes import eventually, is_alive

from engines.backend import BackendConfiguration
from engines.errors import ModelLoadFailed, WorkerCrashed
from engines.inference import LoadConfig
from engines.llamacpp import backend as backend_module
from engines.llamacpp.backend import LlamaCppBackend
from engines.request import Mode

DEMO = Path(__file__).parents[2] / "engines/store/demo/demo.gguf"
DIGEST = "sha256:" + "a" * 64
PATIENCE_S = 20.0

Run = tuple[asyncio.Task[None], httpx.AsyncClient]


@pytest.fixture
def socket() -> Iterator[Path]:
    """A path short enough for a Unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="hw"))
    yield folder / "worker.sock"
    assert [path.name for path in folder.iterdir()] == [], "the socket was left behind"
    shutil.rmtree(folder)


def backend(folder: Path, **says: Any) -> LlamaCppBackend:
    """A backend of fake workers whose model says this."""
    path = folder / "model.json"
    path.write_text(json.dumps(says))
    return LlamaCppBackend(lambda model: path, engine="fake")


def children() -> list[int]:
    """The processes that we started and that still run."""
    running = [child for child in psutil.Process().children() if is_alive(child.pid)]
    return [child.pid for child in running if "engines.worker" in child.cmdline()]  # not what other tests left


@asynccontextmanager
async def running(
    backend: LlamaCppBackend, socket: Path, mode: Mode = Mode.COMPLETION, **options: Any
) -> AsyncIterator[Run]:
    """A backend's run, cancelled at the end, with a client on its socket."""
    run = asyncio.create_task(backend.run(socket, DIGEST, "demo:latest", mode, **options))
    try:
        async with httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(socket)), base_url="http://worker", timeout=PATIENCE_S
        ) as client:
            yield run, client
    finally:
        run.cancel()
        await asyncio.wait({run})


async def status_of(run: asyncio.Task[None], client: httpx.AsyncClient, wanted: Callable[[int], bool]) -> int:
    """The first status of `/health` that is wanted; it is asked again and again while the worker starts."""
    async with asyncio.timeout(PATIENCE_S):
        while not run.done():
            try:
                status = (await client.get("/health")).status_code
            except httpx.TransportError:
                status = 0
            if wanted(status):
                return status
            await asyncio.sleep(0.01)
    await run
    raise AssertionError("the run ended without an error")


def chat(model: str, text: str = "one two three") -> dict[str, Any]:
    """A request's body."""
    return {"model": model, "messages": [{"role": "user", "content": text}]}


async def test_run_serves_until_cancelled_and_leaves_nothing_behind(tmp_path: Path, socket: Path) -> None:
    """A ready worker answers on its socket; cancelled, its process and its socket are gone."""
    async with running(backend(tmp_path), socket) as (run, client):
        await status_of(run, client, lambda status: status == 200)
        [pid] = children()
        reply = await client.post("/v1/chat/completions", json=chat(DIGEST))
        assert reply.status_code == 200
        assert reply.text.endswith("data: [DONE]\n\n")
    assert run.cancelled()
    assert not is_alive(pid)
    assert not socket.exists()


async def test_it_answers_to_its_names_and_to_no_other(tmp_path: Path, socket: Path) -> None:
    """The model's id and the client's name mean it; any other is misdirected."""
    async with running(backend(tmp_path), socket) as (run, client):
        await status_of(run, client, lambda status: status == 200)
        statuses = [
            (await client.post("/v1/chat/completions", json=chat(name))).status_code
            for name in (DIGEST, "demo:latest", "llama3:latest", "")
        ]
        assert statuses == [200, 200, 421, 421]
        error = (await client.post("/v1/chat/completions", json=chat("llama3:latest"))).json()["error"]
        assert error["code"] == "wrong_model"


async def test_health_is_503_while_loading(tmp_path: Path, socket: Path) -> None:
    """The socket is there before the model is."""
    async with running(backend(tmp_path, load_s=1.0), socket) as (run, client):
        assert await status_of(run, client, lambda status: status > 0) == 503
        reply = await client.post("/v1/chat/completions", json=chat(DIGEST))
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "model_not_loaded")
        assert await status_of(run, client, lambda status: status != 503) == 200


async def test_cancelling_a_load_ends_it_at_once(tmp_path: Path, socket: Path) -> None:
    """A load that takes for ever does not keep the worker alive, nor wait for the grace time."""
    async with running(backend(tmp_path, load_s=600), socket) as (run, client):
        await status_of(run, client, lambda status: status == 503)
        [pid] = children()
        started = time.monotonic()
    assert not is_alive(pid)
    assert time.monotonic() - started < 4


async def test_a_failed_load_says_why(tmp_path: Path, socket: Path) -> None:
    """The worker's own word comes first."""
    with pytest.raises(ModelLoadFailed, match=r"^out of imaginary memory"):
        await backend(tmp_path, fail="out of imaginary memory").run(socket, DIGEST, "demo", Mode.COMPLETION)
    assert children() == []


async def test_a_crash_is_told_as_one_and_nothing_is_restarted(tmp_path: Path, socket: Path) -> None:
    """The request in flight breaks off, and the run ends with an error."""
    async with running(backend(tmp_path, crash_after=1), socket) as (run, client):
        await status_of(run, client, lambda status: status == 200)
        with pytest.raises(httpx.TransportError):
            await client.post("/v1/chat/completions", json=chat(DIGEST))
        with pytest.raises(WorkerCrashed, match="exit status 9"):
            await run
        assert children() == []
    assert not socket.exists()


async def test_a_killed_worker_is_a_crash(tmp_path: Path, socket: Path) -> None:
    """As when the system runs out of memory."""
    async with running(backend(tmp_path), socket) as (run, client):
        await status_of(run, client, lambda status: status == 200)
        psutil.Process(children()[0]).kill()
        with pytest.raises(WorkerCrashed, match="killed by SIGKILL"):
            await run


async def test_a_stale_socket_is_no_obstacle(tmp_path: Path, socket: Path) -> None:
    """A file that a killed server left behind is replaced."""
    socket.write_text("")
    async with running(backend(tmp_path), socket) as (run, client):
        assert await status_of(run, client, lambda status: status > 0) in (200, 503)


@pytest.mark.parametrize("mode", [Mode.EMBEDDING, Mode.RERANKING])
async def test_it_serves_vectors_and_scores_too(tmp_path: Path, socket: Path, mode: Mode) -> None:
    """A worker serves one mode, and every mode has workers."""
    async with running(backend(tmp_path), socket, mode=mode) as (run, client):
        assert await status_of(run, client, lambda status: status == 200) == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (DEMO.read_bytes()[:100_000], "failed to parse GGUF"),
        (DEMO.read_bytes()[:-100_000], "cut short"),
        (b"not a model at all" * 100, "failed to parse GGUF"),
        (b"", "failed to parse GGUF"),
        (None, "not found"),
    ],
    ids=["truncated header", "truncated tensors", "text", "empty", "missing"],
)
async def test_a_damaged_model_is_a_failed_load(
    tmp_path: Path, socket: Path, content: bytes | None, words: str
) -> None:
    """llama.cpp's worker says what is wrong with the file, and does not crash over it."""
    path = tmp_path / "demo.gguf"
    if content is not None:
        path.write_bytes(content)
    real = LlamaCppBackend(lambda model: path)
    with pytest.raises(ModelLoadFailed, match=words):
        await real.run(socket, DIGEST, "demo", Mode.COMPLETION)


@pytest.mark.parametrize(
    ("config", "num_ctx"),
    [
        (None, 4096),
        (BackendConfiguration(context_size=512, num_parallel=2), 512),
        (BackendConfiguration(context_size=-1), 4096),
        (BackendConfiguration(context_size=10**9), 4096),
    ],
    ids=["unsaid", "small", "the model's own", "too large"],
)
async def test_the_window_is_what_was_asked_for(
    socket: Path, config: BackendConfiguration | None, num_ctx: int
) -> None:
    """Within what the model was trained with, which is 4096 for the demo model."""
    async with running(LlamaCppBackend(lambda model: DEMO), socket, config=config) as (run, client):
        await status_of(run, client, lambda status: status == 200)
        assert (await client.get("/health")).json()["num_ctx"] == num_ctx


def test_status_names_the_library_without_importing_it() -> None:
    """The gateway must stay free of llama.cpp."""
    assert LlamaCppBackend(lambda model: DEMO).status().startswith("Running: llama.cpp (llama-cpp-python ")


async def test_required_memory_is_at_least_the_file() -> None:
    """The weights are read into memory."""
    needed = await LlamaCppBackend(lambda model: DEMO).required_memory(DIGEST)
    assert needed.ram_bytes is not None
    assert needed.ram_bytes >= DEMO.stat().st_size


def test_a_worker_dies_with_a_gateway_that_was_killed(tmp_path: Path, socket: Path) -> None:
    """SIGKILL of the parent, which cannot clean up, ends the worker too."""
    (tmp_path / "model.json").write_text("{}")
    program = f"""
import asyncio, pathlib
from engines.llamacpp.backend import LlamaCppBackend
from engines.request import Mode
backend = LlamaCppBackend(lambda model: pathlib.Path({str(tmp_path / "model.json")!r}), engine="fake")
asyncio.run(backend.run(pathlib.Path({str(socket)!r}), "id", "name", Mode.COMPLETION))
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        eventually(socket.exists)
        [worker] = psutil.Process(parent.pid).children()
    finally:
        parent.kill()
        parent.wait()
    eventually(lambda: not is_alive(worker.pid))
    socket.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("config", "has_gpu", "chosen"),
    [
        (LoadConfig(), False, (False, False)),
        (LoadConfig(), True, (True, None)),
        (LoadConfig(gpu_layers=0), True, (False, False)),
        (LoadConfig(cache_type="q8_0"), False, (False, None)),
        (LoadConfig(flash_attention=True), False, (False, True)),
    ],
)
def test_processors_attend_in_streams_and_without_flash_attention(
    monkeypatch: pytest.MonkeyPatch, config: LoadConfig, has_gpu: bool, chosen: tuple[bool, bool | None]
) -> None:
    """Unless somebody asks for it, or the cache needs it."""
    monkeypatch.setattr(backend_module, "_has_library", lambda name: has_gpu)
    attention = backend_module._choose_attention(config)
    assert (attention.unified_cache, attention.flash_attention) == chosen


def test_streams_are_a_window_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are shared, four do."""
    backend = LlamaCppBackend(lambda model: DEMO)
    assert backend.windows() == 8
    assert backend.windows(BackendConfiguration(flash_attention=True)) == 8
    monkeypatch.setattr(backend_module, "_has_library", lambda name: True)
    assert backend.windows() == 4
