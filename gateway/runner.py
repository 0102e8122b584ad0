"""The parent's handle on one worker: start it, wait until it is ready, talk to it, stop it.

Owns the Backend's `run` task and the HTTP connections to the worker's socket. Which models run, and for whom, is the
pool's business. The surprise: `generate` returns only after the worker has admitted the request, so that its refusals
are raised here, before anything was streamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from engines.backend import Backend, BackendConfiguration
from engines.errors import HeadwaterError, ModelLoadFailed, ServerBusy, UnsupportedCapability, WorkerCrashed
from engines.events import Embeddings, Event, Ranking, Timings, Tokenization, Usage
from engines.request import AnyRequest, EmbedRequest, GenerateRequest, Mode, RerankRequest, TokenizeRequest
from engines.wire import (
    DONE,
    ORIGIN_HEADER,
    RENDER_PATH,
    REQUEST_ID_HEADER,
    EventDecoder,
    decode_cost,
    decode_error,
    decode_prompt,
    encode_request,
    path_of,
)
from engines.wire_tokens import decode_tokenization, encode_tokenize, tokenize_path_of
from engines.wire_vectors import (
    EMBED_PATH,
    RERANK_PATH,
    decode_embeddings,
    decode_ranking,
    encode_embed,
    encode_rerank,
)
from gateway.connection import Client, ConnectionBroken, Response

log = logging.getLogger(__name__)

POLL_S = 0.02
EXPLAIN_S = 3.0
"""How long a broken connection waits for the worker's end to explain it."""
CHECK_S = 5.0
SILENCE_S = 90.0
"""A ready worker that has not answered for so long hangs; its own watchdog should have noticed before."""


class Health(msgspec.Struct):
    """What a worker says of itself; what it does not say is 0.

    Attributes:
        num_ctx: window of one request. size_bytes: its resident memory. progress: how much of its model is loaded, from
            0 to 1. num_threads: of its process, those that compute and others.
        num_running, num_waiting: sequences that hold KV cells, and that wait for some. num_cells, num_free_cells: all
            KV cells, and the free ones. totals: the engine's counters since it was loaded.
    """

    num_ctx: int = 0
    size_bytes: int = 0
    progress: float = 0.0
    pid: int = 0
    num_threads: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_cells: int = 0
    num_free_cells: int = 0
    totals: dict[str, float] = {}


class Runner:
    """One worker.

    Args:
        model: the id that the worker answers to. model_ref: the name behind it, for people.
        on_exit: called when the worker has ended by itself, or no longer answers, with the reason.
        silence_s: how long a ready worker may leave us without an answer.
    """

    def __init__(
        self,
        backend: Backend,
        socket: Path,
        *,
        model: str,
        model_ref: str,
        mode: Mode,
        config: BackendConfiguration,
        on_exit: Callable[[HeadwaterError], None],
        silence_s: float = SILENCE_S,
    ) -> None:
        self.model = model
        self.health = Health()
        self._backend = backend
        self._socket = socket
        self._model_ref = model_ref
        self._mode = mode
        self._config = config
        self._on_exit = on_exit
        self._silence_s = silence_s
        self._running: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._exit: HeadwaterError | None = None
        self._is_stopping = False
        self._client = Client(socket)

    def __repr__(self) -> str:
        return f"<Runner {self._model_ref} {self._socket.name}>"

    @property
    def num_ctx(self) -> int:
        """The window of one request; 0 before the worker is ready."""
        return self.health.num_ctx

    @property
    def size_bytes(self) -> int:
        """The memory that the worker was last seen to take."""
        return self.health.size_bytes

    @property
    def load_progress(self) -> float:
        """How much of the model is loaded, from 0 to 1."""
        return self.health.progress

    async def start(self, timeout_s: float) -> None:
        """Start the worker and wait until it is ready.

        Raises:
            ModelLoadFailed: it could not load the model, or took longer than `timeout_s`.
        """
        self._running = asyncio.create_task(self._run(), name=repr(self))
        try:
            async with asyncio.timeout(timeout_s if timeout_s != float("inf") else None):
                await self._until_ready(self._running)
        except TimeoutError:
            await self.stop()
            raise ModelLoadFailed(f"{self._model_ref} was not ready within {timeout_s:g} s") from None
        except BaseException:
            await self.stop()
            raise
        self._watching = asyncio.create_task(self._watch(self._running), name=f"watch {self!r}")

    async def _until_ready(self, running: asyncio.Task[None]) -> None:
        while not await self._is_ready():
            if running.done():
                raise self._exit or ModelLoadFailed(f"{self._model_ref} was stopped while it was loading")
            await asyncio.sleep(POLL_S)

    async def _run(self) -> None:
        """The worker's whole life; however it ends is told once."""
        try:
            await self._backend.run(self._socket, self.model, self._model_ref, self._mode, self._config)
        except HeadwaterError as error:
            self._exit = error
        except OSError as error:
            self._exit = ModelLoadFailed(f"could not start a worker: {error}")
        else:
            self._exit = WorkerCrashed("the worker ended without a reason")
        if not self._is_stopping:
            log.warning("%r ended: %s", self, self._exit.message.splitlines()[0])
            self._on_exit(self._exit)

    async def observe(self, timeout_s: float) -> None:
        """Bring `health` up to date, unless the worker takes longer to answer."""
        await self._look(timeout_s)

    async def _is_ready(self) -> bool:
        return await self._look(timeout_s=2) == 200

    async def _look(self, timeout_s: float) -> int:
        """Ask how the worker is; the status of its answer, 0 without one."""
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._client.send("GET", "/health")
                body = await response.read()
        except (ConnectionBroken, TimeoutError):
            return 0
        with contextlib.suppress(msgspec.DecodeError):  # another server's health need not be ours
            self.health = msgspec.json.decode(body, type=Health)
        return response.status

    async def _watch(self, running: asyncio.Task[None]) -> None:
        """Look after a ready worker, and end it when it no longer answers."""
        silent_s = 0.0
        while not running.done():
            await asyncio.sleep(min(CHECK_S, self._silence_s / 4))
            started = asyncio.get_running_loop().time()
            if await self._look(timeout_s=self._silence_s - silent_s):
                silent_s = 0.0
                continue
            silent_s += asyncio.get_running_loop().time() - started
            if silent_s >= self._silence_s and not self._is_stopping:
                self._exit = WorkerCrashed(f"the model's worker has not answered for {silent_s:.0f} s and was ended")
                log.warning("%r hangs: %s", self, self._exit.message)
                running.cancel()
                self._on_exit(self._exit)
                return

    async def generate(self, request: GenerateRequest) -> Reply:
        """Submit a request; returns once it is admitted. Raises what the worker refused it with, or WorkerCrashed."""
        headers = {ORIGIN_HEADER: request.origin.surface, REQUEST_ID_HEADER: request.id}
        try:
            response = await self._client.send("POST", path_of(request), encode_request(request, self.model), headers)
            if response.status != 200:
                raise _refusal(await response.read())
        except ConnectionBroken as error:
            raise await self.explain(error) from error
        return Reply(self, request.id, response)

    async def render(self, request: GenerateRequest) -> str:
        """The prompt of a request as text. Raises as `generate` does."""
        return decode_prompt(await self._compute(request, RENDER_PATH, encode_request(request, self.model)))

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """The vectors of a request. Raises what the worker refused it with, or WorkerCrashed."""
        return decode_embeddings(await self._compute(request, EMBED_PATH, encode_embed(request, self.model)))

    async def rerank(self, request: RerankRequest) -> Ranking:
        """The scores of a request. Raises as `embed` does."""
        return decode_ranking(await self._compute(request, RERANK_PATH, encode_rerank(request, self.model)))

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """A text with its token ids. Raises as `embed` does."""
        body = encode_tokenize(request, self.model)
        return decode_tokenization(request, await self._compute(request, tokenize_path_of(request), body))

    async def _compute(self, request: AnyRequest, path: str, body: bytes) -> bytes:
        headers = {ORIGIN_HEADER: request.origin.surface, REQUEST_ID_HEADER: request.id}
        try:
            response = await self._client.send("POST", path, body, headers)
            answer = await response.read()
        except ConnectionBroken as error:
            raise await self.explain(error) from error
        if response.status == 200:
            return answer
        refusal = _refusal(answer)
        if isinstance(refusal, UnsupportedCapability):  # the worker knows its model by a digest only
            raise UnsupportedCapability(self._model_ref, *refusal.capabilities)
        raise refusal

    async def cancel(self, request_id: str) -> tuple[Usage, Timings] | None:
        """End a request within a step; what it has cost, or None when the worker no longer knows it."""
        found = await self._ask("POST", f"/cancel/{request_id}", timeout_s=10)
        return decode_cost(found) if found is not None else None

    async def metrics(self) -> str:
        """The worker's Prometheus text, empty when it does not answer at once."""
        return (await self._ask("GET", "/metrics", timeout_s=1) or b"").decode("utf-8", "replace")

    async def _ask(self, method: str, path: str, *, timeout_s: float) -> bytes | None:
        """The body of a 200, or None for whatever else happens."""
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._client.send(method, path)
                body = await response.read()
        except (ConnectionBroken, TimeoutError):
            return None
        return body if response.status == 200 else None

    async def stop(self) -> None:
        """End the worker and wait until nothing is left of it. Harmless when done twice."""
        self._is_stopping = True
        if self._watching is not None:
            self._watching.cancel()
        if self._running is not None and not self._running.done():
            if not self._running.cancelling():
                self._running.cancel()
            await asyncio.wait({self._running})
        self._client.close()

    async def explain(self, error: Exception) -> HeadwaterError:
        """Why a connection broke: the worker's own end, if it ended."""
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=EXPLAIN_S)
        if self._is_stopping and self._exit is None:
            return ServerBusy("the model was stopped: the server is shutting down")
        return self._exit or WorkerCrashed(f"the connection to the model's worker broke: {error!r}")


class Reply:
    """The events of one admitted request."""

    def __init__(self, runner: Runner, request_id: str, response: Response) -> None:
        self._runner = runner
        self._id = request_id
        self._response = response
        self._decoder = EventDecoder()
        self._ready: deque[Event] = deque()
        self._rest = b""
        self._error: HeadwaterError | None = None

    @property
    def usage(self) -> Usage:
        """What the request had cost at the event read last."""
        return self._decoder.usage

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._ready:
            if self._error is not None:
                raise self._error
            try:
                chunk = await self._response.next_chunk()
            except ConnectionBroken as error:
                raise await self._runner.explain(error) from error
            if not chunk:
                raise StopAsyncIteration
            self._read(chunk)
        return self._ready.popleft()

    def _read(self, chunk: bytes) -> None:
        """Decode the lines that are whole: events are single lines, which is what OpenAI servers send.

        One function for every token, and no chain of generators: it is the gateway's hottest path.
        """
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:") or (data := line[5:].strip()) == DONE:
                continue
            try:
                self._ready += self._decoder.decode(data)
            except HeadwaterError as error:  # the worker's last word; what came before is still told
                self._error = error
                return

    async def cancel(self) -> tuple[Usage, Timings] | None:
        """End the request and give the connection back; what it has cost, if the worker could tell."""
        cost = await self._runner.cancel(self._id)
        self._response.close()
        return cost

    async def finish(self) -> None:
        """Read what comes after the last event, which is nothing of interest, so that the connection can be reused."""
        with contextlib.suppress(HeadwaterError):
            async for _ in self:
                pass
        self._response.close()

    def close(self) -> None:
        """Let go of the connection."""
        self._response.close()


def _refusal(body: bytes) -> HeadwaterError:
    try:
        return decode_error(msgspec.json.decode(body)["error"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return HeadwaterError(f"the worker refused: {body[:300].decode('utf-8', 'replace')}")
