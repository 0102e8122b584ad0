"""Embeddings and reranking in Ollama's words: body to request, result to reply (`spec/ollama.md` 5.4, 5.5). Pure.

`/api/rerank` is in no release of Ollama. Its shape is that of the proposal which clients were written against
(https://github.com/ollama/ollama/pull/7219), with `index` added.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from compat.ollama.errors import EmbeddingFailed
from compat.ollama.gojson import encode
from compat.ollama.options import parse_options
from compat.ollama.schema import KeepAlive
from compat.relevance import ranked, relevance
from compat.vectors import render_numbers
from engines.errors import BadRequest, PromptTooLong
from engines.events import Embeddings, Ranking, Timings
from engines.model import ModelCard
from engines.request import EmbedRequest, Origin, Priority, RerankRequest

MAX_TEXTS = 16_384
INPUT_TOO_LONG = "the input length exceeds the context length"
STILL_TOO_LONG = "input after truncation exceeds maximum context length"


class EmbedBody(Struct):
    """`POST /api/embed`."""

    model: str = ""
    input: Any = None
    keep_alive: KeepAlive | None = None
    truncate: bool = True
    dimensions: int = 0
    options: dict[str, Any] = {}


class EmbeddingsBody(Struct):
    """`POST /api/embeddings`."""

    model: str = ""
    prompt: str = ""
    keep_alive: KeepAlive | None = None
    options: dict[str, Any] = {}


class RerankBody(Struct):
    """`POST /api/rerank`. `top_n` 0 is all."""

    model: str = ""
    query: str = ""
    documents: list[str] = []
    top_n: int = 0
    truncate: bool = True
    keep_alive: KeepAlive | None = None
    options: dict[str, Any] = {}


class EmbedReply(Struct):
    """The reply to `EmbedBody`. Durations are nanoseconds."""

    model: str
    embeddings: list[msgspec.Raw]
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET


class EmbeddingsReply(Struct):
    """The reply to `EmbeddingsBody`, whose numbers Ollama prints in double precision."""

    embedding: list[float]


class RerankResult(Struct):
    """One document's place."""

    index: int
    document: str
    relevance_score: float


class RerankReply(Struct):
    """The reply to `RerankBody`, the best document first."""

    model: str
    results: list[RerankResult]
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET


def parse_inputs(body: EmbedBody) -> tuple[str, ...]:
    """The texts, none for an empty input. Raises BadRequest."""
    match body.input:
        case None | "":
            return ()
        case str():
            return (body.input,)
        case list() if all(isinstance(text, str) for text in body.input):
            return _bounded(body.input)
        case _:
            raise BadRequest("invalid input type", param="input")


def parse_embed(body: EmbedBody, *, request_id: str, origin: Origin) -> EmbedRequest:
    """The request of a body. Raises BadRequest, or OptionTypeError, which answers 500."""
    inputs = parse_inputs(body)
    return EmbedRequest(
        id=request_id,
        model=body.model,
        origin=origin,
        inputs=inputs,
        truncate=body.truncate,
        dimensions=max(body.dimensions, 0),
        priority=Priority.NORMAL if len(inputs) == 1 else Priority.BATCH,
        load=parse_options(body.options)[1],
        keep_alive_s=body.keep_alive,
    )


def parse_embeddings(body: EmbeddingsBody, *, request_id: str, origin: Origin) -> EmbedRequest:
    """The request of a body in the old form: one text, never cut, its vector as the runner makes it."""
    return EmbedRequest(
        id=request_id,
        model=body.model,
        origin=origin,
        inputs=(body.prompt,) if body.prompt else (),
        truncate=False,
        normalize=None,
        load=parse_options(body.options)[1],
        keep_alive_s=body.keep_alive,
    )


def parse_rerank(body: RerankBody, *, request_id: str, origin: Origin) -> RerankRequest:
    """The request of a body. Raises BadRequest."""
    if not body.documents:
        raise BadRequest("documents are required", param="documents")
    return RerankRequest(
        id=request_id,
        model=body.model,
        origin=origin,
        query=body.query,
        documents=_bounded(body.documents),
        truncate=body.truncate,
        load=parse_options(body.options)[1],
        keep_alive_s=body.keep_alive,
    )


def _bounded(texts: list[str]) -> tuple[str, ...]:
    """Room for every result is made beforehand, so their number has a limit; Ollama has none."""
    if len(texts) > MAX_TEXTS:
        raise BadRequest(f"too many texts: at most {MAX_TEXTS} are possible in one request")
    return tuple(texts)


def explain_embed(error: BadRequest, *, truncate: bool) -> Exception:
    """A refusal by the engine, in Ollama's words."""
    if not isinstance(error, PromptTooLong):
        return error
    return EmbeddingFailed(STILL_TOO_LONG if truncate else INPUT_TOO_LONG, error, status=400)


def explain_embeddings(error: BadRequest) -> EmbeddingFailed:
    """A refusal by the engine on the old route, where all are failures of the server."""
    message = INPUT_TOO_LONG if isinstance(error, PromptTooLong) else error.message
    return EmbeddingFailed(message, error, status=500)


def render_embed(body: EmbedBody, embeddings: Embeddings) -> bytes:
    """The reply's body."""
    vectors = render_numbers(embeddings.vectors)
    return encode(EmbedReply(body.model, vectors, *_statistics(embeddings.timings, embeddings.usage.prompt_tokens)))


def render_embeddings(embeddings: Embeddings) -> bytes:
    """The reply's body in the old form."""
    return encode(EmbeddingsReply([number for vector in embeddings.vectors for number in vector]))


def render_rerank(body: RerankBody, card: ModelCard, ranking: Ranking) -> bytes:
    """The reply's body."""
    best = ranked(relevance(ranking.scores, card))[: body.top_n if body.top_n > 0 else None]
    results = [RerankResult(index, body.documents[index], score) for index, score in best]
    return encode(RerankReply(body.model, results, *_statistics(ranking.timings, ranking.usage.prompt_tokens)))


def _statistics(timings: Timings, prompt_tokens: int) -> tuple[int | UnsetType, int | UnsetType, int | UnsetType]:
    """The last three fields; a request that only loads the model shows none of them."""
    if not prompt_tokens:
        return UNSET, UNSET, UNSET
    load_s = timings.queue_s + timings.load_s
    return max(round(timings.total_s * 1e9), 1), max(round(load_s * 1e9), 1), prompt_tokens
