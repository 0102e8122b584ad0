"""The worker protocol for token ids."""

from __future__ import annotations

import json

import pytest

from engines.errors import BadRequest, HeadwaterError
from engines.events import Tokenization
from engines.request import Origin, TokenizeRequest
from engines.wire_tokens import (
    decode_tokenization,
    decode_tokenize,
    encode_tokenization,
    encode_tokenize,
    tokenize_path_of,
)

ORIGIN = Origin(surface="ollama/tokenize", caller="gateway")
TEXT = TokenizeRequest("r", "m", ORIGIN, text="hi", add_special=True, parse_special=False)
TOKENS = TokenizeRequest("r", "m", ORIGIN, tokens=(1, 2))


@pytest.mark.parametrize(("request_", "path"), [(TEXT, "/tokenize"), (TOKENS, "/detokenize")])
def test_a_request_arrives_as_it_left(request_: TokenizeRequest, path: str) -> None:
    """On the path that llama-server has for it."""
    assert tokenize_path_of(request_) == path
    assert decode_tokenize(encode_tokenize(request_, "m"), id="r", surface=ORIGIN.surface) == request_


@pytest.mark.parametrize("request_", [TEXT, TOKENS])
def test_a_reply_tells_what_the_request_had_not(request_: TokenizeRequest) -> None:
    """The reader puts both together."""
    found = Tokenization("hi", (1, 2))
    data = encode_tokenization(request_, found)
    assert len(json.loads(data)) == 1
    assert decode_tokenization(request_, data) == found


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"model":"m"}',
        '{"model":"m","content":"a","tokens":[1]}',
        '{"model":"m","tokens":["a"]}',
    ],
)
def test_another_request_is_refused(body: str) -> None:
    """Whatever it is."""
    with pytest.raises(BadRequest, match="malformed worker request"):
        decode_tokenize(body.encode(), id="r", surface="s")


def test_half_a_character_is_no_text() -> None:
    """JSON could hold it, UTF-8 cannot."""
    with pytest.raises(BadRequest, match="surrogate"):
        encode_tokenize(TokenizeRequest("r", "m", ORIGIN, text="\ud800"), "m")


@pytest.mark.parametrize("request_", [TEXT, TOKENS])
def test_another_reply_is_the_workers_fault(request_: TokenizeRequest) -> None:
    """And not the client's."""
    with pytest.raises(HeadwaterError, match="cannot be read"):
        decode_tokenization(request_, b"{}")
