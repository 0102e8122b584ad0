"""The few things a dialect may ask of the house. `gateway/app.py` wires in the real thing; tests wire in a fake."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from engines.errors import HeadwaterError, ModelNotFound
from engines.events import (
    ChoiceFinished,
    Embeddings,
    Event,
    Finished,
    Ranking,
    TextDelta,
    ThinkingDelta,
    Tokenization,
    TokenLogprob,
    ToolCallDelta,
)
from engines.library import CreateRequest, Progress
from engines.model import ModelCard, ModelDescription, RunnerStatus
from engines.request import EmbedRequest, GenerateRequest, RerankRequest, TokenizeRequest


class Services(Protocol):
    """What stands behind every dialect.

    Every method raises the errors of `engines.errors`; the dialect renders them.
    """

    async def find(self, name: str) -> ModelCard:
        """The model of that name. Raises InvalidModelName or ModelNotFound."""

    async def list_models(self) -> list[ModelCard]:
        """Every installed model, last modified first."""

    async def describe(self, name: str) -> ModelDescription:
        """The model with its whole GGUF header. Raises as `find` does, and GGUFParseError."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Admit the request and return its events.

        Returns once a worker has admitted the request, so that every refusal (400, 404, 503) is still a real status.
        Whoever stops iterating early cancels the request.
        """

    async def render(self, request: GenerateRequest) -> str:
        """The prompt that `generate` would give to the model, as text. Raises as `generate` does."""

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """The token ids of a text, or the text of token ids; the model is loaded for it.

        Raises as `generate` does, and BadRequest for an id that the model does not have.
        """

    async def load(self, request: GenerateRequest) -> None:
        """Make the request's model resident without generating."""

    async def unload(self, request: GenerateRequest) -> None:
        """Unload the request's model once its running requests are done; success when it is not loaded."""

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """One vector for each input; without inputs the model is only made resident.

        Raises UnsupportedCapability for a model that makes none.
        """

    async def rerank(self, request: RerankRequest) -> Ranking:
        """One score for each document. Raises UnsupportedCapability for a model that does not rank."""

    def list_runners(self) -> list[RunnerStatus]:
        """What is loaded now. Never loads or wakes anything."""


class Library(Protocol):
    """What a dialect may ask of the models on disk, beyond finding, listing and describing them.

    Work that takes long is an iterator of what is being done. It raises at once, as a real status, what can be told
    before anything is done, and later from the iterator; whoever stops iterating early ends the work, of which nothing
    shows then.
    """

    async def create(self, request: CreateRequest) -> AsyncIterator[Progress]:
        """Make a model or replace it. Raises InvalidModelName, BadRequest."""

    async def pull(self, name: str, *, insecure: bool = False, token: str = "") -> AsyncIterator[Progress]:
        """Fetch a model from the registry that its name says, or what is new in it.

        `insecure` allows plain http; `token` is a bearer token. Raises InvalidModelName; the iterator raises
        RegistryError and StoreNotWritable. What has arrived when the last caller leaves is kept for the next one.
        """

    async def push(self, name: str, *, insecure: bool = False, token: str = "") -> AsyncIterator[Progress]:
        """Send a model to the registry that its name says. Arguments as for `pull`.

        The iterator raises InvalidModelName, ModelNotFound and RegistryError.
        """

    async def copy(self, source: str, destination: str) -> None:
        """Give a model a second name. Raises InvalidModelName, ModelNotFound, AccessDenied."""

    async def delete(self, name: str) -> None:
        """Delete a model and what only it needed. Raises InvalidModelName, ModelNotFound, AccessDenied."""

    async def has_blob(self, digest: str) -> bool:
        """Whether a blob is there. Raises BadRequest for what is no digest."""

    async def store_blob(self, digest: str, chunks: AsyncIterator[bytes]) -> bool:
        """Store a blob, unless it is there already; whether it was new.

        Raises BadRequest when the bytes have another digest, StoreNotWritable, and whatever `chunks` raises. Of what
        did not arrive whole, nothing is left.
        """


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a dialect answered with an error: left in `http.state.refusal` for whoever keeps the accounts.

    Plain words and not the exception, which would hold its stack, and the request's whole body with it, in a cycle.
    `code` is a `HeadwaterError.code`; `model` the name of a model that does not exist.
    """

    code: str
    model: str = ""

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """What there is to say of any exception."""
        model = error.name if isinstance(error, ModelNotFound) else ""
        return cls(error.code if isinstance(error, HeadwaterError) else HeadwaterError.code, model)


class Answer:
    """A whole answer, collected from its events, for clients that do not stream.

    Attributes:
        choices: one entry for each choice, in order. finished: the last event.
    """

    def __init__(self, num_choices: int = 1) -> None:
        self.choices = [Choice() for _ in range(num_choices)]
        self.finished: Finished | None = None

    def add(self, event: Event) -> None:
        """Take in the next event."""
        match event:
            case TextDelta(_, index) | ThinkingDelta(_, index):
                self.choices[index].deltas.append(event)
            case ToolCallDelta(_, index):
                self.choices[index].tool_calls.append(event)
            case ChoiceFinished(_, index):
                self.choices[index].finished = event
            case Finished():
                self.finished = event


class Choice:
    """One choice of an `Answer`; `deltas` are its pieces of answer and reasoning in order."""

    def __init__(self) -> None:
        self.deltas: list[TextDelta | ThinkingDelta] = []
        self.tool_calls: list[ToolCallDelta] = []
        self.finished: ChoiceFinished | None = None

    @property
    def pieces(self) -> list[TextDelta]:
        """The pieces of the visible answer."""
        return [delta for delta in self.deltas if isinstance(delta, TextDelta)]

    @property
    def text(self) -> str:
        """The visible answer."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def thinking(self) -> str:
        """The reasoning before it."""
        return "".join(delta.text for delta in self.deltas if isinstance(delta, ThinkingDelta))

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """The tokens of both in order, when they were asked for."""
        return [token for delta in self.deltas for token in delta.logprobs]


async def collect(events: AsyncIterator[Event], num_choices: int = 1) -> Answer:
    """Read an answer to its end. Errors raised by `events` pass through."""
    answer = Answer(num_choices)
    async for event in events:
        answer.add(event)
    return answer
