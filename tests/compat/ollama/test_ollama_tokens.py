"""Token ids in Ollama's words."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ollama_fakes import ORIGIN, FakeServices, card, serving

from compat.ollama.decode import decode_detokenize, decode_tokenize
from compat.ollama.gojson import encode
from compat.ollama.tokens import MAX_CHARACTERS, MAX_TOKENS, DetokenizeBody, TokenizeBody, parse_detokenize
from compat.ollama.tokens import parse_tokenize as parse
from engines.errors import BadRequest
from engines.options import OptionTypeError
from engines.request import FOREVER

NAME = card().name
DURATIONS = {"total_duration": 512_000_000, "load_duration": 9_000_000}


async def post(path: str, services: FakeServices | None = None, /, **body: Any) -> httpx.Response:
    """What a real server answers."""
    async with serving(services or FakeServices()) as url, httpx.AsyncClient(base_url=url) as client:
        return await client.post(path, json=body)


@pytest.mark.parametrize("field", ["content", "text"])
async def test_text_becomes_token_ids(field: str) -> None:
    """Under either name that proposals have for it."""
    response = await post("/api/tokenize", model=NAME, **{field: "hi"})
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert response.json() == {"model": NAME, "tokens": [104, 105], **DURATIONS}


async def test_token_ids_become_text() -> None:
    """Which the reply has under both names."""
    response = await post("/api/detokenize", model=NAME, tokens=[104, 105])
    assert response.json() == {"model": NAME, "content": "hi", "text": "hi", **DURATIONS}


async def test_what_is_asked_for_reaches_the_house() -> None:
    """Special tokens, how the model is to be loaded, and for how long."""
    services = FakeServices()
    said = {"add_special": True, "parse_special": False, "keep_alive": -1, "options": {"num_ctx": 512}}
    await post("/api/tokenize", services, model=NAME, content="hi", **said)
    (request,) = services.tokenizations
    assert (request.text, request.tokens) == ("hi", None)
    assert (request.add_special, request.parse_special) == (True, False)
    assert (request.keep_alive_s, request.load.num_ctx) == (FOREVER, 512)


async def test_markers_are_read_and_nothing_is_added_without_a_word() -> None:
    """As in llama-server."""
    request = parse(TokenizeBody(model=NAME, content="hi"), request_id="r", origin=ORIGIN)
    assert (request.add_special, request.parse_special) == (False, True)


@pytest.mark.parametrize("path", ["/api/tokenize", "/api/detokenize"])
async def test_nothing_is_no_error(path: str) -> None:
    """An empty text has no tokens, and no tokens are an empty text."""
    found = (await post(path, model=NAME)).json()
    assert found.get("tokens", []) == []
    assert found.get("content", "") == ""


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/tokenize", {}, 400, "model is required"),
        ("/api/detokenize", {}, 400, "model is required"),
        ("/api/tokenize", {"model": "m:cloud"}, 403, "ollama cloud is disabled: remote model is unavailable"),
        ("/api/tokenize", {"model": NAME, "content": "a", "text": "b"}, 400, "content and text mean the same"),
        ("/api/tokenize", {"model": NAME, "content": 1}, 400, "json: cannot unmarshal number into Go struct field"),
        (
            "/api/tokenize",
            {"model": NAME, "options": {"num_ctx": "x"}},
            500,
            'option "num_ctx" must be of type integer',
        ),
        ("/api/detokenize", {"model": NAME, "tokens": [-1]}, 400, "DetokenizeRequest.tokens"),
        ("/api/detokenize", {"model": NAME, "tokens": [2**31]}, 400, "DetokenizeRequest.tokens"),
        ("/api/detokenize", {"model": NAME, "tokens": [1.5]}, 400, "DetokenizeRequest.tokens"),
        ("/api/detokenize", {"model": NAME, "tokens": "hi"}, 400, "DetokenizeRequest.tokens"),
    ],
)
async def test_refusals_are_in_ollamas_form(path: str, body: dict[str, Any], status: int, text: str) -> None:
    """A status and one string."""
    response = await post(path, **body)
    assert response.status_code == status
    assert text in response.json()["error"]


async def test_refusals_of_the_house_keep_their_words() -> None:
    """An id that the model does not have is the client's fault."""
    services = FakeServices()
    services.refusal = BadRequest("token 9 is not in this model's vocabulary of 8", param="tokens")
    response = await post("/api/detokenize", services, model=NAME, tokens=[9])
    assert (response.status_code, response.json()) == (400, {"error": services.refusal.message})


def test_requests_are_bounded() -> None:
    """So that one does not hold up a model's other prompts for long."""
    with pytest.raises(BadRequest, match="at most 4194304 characters"):
        parse(TokenizeBody(content="a" * (MAX_CHARACTERS + 1)), request_id="r", origin=ORIGIN)
    with pytest.raises(BadRequest, match="at most 1048576"):
        parse_detokenize(DetokenizeBody(tokens=[1] * (MAX_TOKENS + 1)), request_id="r", origin=ORIGIN)


_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.lists(st.integers())


@given(st.dictionaries(st.sampled_from(["model", "content", "text", "tokens", "add_special", "options"]), _values))
def test_any_body_is_read_or_refused(body: dict[str, Any]) -> None:
    """Nothing else comes of it."""
    data = encode(body)
    with suppress(BadRequest, OptionTypeError):
        parse(decode_tokenize(data), request_id="r", origin=ORIGIN)
    with suppress(BadRequest, OptionTypeError):
        parse_detokenize(decode_detokenize(data), request_id="r", origin=ORIGIN)
