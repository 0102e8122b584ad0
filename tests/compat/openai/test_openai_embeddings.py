"""Embeddings in OpenAI's words."""

from __future__ import annotations

import dataclasses
import json
from array import array
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_fakes import ORIGIN, FakeServices, card, serving

from compat.openai.decode import decode_embeddings
from compat.openai.embeddings import MAX_INPUTS, parse_embeddings
from engines.errors import BadRequest, PromptTooLong, UnsupportedCapability
from engines.request import EmbedRequest, Priority

CARD = dataclasses.replace(card("nomic:latest"), embedding_length=768)


def parse(**fields: Any) -> EmbedRequest:
    """The request of a body with these fields."""
    body = decode_embeddings(json.dumps({"model": "nomic", "input": "a"} | fields).encode())
    return parse_embeddings(body, CARD, request_id="req_1", origin=ORIGIN)


async def post(services: FakeServices, **fields: Any) -> httpx.Response:
    """What a real server answers to a body with these fields."""
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        return await client.post("/v1/embeddings", json={"model": "qwen3:8b", "input": "a"} | fields)


@pytest.mark.parametrize(
    ("given_input", "inputs"),
    [
        ("", ("",)),
        ("one", ("one",)),
        (["one", ""], ("one", "")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["one", [3]], ("one", (3,))),
        ({"content": "one"}, ("one",)),
        ([{"content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}], ("one two",)),
    ],
)
def test_every_form_of_input_is_understood(given_input: Any, inputs: tuple[Any, ...]) -> None:
    """Text, token ids, lists of either, and llama-server's content objects."""
    assert parse(input=given_input).inputs == inputs


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"input": []}, "input", "invalid_value"),
        ({"input": None}, "input", "invalid_value"),
        ({"input": [[]]}, "input", "invalid_value"),
        ({"input": ["a", 1]}, "input[1]", "invalid_type"),
        ({"input": 1}, "input", "invalid_type"),
        ({"input": [1.5]}, "input[0]", "invalid_type"),
        ({"input": [-1]}, "input[0]", "integer_below_min_value"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input", "array_above_max_length"),
        ({"input": {"content": [{"type": "image_url"}]}}, "input", "unsupported_value"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"dimensions": 0}, "dimensions", "integer_below_min_value"),
        ({"dimensions": 769}, "dimensions", "integer_above_max_value"),
        ({"options": {"num_ctx": "x"}}, "options", "invalid_type"),
        ({"model": None}, "model", "missing_required_parameter"),
    ],
)
def test_bad_bodies_are_refused_with_the_field(fields: dict[str, Any], param: str, reason: str) -> None:
    """OpenAI's codes, so that clients can tell."""
    with pytest.raises(BadRequest) as refused:
        parse(**fields)
    assert (refused.value.param, refused.value.reason) == (param, reason)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=10))
def test_no_input_is_too_odd_to_be_answered(odd: Any) -> None:
    """It becomes a request or a refusal."""
    with suppress(BadRequest):
        assert parse(input=odd).inputs


def test_the_rest_of_a_body_finds_its_place() -> None:
    """Truncation is off unless asked for, and a list can wait for single texts."""
    request = parse(input=["a", "b"], dimensions=256, truncate=True, options={"num_ctx": 64}, keep_alive="5m")
    assert (request.dimensions, request.truncate, request.load.num_ctx, request.keep_alive_s) == (256, True, 64, 300)
    assert (request.priority, parse().priority, parse().truncate) == (Priority.BATCH, Priority.NORMAL, False)


async def test_vectors_come_as_numbers_in_order() -> None:
    """The shape that every client knows."""
    services = FakeServices()
    response = await post(services, input=["a", "b"])
    assert response.json() == {
        "object": "list",
        "model": "qwen3:8b",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.1, -0.7]},
            {"object": "embedding", "index": 1, "embedding": [0.2, -0.7]},
        ],
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
    }
    assert services.embeds[0].origin == ORIGIN


async def test_vectors_come_as_base64_when_asked() -> None:
    """Whatever the case of the word."""
    response = await post(FakeServices(), encoding_format="BASE64")
    (item,) = response.json()["data"]
    assert item["embedding"] == "zczMPTMzM78="


@pytest.mark.parametrize(
    ("refusal", "param", "code", "words"),
    [
        (PromptTooLong(9, 4), "input", "context_length_exceeded", "maximum context length is 4 tokens"),
        (UnsupportedCapability("m", "embedding"), "model", "unsupported_model", "does not support embedding"),
        (
            BadRequest("token 9 is unknown", param="input", reason="unknown_token"),
            "input",
            "invalid_value",
            "check_embedding_ctx_length=False",
        ),
    ],
)
async def test_the_engines_refusals_are_explained(refusal: Exception, param: str, code: str, words: str) -> None:
    """Above all token ids of another model's tokenizer, which LangChain sends by default."""
    services = FakeServices()
    services.refusal = refusal
    response = await post(services)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert words in error["message"]


async def test_a_vector_survives_both_encodings_alike() -> None:
    """Node's client decodes base64 without asking, Python's takes either."""
    numbers = (await post(FakeServices())).json()["data"][0]["embedding"]
    assert array("f", numbers) == array("f", [0.1, -0.7])
