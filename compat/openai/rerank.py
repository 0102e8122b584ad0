"""Reranking in the words of Jina, Cohere, TEI and vLLM: body to request, scores to reply (`spec/openai.md` 9.1). Pure.

A body with `texts` is TEI's and gets a bare list; one with `text_1` and `text_2` is vLLM's `/score`; all others are
Jina's and Cohere's, who agree.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from compat.keep_alive import parse_keep_alive
from compat.openai.embeddings import UsageReply, load_options, render_prompt_usage
from compat.openai.refusals import invalid, missing, unsupported_value
from compat.relevance import ranked, relevance
from engines.events import Ranking
from engines.model import ModelCard
from engines.request import Origin, Priority, RerankRequest

MAX_DOCUMENTS = 10_000
_DOCUMENTS_OF_A_SEARCH_UNIT = 100  # Cohere's unit of billing
_encode = msgspec.json.Encoder().encode

AtLeastOne = Annotated[int, Meta(ge=1)]


class TextDocument(Struct):
    """A document as an object."""

    text: str


class RerankBody(Struct, kw_only=True):
    """The body of `POST /v1/rerank`. `texts`, `return_text` are TEI's; `options` and `keep_alive` Ollama's."""

    model: str | None = None
    query: str
    documents: list[str | TextDocument] | None = None
    texts: list[str] | None = None
    top_n: AtLeastOne | None = None
    top_k: AtLeastOne | None = None
    return_documents: bool | None = None
    return_text: bool | None = None
    max_tokens_per_doc: AtLeastOne | None = None
    raw_scores: bool | None = None
    truncate: bool | None = None
    options: dict[str, Any] | None = None
    keep_alive: Any = None


class ScoreBody(Struct, kw_only=True):
    """The body of `POST /score`."""

    model: str | None = None
    text_1: str | list[str]
    text_2: str | list[str]
    truncate: bool | None = None
    options: dict[str, Any] | None = None
    keep_alive: Any = None


class Document(Struct):
    """A document in a reply."""

    text: str


class Result(Struct):
    """One document's place."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class TEIResult(Struct):
    """One text's place."""

    index: int
    score: float
    text: str | UnsetType = UNSET


class RerankReply(Struct):
    """The reply to a `RerankBody`."""

    id: str
    object: str
    model: str
    results: list[Result]
    usage: UsageReply
    meta: dict[str, Any]


class Score(Struct):
    """One pair's score."""

    index: int
    object: str
    score: float


class ScoreReply(Struct):
    """The reply to a `ScoreBody`."""

    id: str
    object: str
    created: int
    model: str
    data: list[Score]
    usage: UsageReply


def parse_rerank(body: RerankBody, *, model: str, request_id: str, origin: Origin) -> RerankRequest:
    """The request of a body; `model` is the body's or, where it has none, the only one. Raises BadRequest."""
    return RerankRequest(
        id=request_id,
        model=model,
        origin=origin,
        query=body.query,
        documents=_documents(body),
        truncate=bool(body.truncate),
        max_document_tokens=body.max_tokens_per_doc,
        priority=Priority.NORMAL,
        load=load_options(body.options),
        keep_alive_s=parse_keep_alive(body.keep_alive),
    )


def parse_score(body: ScoreBody, *, model: str, request_id: str, origin: Origin) -> RerankRequest:
    """The request of a body, as `parse_rerank`. Raises BadRequest."""
    queries = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    documents = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    if len(queries) != 1:
        raise unsupported_value("text_1", "expected one text, which every 'text_2' is compared with")
    return RerankRequest(
        id=request_id,
        model=model,
        origin=origin,
        query=queries[0],
        documents=_bounded(tuple(documents), "text_2"),
        truncate=bool(body.truncate),
        load=load_options(body.options),
        keep_alive_s=parse_keep_alive(body.keep_alive),
    )


def only_reranker(cards: list[ModelCard]) -> str:
    """The model that is meant where none is named. Raises BadRequest unless there is exactly one."""
    names = [card.name for card in cards if "rerank" in card.capabilities]
    if len(names) != 1:
        raise missing("model")
    return names[0]


def _documents(body: RerankBody) -> tuple[str, ...]:
    if body.documents is not None:
        texts = tuple(each if isinstance(each, str) else each.text for each in body.documents)
        return _bounded(texts, "documents")
    if body.texts is not None:
        return _bounded(tuple(body.texts), "texts")
    raise missing("documents")


def _bounded(texts: tuple[str, ...], param: str) -> tuple[str, ...]:
    if not texts:
        raise invalid(param, "empty array", "empty_array")
    if len(texts) > MAX_DOCUMENTS:
        raise invalid(param, f"expected at most {MAX_DOCUMENTS} documents", "array_above_max_length")
    return texts


def render_rerank(body: RerankBody, request: RerankRequest, card: ModelCard, ranking: Ranking, reply_id: str) -> bytes:
    """The reply's body, the best documents first."""
    scores = ranking.scores if body.raw_scores else relevance(ranking.scores, card)
    best = ranked(scores)[: body.top_n or body.top_k]
    texts = request.documents
    if body.documents is None:
        shows_text = bool(body.return_text)
        return _encode([TEIResult(index, score, texts[index] if shows_text else UNSET) for index, score in best])
    shows_document = body.return_documents is not False
    results = [Result(index, score, Document(texts[index]) if shows_document else UNSET) for index, score in best]
    search_units = math.ceil(len(texts) / _DOCUMENTS_OF_A_SEARCH_UNIT)
    meta = {"api_version": {"version": "1"}, "billed_units": {"search_units": search_units}}
    return _encode(RerankReply(reply_id, "list", request.model, results, render_prompt_usage(ranking.usage), meta))


def render_score(request: RerankRequest, card: ModelCard, ranking: Ranking, reply_id: str, created: int) -> bytes:
    """The reply's body, in the order of `text_2`."""
    data = [Score(index, "score", score) for index, score in enumerate(relevance(ranking.scores, card))]
    return _encode(ScoreReply(reply_id, "list", created, request.model, data, render_prompt_usage(ranking.usage)))
