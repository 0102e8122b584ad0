"""Reranking in the words of Jina, Cohere, TEI and vLLM."""

from __future__ import annotations

import dataclasses
from typing import Any

import httpx
import pytest
from openai_fakes import FakeServices, card, serving

from compat.relevance import relevance
from engines.errors import PromptTooLong, UnsupportedCapability

RANKER = card("bge:latest", "rerank")
BODY = {"model": "qwen3:8b", "query": "q", "documents": ["a", "four", "abc"]}


async def post(path: str, body: dict[str, Any], services: FakeServices | None = None) -> httpx.Response:
    """What a real server answers."""
    async with serving(services or FakeServices()) as url, httpx.AsyncClient(base_url=url) as client:
        return await client.post(path, json=body)


@pytest.mark.parametrize(
    "path", ["/v1/rerank", "/rerank", "/v1/reranking", "/reranking", "/v2/rerank", "/v1/rerank/", "/v2/rerank/"]
)
async def test_every_name_of_the_route_ranks_all_documents(path: str) -> None:
    """The best first, each told by its place in the request."""
    answer = (await post(path, BODY)).json()
    assert answer.pop("id").startswith("rerank-")
    assert answer == {
        "object": "list",
        "model": "qwen3:8b",
        "results": [
            {"index": 1, "relevance_score": 2.0, "document": {"text": "four"}},
            {"index": 2, "relevance_score": 1.0, "document": {"text": "abc"}},
            {"index": 0, "relevance_score": -1.0, "document": {"text": "a"}},
        ],
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
        "meta": {"api_version": {"version": "1"}, "billed_units": {"search_units": 1}},
    }


@pytest.mark.parametrize("name", ["top_n", "top_k"])
async def test_fewer_documents_can_be_asked_for(name: str) -> None:
    """And their texts left out."""
    answer = (await post("/v1/rerank", BODY | {name: 1, "return_documents": False})).json()
    assert answer["results"] == [{"index": 1, "relevance_score": 2.0}]


async def test_a_logit_is_shown_as_a_probability_or_raw() -> None:
    """Jina's and Cohere's clients compare with thresholds between 0 and 1."""
    services = FakeServices()
    services.cards = [dataclasses.replace(RANKER, family="bert")]
    body = {"query": "q", "documents": [{"text": "four"}]}
    shown = (await post("/v1/rerank", body, services)).json()
    raw = (await post("/v1/rerank", body | {"raw_scores": True}, services)).json()
    assert shown["model"] == "bge:latest"
    assert shown["results"][0]["relevance_score"] == relevance([2.0], services.cards[0])[0]
    assert raw["results"][0]["relevance_score"] == 2.0


async def test_tei_gets_a_bare_list() -> None:
    """The text only when asked for."""
    body = {"model": "qwen3:8b", "query": "q", "texts": ["a", "four"]}
    assert (await post("/rerank", body)).json() == [{"index": 1, "score": 2.0}, {"index": 0, "score": -1.0}]
    shown = (await post("/rerank", body | {"return_text": True})).json()
    assert [each["text"] for each in shown] == ["four", "a"]


@pytest.mark.parametrize("text_2", ["four", ["four"]])
async def test_vllm_scores_pairs_in_order(text_2: Any) -> None:
    """One text against one or many."""
    answer = (await post("/score", {"model": "qwen3:8b", "text_1": "q", "text_2": text_2})).json()
    assert answer["data"] == [{"index": 0, "object": "score", "score": 2.0}]
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/v1/rerank", {"query": None}, "query", "missing_required_parameter"),
        ("/v1/rerank", {"documents": None}, "documents", "missing_required_parameter"),
        ("/v1/rerank", {"documents": []}, "documents", "empty_array"),
        ("/v1/rerank", {"documents": [1]}, "documents[0]", "invalid_type"),
        ("/v1/rerank", {"documents": "text"}, "documents", "invalid_type"),
        ("/v1/rerank", {"documents": [None]}, "documents[0]", "invalid_type"),
        ("/v1/rerank", {"top_n": 0}, "top_n", "integer_below_min_value"),
        ("/v1/rerank", {"documents": ["a"] * 10_001}, "documents", "array_above_max_length"),
        ("/v1/rerank", {"model": None}, "model", "missing_required_parameter"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c", "d"]}, "text_1", "unsupported_value"),
        ("/score", {"text_1": "a"}, "text_2", "missing_required_parameter"),
    ],
)
async def test_bad_bodies_are_refused_with_the_field(path: str, body: dict[str, Any], param: str, code: str) -> None:
    """Without a word about models where there is more than one, or none."""
    response = await post(path, (BODY if path != "/score" else {"model": "qwen3:8b"}) | body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)


@pytest.mark.parametrize(
    ("refusal", "param", "code"),
    [
        (UnsupportedCapability("m", "rerank"), "model", "unsupported_model"),
        (PromptTooLong(9, 4), "documents", "context_length_exceeded"),
    ],
)
async def test_the_engines_refusals_have_openais_codes(refusal: Exception, param: str, code: str) -> None:
    """A model that does not rank, and a pair that does not fit."""
    services = FakeServices()
    services.refusal = refusal
    error = (await post("/v1/rerank", BODY, services)).json()["error"]
    assert (error["param"], error["code"]) == (param, code)


async def test_options_of_a_rerank_reach_the_engine() -> None:
    """The limit of each document, and whether they may be cut."""
    services = FakeServices()
    await post("/v1/rerank", BODY | {"max_tokens_per_doc": 7, "truncate": True, "options": {"num_ctx": 64}}, services)
    (request,) = services.reranks
    assert (request.max_document_tokens, request.truncate, request.load.num_ctx) == (7, True, 64)
