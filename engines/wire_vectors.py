"""Both ends of the worker protocol for embeddings and reranking, in OpenAI's and llama-server's forms.

Vectors cross as base64 of their little-endian single-precision numbers, which is an `encoding_format` of OpenAI's and
spares both ends writing and reading every number as text. Ours adds `truncate`, `priority`, `num_ctx` and
`max_document_tokens` to the request and `timings` to the reply; `embd_normalize` is llama-server's: 2 is Euclidean, -1
none, and where it is missing the model's own habit holds.
"""

from __future__ import annotations

import sys
from array import array
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from engines.errors import BadRequest, HeadwaterError
from engines.events import Embeddings, Ranking, Timings, Usage, Vector
from engines.request import JSON, EmbedRequest, Origin, Priority, RerankRequest
from engines.wire import decode_timings, decode_usage, encode_timings, encode_usage

EMBED_PATH, RERANK_PATH = "/v1/embeddings", "/v1/rerank"

R = TypeVar("R", EmbedRequest, RerankRequest)

_EUCLIDEAN, _NO_NORM = 2, -1
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class _Data(msgspec.Struct):
    embedding: str


class _EmbedReply(msgspec.Struct):
    data: list[_Data]
    usage: dict[str, Any] = {}
    timings: dict[str, Any] = {}


class _Result(msgspec.Struct):
    index: int
    relevance_score: float


class _RerankReply(msgspec.Struct):
    results: list[_Result]
    usage: dict[str, Any] = {}
    timings: dict[str, Any] = {}


def encode_embed(request: EmbedRequest, model: str) -> bytes:
    """A request's body; `model` is the id that the worker was started with."""
    norms: dict[bool | None, int | None] = {True: _EUCLIDEAN, False: _NO_NORM, None: None}
    return _encode_body(
        request,
        model,
        input=request.inputs,
        encoding_format="base64",
        dimensions=request.dimensions,
        embd_normalize=norms[request.normalize],
    )


def encode_rerank(request: RerankRequest, model: str) -> bytes:
    """A request's body; `model` is the id that the worker was started with."""
    return _encode_body(
        request,
        model,
        query=request.query,
        documents=request.documents,
        max_document_tokens=request.max_document_tokens,
    )


def _encode_body(request: EmbedRequest | RerankRequest, model: str, **fields: JSON) -> bytes:
    body = {
        "model": model,
        "truncate": request.truncate,
        "priority": request.priority.value,
        "num_ctx": request.load.num_ctx,
        **fields,
    }
    try:
        return _encode({name: value for name, value in body.items() if value is not None})
    except UnicodeEncodeError as error:
        raise BadRequest("the request holds half a surrogate pair, which is no text") from error


def decode_embed(data: bytes, *, id: str, surface: str) -> EmbedRequest:  # noqa: A002  # the field's name
    """The request that `encode_embed` wrote. Raises BadRequest for anything else."""
    norms = {_EUCLIDEAN: True, _NO_NORM: False, None: None}
    return _decode_body(
        EmbedRequest,
        data,
        id,
        surface,
        lambda body: {
            "inputs": body["input"],
            "dimensions": body.get("dimensions"),
            "normalize": norms[body.get("embd_normalize")],
        },
    )


def decode_rerank(data: bytes, *, id: str, surface: str) -> RerankRequest:  # noqa: A002  # the field's name
    """The request that `encode_rerank` wrote. Raises BadRequest for anything else."""
    return _decode_body(
        RerankRequest,
        data,
        id,
        surface,
        lambda body: {
            "query": body["query"],
            "documents": body["documents"],
            "max_document_tokens": body.get("max_document_tokens"),
        },
    )


def _decode_body(
    kind: type[R], data: bytes, request_id: str, surface: str, read: Callable[[dict[str, Any]], dict[str, Any]]
) -> R:
    try:
        body = _decode(data)
        fields = {
            "id": request_id,
            "origin": Origin(surface=surface, caller="gateway"),
            "model": body["model"],
            "truncate": body.get("truncate", True),
            "priority": body.get("priority", Priority.NORMAL.value),
            "load": {"num_ctx": body.get("num_ctx")},
            **read(body),
        }
        return msgspec.convert(fields, kind)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadRequest(f"malformed worker request: {error}") from error


def encode_embeddings(vectors: Sequence[Vector[float]], usage: Usage, timings: Timings) -> bytes:
    """The reply to `encode_embed`."""
    data = [
        {"object": "embedding", "index": index, "embedding": pack_vector(vector)}
        for index, vector in enumerate(vectors)
    ]
    return _encode({"object": "list", "data": data} | _cost(usage, timings))


def encode_ranking(scores: Sequence[float], usage: Usage, timings: Timings) -> bytes:
    """The reply to `encode_rerank`, in the documents' order."""
    results = [{"index": index, "relevance_score": score} for index, score in enumerate(scores)]
    return _encode({"object": "list", "results": results} | _cost(usage, timings))


def _cost(usage: Usage, timings: Timings) -> dict[str, JSON]:
    return {"usage": encode_usage(usage), "timings": encode_timings(timings, usage)}


def decode_embeddings(data: bytes) -> Embeddings:
    """What `encode_embeddings` wrote. Raises HeadwaterError for anything else."""
    try:
        reply = msgspec.json.decode(data, type=_EmbedReply)
        vectors = tuple(unpack_vector(each.embedding) for each in reply.data)
    except ValueError as error:  # msgspec's and base64's errors are ValueErrors
        raise HeadwaterError(f"the worker's embeddings cannot be read: {error}") from error
    return Embeddings(vectors, decode_usage(reply.usage), decode_timings(reply.timings))


def decode_ranking(data: bytes) -> Ranking:
    """What `encode_ranking` wrote, whatever the order. Raises HeadwaterError for anything else."""
    try:
        reply = msgspec.json.decode(data, type=_RerankReply)
    except msgspec.MsgspecError as error:
        raise HeadwaterError(f"the worker's scores cannot be read: {error}") from error
    results = sorted(reply.results, key=lambda result: result.index)
    scores = tuple(result.relevance_score for result in results)
    return Ranking(scores, decode_usage(reply.usage), decode_timings(reply.timings))


def pack_vector(vector: Vector[float]) -> str:
    """Base64 of the numbers as little-endian floats."""
    return b64encode(_little_endian(vector).tobytes()).decode("ascii")


def unpack_vector(text: str) -> Vector[float]:
    """What `pack_vector` wrote. Raises ValueError."""
    return _little_endian(array("f", b64decode(text, validate=True)))


def _little_endian(vector: Vector[float]) -> Vector[float]:
    if sys.byteorder == "little":
        return vector
    swapped = vector[:]
    swapped.byteswap()
    return swapped
