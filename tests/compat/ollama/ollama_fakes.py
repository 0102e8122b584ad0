"""A house that answers what it is told to, and a real server in front of it, for the tests of the Ollama dialect."""

import asyncio
import contextlib
import dataclasses
import socket
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from compat.ollama.routes import OllamaRoutes
from compat.ollama.transport import http_error_response
from engines.errors import InvalidModelName, ModelNotFound
from engines.events import (
    ChoiceFinished,
    Embeddings,
    Event,
    Finished,
    FinishReason,
    Ranking,
    TextDelta,
    Timings,
    Tokenization,
    Usage,
)
from engines.model import ModelCard, ModelDescription, RunnerStatus, TensorInfo
from engines.request import EmbedRequest, GenerateRequest, Mode, Origin, RerankRequest, TokenizeRequest

ORIGIN = Origin(surface="ollama/completion", caller="tester")
BODY_LIMIT_BYTES = 100_000
NOW_NS = 1_767_323_045_120_000_000
NOW = "2026-01-02T03:04:05.12Z"
TIMINGS = Timings(queue_s=0.001, load_s=0.008, prefill_s=0.04, decode_s=0.06, total_s=0.512)

Script = Sequence[Event | Exception | asyncio.Event]
"""What one answer does: emit an event, fail, or wait until the test lets it go on."""


def card(name: str = "llama3.2:latest", *capabilities: str, **fields: Any) -> ModelCard:
    """A model that can complete and has these capabilities."""
    model = ModelCard(
        name=name,
        full_name=f"registry.ollama.ai/library/{name}",
        digest="a80c" + "0" * 60,
        weights=Path("/models/blobs/sha256-1"),
        weights_digest="sha256:" + "1" * 64,
        size_bytes=2019393189,
        modified_at=NOW_NS / 1e9,
        family="llama",
        families=("llama",),
        parameter_size="3.2B",
        quantization="Q4_K_M",
        context_length=131072,
        embedding_length=3072,
        capabilities=("completion", *capabilities),
    )
    return dataclasses.replace(model, **fields)


def runner(expires_at: float = NOW_NS / 1e9 + 300, **fields: Any) -> RunnerStatus:
    """A loaded model."""
    status = RunnerStatus(
        model=card(parent="llama3.1:8b"),
        backend="llama.cpp",
        mode=Mode.COMPLETION,
        state="ready",
        num_active=0,
        size_bytes=3_100_000_000,
        size_vram_bytes=0,
        num_ctx=4096,
        expires_at=expires_at,
    )
    return dataclasses.replace(status, **fields)


def finished(reason: FinishReason = FinishReason.STOP, tokens: tuple[int, ...] = (), **usage: int) -> list[Event]:
    """The end of an answer."""
    return [ChoiceFinished(reason), Finished(reason, Usage(**usage), TIMINGS, tokens)]


def says(*texts: str) -> list[Event]:
    """A whole answer with 9 prompt tokens and one token a piece."""
    return [*map(TextDelta, texts), *finished(prompt_tokens=9, completion_tokens=len(texts))]


class Playback:
    """The events of one answer; `closed` says whether the reader closed it."""

    def __init__(self, script: Script) -> None:
        self.script = iter(script)
        self.closed = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        for step in self.script:
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, Exception):
                raise step
            else:
                return step
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Remember that we were closed."""
        self.closed.set()


class FakeServices:
    """Plays the one script for each request.

    Attributes:
        refusal: raised instead of admitting a request. asked: set when one is.
        requests, loads, unloads: what was asked for, in order. playbacks: the answers.
    """

    def __init__(self, script: Script | None = None, *, cards: Sequence[ModelCard] = ()) -> None:
        self.script: Script = says("Hel", "lo") if script is None else script
        self.cards = list(cards) or [card()]
        self.runners: list[RunnerStatus] = []
        self.metadata: dict[str, Any] = {"general.architecture": "llama"}
        self.projector: dict[str, Any] | None = None
        self.refusal: Exception | None = None
        self.requests: list[GenerateRequest] = []
        self.embeds: list[EmbedRequest] = []
        self.reranks: list[RerankRequest] = []
        self.tokenizations: list[TokenizeRequest] = []
        self.loads: list[GenerateRequest] = []
        self.unloads: list[GenerateRequest] = []
        self.playbacks: list[Playback] = []
        self.asked = asyncio.Event()

    async def find(self, name: str) -> ModelCard:
        """One of `cards`, as typed, or with the tag `latest`, or without `:local`."""
        if " " in name.strip() or not name.strip():
            raise InvalidModelName(name)
        plain = name.strip().removesuffix(":local")
        for model in self.cards:
            if model.name in (plain, f"{plain}:latest"):
                return model
        raise ModelNotFound(name)

    async def list_models(self) -> list[ModelCard]:
        """All `cards`."""
        return self.cards

    async def describe(self, name: str) -> ModelDescription:
        """The model with `metadata` and one tensor."""
        tensors = (TensorInfo("token_embd.weight", "Q8_0", (8, 4)),)
        return ModelDescription(await self.find(name), self.metadata, tensors, 32, self.projector)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """The script, or the refusal."""
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        self.playbacks.append(Playback(self.script))
        self.asked.set()
        return self.playbacks[-1]

    async def render(self, request: GenerateRequest) -> str:
        """Every prompt is the same."""
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        return "<user>hi"

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """One token for each character. Or the refusal."""
        self.tokenizations.append(request)
        if self.refusal is not None:
            raise self.refusal
        text = request.text if request.text is not None else "".join(map(chr, request.tokens or ()))
        return Tokenization(text, tuple(map(ord, text)), TIMINGS)

    async def load(self, request: GenerateRequest) -> None:
        """Remember, or refuse."""
        self.loads.append(request)
        if self.refusal is not None:
            raise self.refusal

    async def unload(self, request: GenerateRequest) -> None:
        """Remember."""
        self.unloads.append(request)

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Vectors that count: the numbers of each are twice those of the one before. Or the refusal."""
        self.embeds.append(request)
        if self.refusal is not None:
            raise self.refusal
        vectors = tuple(array("f", [0.1 * 2**index, -0.7]) for index in range(len(request.inputs)))
        return Embeddings(vectors, Usage(prompt_tokens=3 * len(vectors)), Timings(total_s=0.5))

    async def rerank(self, request: RerankRequest) -> Ranking:
        """The longer a document, the better. Or the refusal."""
        self.reranks.append(request)
        if self.refusal is not None:
            raise self.refusal
        scores = tuple(float(len(text)) - 2 for text in request.documents)
        return Ranking(scores, Usage(prompt_tokens=3 * len(scores)), Timings(total_s=0.5))

    def list_runners(self) -> list[RunnerStatus]:
        """All `runners`."""
        return self.runners


class Gateway:
    """The gateway's middleware, as far as a dialect needs it: origin and request id. Keeps why it refused last."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.refusal: object = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Set the state and pass the request on."""
        scope.setdefault("state", {}).update(origin=ORIGIN, request_id="req_" + "0" * 32)
        await self.app(scope, receive, send)
        self.refusal = scope["state"].get("refusal")


def app(services: FakeServices, clock: Callable[[], int] = lambda: NOW_NS) -> Gateway:
    """The dialect alone, without Starlette's redirects, as in the gateway."""
    dialect = OllamaRoutes(services, body_limit_bytes=BODY_LIMIT_BYTES, clock=clock)

    async def http_error(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return http_error_response(http, error)

    starlette = Starlette(routes=dialect.routes(), exception_handlers={HTTPException: http_error})
    starlette.router.redirect_slashes = False
    return Gateway(starlette)


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(uvicorn.Config(app, port=0, lifespan="off", log_level="warning"))
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets)
        self.ready.set()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}"


@contextlib.asynccontextmanager
async def serving(services: FakeServices) -> AsyncIterator[str]:
    """A real server on a free port; gives its base URL."""
    server = Server(app(services))
    running = asyncio.create_task(server.serve())
    await server.ready.wait()
    try:
        yield server.url
    finally:
        server.should_exit = True
        await running
