"""The worker process: one InferenceBackend behind an OpenAI API on one Unix socket.

`python -m engines.worker` is what a Backend runs. It serves exactly one model (421 for any other), answers 503 on
`/health` until it is loaded, and never outlives its parent: the parent holds the other end of our standard input, and
when that closes, for whatever reason, we are gone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from engines.errors import Cancelled, HeadwaterError, WrongModel
from engines.events import Timings, Usage
from engines.inference import Computation, Generation, InferenceBackend, LoadConfig, Work
from engines.request import EmbedRequest, GenerateRequest, Mode, RerankRequest
from engines.watchdog import LOOP_LIMIT_S, Patience, step_limit_s, watch
from engines.wire import (
    DONE,
    ORIGIN_HEADER,
    RENDER_PATH,
    REQUEST_ID_HEADER,
    decode_request,
    encode_cost,
    encode_error,
    encode_event,
    encode_prompt,
)
from engines.wire_tokens import DETOKENIZE_PATH, TOKENIZE_PATH, decode_tokenize, encode_tokenization
from engines.wire_vectors import (
    EMBED_PATH,
    RERANK_PATH,
    decode_embed,
    decode_rerank,
    encode_embeddings,
    encode_ranking,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
W = TypeVar("W", bound=Work)
R = TypeVar("R", GenerateRequest, EmbedRequest, RerankRequest)

EXIT_LOAD_FAILED = 3
LOAD_ERROR_PREFIX = "load failed: "
MAX_COSTS = 1024


class Worker:
    """The app around one engine.

    Args:
        engine: loaded by the time `/health` answers 200. names: every name that means its model.
    """

    def __init__(self, engine: InferenceBackend, names: frozenset[str]) -> None:
        self._engine = engine
        self._names = names
        self._running: dict[str, asyncio.Future[Any]] = {}  # of Work, once it is admitted
        self._costs: OrderedDict[str, bytes] = OrderedDict()  # of the requests that ended last

    def app(self) -> Starlette:
        """The ASGI app."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/v1/chat/completions", self.generate, methods=["POST"]),
                Route("/v1/completions", self.generate, methods=["POST"]),
                Route(EMBED_PATH, self.embed, methods=["POST"]),
                Route(RERANK_PATH, self.rerank, methods=["POST"]),
                Route(RENDER_PATH, self.render, methods=["POST"]),
                Route(TOKENIZE_PATH, self.tokenize, methods=["POST"]),
                Route(DETOKENIZE_PATH, self.tokenize, methods=["POST"]),
                Route("/cancel/{id}", self.cancel, methods=["POST"]),
            ],
            exception_handlers={HeadwaterError: _error_response},
        )

    async def health(self, http: Request) -> Response:
        """200 with the engine's numbers once the model is loaded, 503 and how far it is before."""
        stats, process = self._engine.stats(), psutil.Process()
        body = {
            "num_ctx": stats.num_ctx,
            "size_bytes": process.memory_info().rss,
            "progress": round(stats.load_progress, 3),
            "pid": process.pid,
            "num_threads": process.num_threads(),
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "num_cells": stats.num_cells,
            "num_free_cells": stats.num_free_cells,
            "totals": stats.totals,
        }
        return Response(json.dumps(body), 200 if self._engine.is_loaded() else 503, media_type="application/json")

    async def metrics(self, http: Request) -> Response:
        """The engine's numbers as Prometheus text."""
        return Response(render_metrics(self._engine), media_type="text/plain; version=0.0.4")

    async def generate(self, http: Request) -> Response:
        """Admit a request and stream its events; refusals are real statuses."""
        request = decode_request(await http.body(), **_named(http))
        generation = await self._admit(request, self._engine.generate)
        return _Streaming(generation, on_end=lambda: self._end(request.id, generation))

    async def render(self, http: Request) -> Response:
        """The prompt of a request that is not generated, as text."""
        request = decode_request(await http.body(), **_named(http))
        self._check(request.model)
        return Response(encode_prompt(await self._engine.render(request)), media_type="application/json")

    async def embed(self, http: Request) -> Response:
        """Admit a request and answer with its vectors."""
        request = decode_embed(await http.body(), **_named(http))
        computation = await self._admit(request, self._engine.embed)
        return await self._compute(http, request.id, computation, encode_embeddings)

    async def rerank(self, http: Request) -> Response:
        """Admit a request and answer with its scores."""
        request = decode_rerank(await http.body(), **_named(http))
        computation = await self._admit(request, self._engine.rerank)
        return await self._compute(http, request.id, computation, encode_ranking)

    async def tokenize(self, http: Request) -> Response:
        """Token ids of a text, or the text of token ids."""
        request = decode_tokenize(await http.body(), **_named(http))
        self._check(request.model)
        found = await self._engine.tokenize(request)
        return Response(encode_tokenization(request, found), media_type="application/json")

    def _check(self, model: str) -> None:
        if model not in self._names:
            raise WrongModel(model, min(self._names))

    async def _admit(self, request: R, admit: Callable[[R], Awaitable[W]]) -> W:
        """Let the engine take in a request, which can be cancelled from now on."""
        self._check(request.model)
        admitted = asyncio.ensure_future(admit(request))
        self._running[request.id] = admitted
        try:
            return await admitted
        except BaseException as error:
            self._running.pop(request.id, None)
            if isinstance(error, asyncio.CancelledError) and not _is_ending():  # only the request was cancelled
                raise Cancelled from None
            raise

    async def _compute(
        self,
        http: Request,
        request_id: str,
        computation: Computation[T],
        encode: Callable[[T, Usage, Timings], bytes],
    ) -> Response:
        """The computation's result, unless the caller hangs up: then it is cancelled."""
        leaving = asyncio.ensure_future(_cancel_when_left(http, computation))
        try:
            result = await computation.result()
            return Response(encode(result, computation.usage, computation.timings), media_type="application/json")
        finally:
            leaving.cancel()
            await asyncio.shield(asyncio.ensure_future(computation.aclose()))
            self._end(request_id, computation)

    def _end(self, request_id: str, work: Work) -> None:
        """Remember what a request has cost: the question may come when it is already over."""
        self._running.pop(request_id, None)
        self._costs[request_id] = encode_cost(work.usage, work.timings)
        if len(self._costs) > MAX_COSTS:
            self._costs.popitem(last=False)

    async def cancel(self, http: Request) -> Response:
        """End a request within one step, and say what it has cost; one that is not admitted yet costs nothing."""
        request_id = http.path_params["id"]
        admitted = self._running.get(request_id)
        if admitted is not None:
            admitted.cancel()
            await asyncio.wait({admitted})
            if not admitted.cancelled() and admitted.exception() is None:
                work = admitted.result()
                await work.aclose()
                return Response(encode_cost(work.usage, work.timings), media_type="application/json")
        cost = self._costs.get(request_id)
        return Response(cost, media_type="application/json") if cost else Response(status_code=404)


class _Streaming(StreamingResponse):
    """The events of one generation, which is closed however the response ends, even one that never began."""

    def __init__(self, generation: Generation, on_end: Callable[[], object]) -> None:
        super().__init__(self._frames(), media_type="text/event-stream")
        self._generation = generation
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.shield(asyncio.ensure_future(self._generation.aclose()))
            self._on_end()

    async def _frames(self) -> AsyncIterator[bytes]:
        try:
            async for event in self._generation:
                yield encode_event(event, self._generation.usage)
            yield b"data: " + DONE + b"\n\n"
        except HeadwaterError as error:
            yield b"data: " + encode_error(error) + b"\n\n"


def _is_ending() -> bool:
    """Whether this task itself was cancelled, as all are when the server ends."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _named(http: Request) -> dict[str, str]:
    """What a request's headers say of it."""
    return {"id": http.headers.get(REQUEST_ID_HEADER, ""), "surface": http.headers.get(ORIGIN_HEADER, "")}


async def _cancel_when_left(http: Request, work: Work) -> None:
    """`http`'s body must have been read: what comes next is the hang-up."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    await work.aclose()


async def _error_response(http: Request, error: Exception) -> Response:
    assert isinstance(error, HeadwaterError)
    return Response(encode_error(error), error.status, media_type="application/json")


def render_metrics(engine: InferenceBackend) -> str:
    """Prometheus text; the gateway adds the labels `backend`, `model` and `mode`."""
    stats = engine.stats()
    gauges = {
        "engine_sequences_running": ("Sequences that hold KV cells.", stats.num_running),
        "engine_sequences_waiting": ("Sequences that wait for KV cells.", stats.num_waiting),
        "engine_kv_cells": ("KV cells in all.", stats.num_cells),
        "engine_kv_cells_free": ("KV cells that are free.", stats.num_free_cells),
    }
    lines = []
    for name, (text, value) in gauges.items():
        lines += [f"# HELP headwater_{name} {text}", f"# TYPE headwater_{name} gauge", f"headwater_{name} {value}"]
    for total, amount in stats.totals.items():
        name = f"headwater_engine_{total.removesuffix('_s')}{'_seconds' if total.endswith('_s') else ''}_total"
        lines += [f"# HELP {name} The engine's {total} since it was loaded.", f"# TYPE {name} counter"]
        lines.append(f"{name} {amount}")
    return "\n".join(lines) + "\n"


def die_with_parent() -> None:
    """End this process when its standard input closes, which the parent's death does whatever its cause."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def make_engine(name: str, mode: Mode) -> InferenceBackend:
    """The engine of that name. Only the one that is asked for is imported."""
    if name == "fake":
        from engines.fake import FakeEngine  # noqa: PLC0415  # no other engine's libraries

        return FakeEngine()
    if mode is not Mode.COMPLETION:
        from engines.llamacpp.embedding import EmbeddingEngine  # noqa: PLC0415  # the fake must not load llama.cpp

        return EmbeddingEngine(mode, on_failure=lambda error: os._exit(1))
    from engines.llamacpp.engine import LlamaCppEngine  # noqa: PLC0415  # as above

    return LlamaCppEngine(on_failure=lambda error: os._exit(1))


def _watch(engine: InferenceBackend, config: LoadConfig) -> None:
    info = engine.model_info()
    limit_s = step_limit_s(config.step_limit_s, info.size if info else 0)
    watch(engine, asyncio.get_running_loop(), Patience(step_limit_s=limit_s, loop_limit_s=min(limit_s, LOOP_LIMIT_S)))


def go_first() -> None:
    """Be what the system kills when memory runs out, instead of the gateway or a stranger."""
    with contextlib.suppress(OSError):  # there is no such thing outside Linux
        Path("/proc/self/oom_score_adj").write_text("900")


async def serve(engine: InferenceBackend, socket: Path, model: Path, config: LoadConfig, names: frozenset[str]) -> int:
    """Load the model and serve it until SIGTERM; returns the exit status."""
    server = uvicorn.Server(
        uvicorn.Config(
            Worker(engine, names).app(),
            uds=str(socket),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=3600,  # the gateway keeps connections for reuse
            timeout_graceful_shutdown=2,  # less than the backend's grace, which ends in SIGKILL
        )
    )
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn handles it while it serves, then raises it once more
    serving = asyncio.create_task(server.serve())
    loading = asyncio.ensure_future(engine.load(model, config))
    await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        os._exit(0)  # told to stop, and a load cannot be interrupted
    try:
        await loading
    except HeadwaterError as error:
        sys.stderr.write(f"{LOAD_ERROR_PREFIX}{error.message}\n")
        server.should_exit = True
        await serving
        return EXIT_LOAD_FAILED
    _watch(engine, config)
    await serving
    await engine.unload()
    return 0


def main() -> None:
    """Entry point of `python -m engines.worker`."""
    parser = argparse.ArgumentParser(prog="engines.worker", description="serve one model on a Unix socket")
    parser.add_argument("--engine", choices=["llamacpp", "fake"], default="llamacpp")
    parser.add_argument("--mode", type=Mode, choices=list(Mode), default=Mode.COMPLETION)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--name", action="append", required=True, help="a name that means this model; repeatable")
    parser.add_argument("--config", type=json.loads, default={}, help="LoadConfig as JSON")
    args = parser.parse_args()
    die_with_parent()
    go_first()
    faulthandler.enable(all_threads=False)  # a crash in C tells where, on stderr
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    said: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in args.config.items()}
    args.socket.unlink(missing_ok=True)
    with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
        engine = make_engine(args.engine, args.mode)
        status = runner.run(serve(engine, args.socket, args.model, LoadConfig(**said), frozenset(args.name)))
    args.socket.unlink(missing_ok=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
