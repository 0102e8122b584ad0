"""A house that answers what it is told to, and a real server in front of it, for the tests of the OpenAI dialect."""

import asyncio
import contextlib
import socket
from array import array
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from compat.openai.routes import OpenAIRoutes, http_error_response
from engines.errors import ModelNotFound
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
from engines.model import ModelCard, ModelDescription, RunnerStatus
from engines.request import EmbedRequest, GenerateRequest, Origin, RerankRequest, TokenizeRequest

ORIGIN = Origin(surface="openai/chat", caller="tester")
BODY_LIMIT_BYTES = 100_000
CREATED = 1_757_141_666

Script = Sequence[Event | Exception | asyncio.Event]
"""What one answer does: emit an event, fail, or wait until the test lets it go on."""


def card(name: str = "qwen3:8b", *capabilities: str, namespace: str = "library") -> ModelCard:
    """A model with these capabilities."""
    return ModelCard(
        name=name,
        full_name=f"registry.ollama.ai/{namespace}/{name}",
        digest="1a2b3c4d" + "0" * 56,
        weights=Path("model.gguf"),
        weights_digest="sha256:" + "0" * 64,
        size_bytes=2**20,
        modified_at=CREATED + 0.5,
        namespace=namespace,
        family="qwen3",
        parameter_size="8B",
        quantization="Q8_0",
        context_length=4096,
        capabilities=("completion", *capabilities),
    )


def finished(reason: FinishReason = FinishReason.STOP, *, num_choices: int = 1, **usage: int) -> list[Event]:
    """The end of an answer."""
    choices: list[Event] = [ChoiceFinished(reason, index) for index in range(num_choices)]
    return [*choices, Finished(reason, Usage(**usage), Timings())]


def says(*texts: str) -> list[Event]:
    """A whole answer of one choice, with 7 prompt tokens and one token a piece."""
    return [*map(TextDelta, texts), *finished(prompt_tokens=7, completion_tokens=len(texts))]


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
    """Plays one script for each request in turn, or the last one for all further requests.

    Attributes:
        refusal: raised instead of admitting the next request. requests: all that were asked for, in order.
        playbacks: their answers.
    """

    def __init__(self, *scripts: Script, cards: Sequence[ModelCard] = ()) -> None:
        self.scripts: Sequence[Script] = scripts or (says("Hi"),)
        self.cards = list(cards) or [card()]
        self.refusal: Exception | None = None
        self.requests: list[GenerateRequest] = []
        self.embeds: list[EmbedRequest] = []
        self.reranks: list[RerankRequest] = []
        self.playbacks: list[Playback] = []
        self.asked = asyncio.Event()

    async def find(self, name: str) -> ModelCard:
        """One of `cards`, with or without its tag when that is `latest`."""
        for model in self.cards:
            if name in (model.name, model.name.removesuffix(":latest")):
                return model
        raise ModelNotFound(name)

    async def list_models(self) -> list[ModelCard]:
        """All `cards`."""
        return self.cards

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """The next script, or the refusal."""
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        script = self.scripts[min(len(self.playbacks), len(self.scripts) - 1)]
        self.playbacks.append(Playback(script))
        self.asked.set()
        return self.playbacks[-1]

    async def describe(self, name: str) -> ModelDescription:
        """Never asked for by this dialect."""
        raise NotImplementedError

    async def render(self, request: GenerateRequest) -> str:
        """Every prompt is the same."""
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        return "<user>hi"

    async def load(self, request: GenerateRequest) -> None:
        """Never asked for by this dialect."""
        raise NotImplementedError

    async def unload(self, request: GenerateRequest) -> None:
        """Never asked for by this dialect."""
        raise NotImplementedError

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

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """Never asked for by this dialect."""
        raise NotImplementedError

    def list_runners(self) -> list[RunnerStatus]:
        """Never asked for by this dialect."""
        raise NotImplementedError


class Gateway:
    """The gateway's middleware, as far as a dialect needs it: origin and request id."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Set the state and pass the request on."""
        scope.setdefault("state", {}).update(origin=ORIGIN, request_id="req_" + "0" * 32)
        await self.app(scope, receive, send)


def app(services: FakeServices) -> ASGIApp:
    """The dialect alone."""
    dialect = OpenAIRoutes(services, body_limit_bytes=BODY_LIMIT_BYTES, clock=lambda: CREATED + 0.9)

    async def http_error(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return http_error_response(http, error)

    return Gateway(Starlette(routes=dialect.routes(), exception_handlers={HTTPException: http_error}))


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready and when it begins to stop."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(uvicorn.Config(app, port=0, lifespan="off", log_level="warning"))
        self.ready = asyncio.Event()
        self.stopping = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets)
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so, then stop."""
        self.stopping.set()
        await super().shutdown(sockets)

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
