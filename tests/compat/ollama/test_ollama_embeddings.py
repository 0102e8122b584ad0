"""Embeddings and reranking in Ollama's words."""

from __future__ import annotations

from array import array
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ollama_fakes import ORIGIN, FakeServices, card, serving

from compat.ollama.decode import decode_embed
from compat.ollama.embeddings import MAX_TEXTS, parse_embed, parse_inputs
from compat.ollama.gojson import encode
from engines.errors import BadRequest, PromptTooLong, UnsupportedCapability
from engines.request import FOREVER

NAME = card().name
NOT_FINITE = "embedding contains NaN or Inf values"
TOO_LONG = PromptTooLong(9, 4)


async def post(path: str, services: FakeServices | None = None, **body: Any) -> httpx.Response:
    """What a real server answers."""
    async with serving(services or FakeServices()) as url, httpx.AsyncClient(base_url=url) as client:
        return await client.post(path, json=body)


def refusing(refusal: Exception) -> FakeServices:
    """A house that refuses everything."""
    services = FakeServices()
    services.refusal = refusal
    return services


async def test_embed_answers_with_one_row_for_each_text() -> None:
    """And with the tokens of all together."""
    response = await post("/api/embed", model=NAME, input=["a", "b"])
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert response.json() == {
        "model": NAME,
        "embeddings": [[0.1, -0.7], [0.2, -0.7]],
        "total_duration": 500_000_000,
        "load_duration": 1,
        "prompt_eval_count": 6,
    }


@pytest.mark.parametrize("body", [{}, {"input": ""}, {"input": []}, {"input": None}])
async def test_nothing_to_embed_loads_the_model(body: dict[str, Any]) -> None:
    """As clients do to have it ready."""
    services = FakeServices()
    response = await post("/api/embed", services, model=NAME, **body)
    assert response.json() == {"model": NAME, "embeddings": []}
    assert services.embeds[0].inputs == ()


async def test_an_empty_text_in_a_list_is_embedded() -> None:
    """It stands for the tokens that the model adds."""
    services = FakeServices()
    await post("/api/embed", services, model=NAME, input=[""])
    assert services.embeds[0].inputs == ("",)


@pytest.mark.parametrize("bad", [1, {}, ["a", 1], [["a"]], True])
async def test_other_inputs_are_refused_before_the_model_is_looked_for(bad: Any) -> None:
    """In Ollama's order and words."""
    response = await post("/api/embed", model="nowhere", input=bad)
    assert (response.status_code, response.json()) == (400, {"error": "invalid input type"})


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=10))
def test_no_input_is_too_odd_to_be_answered(odd: Any) -> None:
    """It becomes texts or a refusal."""
    with suppress(BadRequest):
        assert all(isinstance(text, str) for text in parse_inputs(decode_embed(encode({"model": "m", "input": odd}))))


def test_the_number_of_texts_has_a_limit() -> None:
    """There must be room for every vector."""
    with pytest.raises(BadRequest, match="too many texts"):
        parse_inputs(decode_embed(encode({"input": [""] * (MAX_TEXTS + 1)})))


def test_fields_find_their_place() -> None:
    """In any case of letters, as Go reads them."""
    body = decode_embed(
        b'{"Model":"m","INPUT":"a","truncate":false,"dimensions":3,"keep_alive":-1,"options":{"num_ctx":64.5}}'
    )
    request = parse_embed(body, request_id="req_1", origin=ORIGIN)
    assert (request.inputs, request.truncate, request.dimensions) == (("a",), False, 3)
    assert (request.keep_alive_s, request.load.num_ctx, request.normalize) == (FOREVER, 64, True)


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/api/embed", {}, 404, "model '' not found"),
        ("/api/embed", {"model": "a b"}, 400, "invalid model name"),
        ("/api/embed", {"model": "nowhere"}, 404, 'model "nowhere" not found, try pulling it first'),
        ("/api/embeddings", {}, 400, "model is required"),
        ("/api/embeddings", {"model": "nowhere"}, 404, 'model "nowhere" not found, try pulling it first'),
        ("/api/rerank", {"model": "nowhere"}, 404, 'model "nowhere" not found, try pulling it first'),
        ("/api/rerank", {"model": NAME, "query": "q"}, 400, "documents are required"),
        ("/api/embed", {"model": NAME, "options": {"num_ctx": "x"}}, 500, 'option "num_ctx" must be of type integer'),
        (
            "/api/embed",
            {"model": NAME, "dimensions": 1.5},
            400,
            "json: cannot unmarshal number into Go struct field EmbedRequest.dimensions of type int",
        ),
    ],
)
async def test_errors_have_ollamas_status_and_words(path: str, body: dict[str, Any], status: int, error: str) -> None:
    """Clients match on some of them."""
    response = await post(path, **body)
    assert (response.status_code, response.json()) == (status, {"error": error})


@pytest.mark.parametrize(
    ("path", "truncate", "refusal", "status", "error"),
    [
        ("/api/embed", False, TOO_LONG, 400, "the input length exceeds the context length"),
        ("/api/embed", True, TOO_LONG, 400, "input after truncation exceeds maximum context length"),
        ("/api/embeddings", True, TOO_LONG, 500, "the input length exceeds the context length"),
        ("/api/embed", True, BadRequest(NOT_FINITE), 400, NOT_FINITE),
        ("/api/embeddings", True, BadRequest("broken"), 500, "broken"),
        ("/api/embed", True, UnsupportedCapability("m", "embedding"), 400, 'model "m" does not support embedding'),
        ("/api/rerank", True, UnsupportedCapability("m", "rerank"), 400, 'model "m" does not support rerank'),
    ],
)  # fmt: skip
async def test_the_engines_refusals_are_told_as_ollama_does(
    path: str, truncate: bool, refusal: Exception, status: int, error: str
) -> None:
    """The old route takes every refusal for a failure."""
    fields = {"input": "a", "prompt": "a", "query": "q", "documents": ["a"], "truncate": truncate}
    response = await post(path, refusing(refusal), model=NAME, **fields)
    assert (response.status_code, response.json()) == (status, {"error": error})


async def test_the_old_route_gives_one_vector_as_the_runner_makes_it() -> None:
    """In double precision, neither cut nor normalised here."""
    services = FakeServices()
    response = await post("/api/embeddings", services, model=NAME, prompt="a")
    assert array("f", response.json()["embedding"]) == array("f", [0.1, -0.7])
    (request,) = services.embeds
    assert (request.normalize, request.truncate) == (None, False)


async def test_the_old_route_loads_the_model_for_an_empty_prompt() -> None:
    """And has no vector to show."""
    assert (await post("/api/embeddings", model=NAME)).json() == {"embedding": []}


async def test_documents_are_ranked() -> None:
    """The best first, as many as asked for."""
    response = await post("/api/rerank", model=NAME, query="q", documents=["a", "four", "abc"], top_n=2)
    answer = response.json()
    assert [(each["index"], each["document"]) for each in answer["results"]] == [(1, "four"), (2, "abc")]
    assert 1 > answer["results"][0]["relevance_score"] > answer["results"][1]["relevance_score"] > 0
    assert answer["prompt_eval_count"] == 9
