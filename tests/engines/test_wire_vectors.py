"""Embeddings and scores between gateway and worker."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import BadRequest, HeadwaterError
from engines.events import Embeddings, Ranking, Timings, Usage
from engines.request import EmbedRequest, LoadOptions, Origin, Priority, RerankRequest
from engines.wire_vectors import (
    decode_embed,
    decode_embeddings,
    decode_ranking,
    decode_rerank,
    encode_embed,
    encode_embeddings,
    encode_ranking,
    encode_rerank,
)

ORIGIN = Origin("ollama/embedding", "gateway")
FLOATS = st.floats(width=32, allow_nan=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
USAGE = Usage(prompt_tokens=7, truncated_tokens=2)
TIMINGS = Timings(queue_s=0.25, prefill_s=0.5)
OURS = st.builds(LoadOptions, num_ctx=st.none() | st.integers(1, 10**6))


@given(
    st.builds(
        EmbedRequest,
        id=st.just("req_1"),
        model=st.just("m"),
        origin=st.just(ORIGIN),
        inputs=st.lists(TEXTS | st.lists(st.integers(0, 10**6), max_size=4).map(tuple), max_size=4).map(tuple),
        dimensions=st.none() | st.integers(1, 999),
        normalize=st.none() | st.booleans(),
        priority=st.sampled_from(Priority),
        load=OURS,
        keep_alive_s=st.none(),
    )
)
def test_a_request_for_embeddings_survives(request: EmbedRequest) -> None:
    """Every field that a worker needs."""
    assert decode_embed(encode_embed(request, "m"), id="req_1", surface=ORIGIN.surface) == request


@given(
    st.builds(
        RerankRequest,
        id=st.just("req_1"),
        model=st.just("m"),
        origin=st.just(ORIGIN),
        query=TEXTS,
        documents=st.lists(TEXTS, max_size=4).map(tuple),
        max_document_tokens=st.none() | st.integers(1, 999),
        priority=st.sampled_from(Priority),
        load=OURS,
        keep_alive_s=st.none(),
    )
)
def test_a_request_to_rank_survives(request: RerankRequest) -> None:
    """Every field that a worker needs."""
    assert decode_rerank(encode_rerank(request, "m"), id="req_1", surface=ORIGIN.surface) == request


@given(st.lists(st.lists(FLOATS, max_size=6).map(lambda numbers: array("f", numbers)), max_size=4))
def test_vectors_survive_to_the_last_bit(vectors: list[array[float]]) -> None:
    """With what they have cost."""
    found = decode_embeddings(encode_embeddings(vectors, USAGE, TIMINGS))
    assert found == Embeddings(tuple(vectors), USAGE, TIMINGS)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=6))
def test_scores_survive(scores: list[float]) -> None:
    """In the documents' order."""
    assert decode_ranking(encode_ranking(scores, USAGE, TIMINGS)) == Ranking(tuple(scores), USAGE, TIMINGS)


def test_scores_of_a_server_that_sorts_are_put_in_order() -> None:
    """As llama-server's are, which sends no timings either."""
    reply = {"results": [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.1}]}
    assert decode_ranking(json.dumps(reply).encode()) == Ranking((0.1, 0.9), Usage(), Timings())


@pytest.mark.parametrize("reply", [b"", b"{}", b'{"data":[{"embedding":"?"}]}', b'{"data":[{"embedding":"AAA="}]}'])
def test_a_broken_reply_is_our_error(reply: bytes) -> None:
    """Never a bare exception of some decoder."""
    with pytest.raises(HeadwaterError):
        decode_embeddings(reply)
    with pytest.raises(HeadwaterError):
        decode_ranking(reply)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"model":"m"}',
        b'{"model":"m","input":[1.5]}',
        b'{"model":"m","input":[],"embd_normalize":7}',
    ],
)
def test_a_broken_request_is_refused(body: bytes) -> None:
    """A worker answers 400 and lives."""
    with pytest.raises(BadRequest):
        decode_embed(body, id="", surface="")
    with pytest.raises(BadRequest):
        decode_rerank(body, id="", surface="")


@pytest.mark.parametrize(
    "encoded",
    [
        lambda: encode_embed(EmbedRequest("", "m", ORIGIN, ("\ud800",)), "m"),
        lambda: encode_rerank(RerankRequest("", "m", ORIGIN, "\ud800", ()), "m"),
    ],
)
def test_half_a_surrogate_pair_is_no_text(encoded: Callable[[], bytes]) -> None:
    """JSON can hold it, UTF-8 cannot."""
    with pytest.raises(BadRequest, match="surrogate"):
        encoded()
