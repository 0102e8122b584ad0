"""Both ends of the worker protocol for token ids, in llama-server's form (`/tokenize` and `/detokenize`)."""

from __future__ import annotations

from typing import Any

import msgspec

from engines.errors import BadRequest, HeadwaterError
from engines.events import Tokenization
from engines.request import Origin, TokenizeRequest

TOKENIZE_PATH, DETOKENIZE_PATH = "/tokenize", "/detokenize"


class _Tokens(msgspec.Struct):
    tokens: tuple[int, ...]


class _Content(msgspec.Struct):
    content: str


def tokenize_path_of(request: TokenizeRequest) -> str:
    """Where a request is posted."""
    return TOKENIZE_PATH if request.text is not None else DETOKENIZE_PATH


def encode_tokenize(request: TokenizeRequest, model: str) -> bytes:
    """A request's body; `model` is the id that the worker was started with."""
    body: dict[str, Any] = {"model": model}
    if request.text is not None:
        special = {"add_special": request.add_special, "parse_special": request.parse_special}
        body |= {"content": request.text, **special}
    else:
        body["tokens"] = request.tokens
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError as error:
        raise BadRequest("the request holds half a surrogate pair, which is no text") from error


def decode_tokenize(data: bytes, *, id: str, surface: str) -> TokenizeRequest:  # noqa: A002  # the field's name
    """The request that `encode_tokenize` wrote. Raises BadRequest for anything else."""
    try:
        body = msgspec.json.decode(data)
        fields = {
            "id": id,
            "model": body["model"],
            "origin": Origin(surface=surface, caller="gateway"),
            "text": body.get("content"),
            "tokens": body.get("tokens"),
            "add_special": body.get("add_special", False),
            "parse_special": body.get("parse_special", True),
        }
        if (fields["text"] is None) == (fields["tokens"] is None):
            raise ValueError("exactly one of `content` and `tokens` must be given")
        return msgspec.convert(fields, TokenizeRequest)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadRequest(f"malformed worker request: {error}") from error


def encode_tokenization(request: TokenizeRequest, found: Tokenization) -> bytes:
    """The reply: what the request had not."""
    return msgspec.json.encode(_Tokens(found.tokens) if request.text is not None else _Content(found.text))


def decode_tokenization(request: TokenizeRequest, data: bytes) -> Tokenization:
    """What `encode_tokenization` wrote. Raises HeadwaterError for anything else."""
    try:
        if request.text is not None:
            return Tokenization(request.text, msgspec.json.decode(data, type=_Tokens).tokens)
        return Tokenization(msgspec.json.decode(data, type=_Content).content, request.tokens or ())
    except msgspec.MsgspecError as error:
        raise HeadwaterError(f"the worker's tokens cannot be read: {error}") from error
