"""Token ids in Ollama's words: body to request, result to reply. Pure.

`/api/tokenize` and `/api/detokenize` are in no release of Ollama. Their shape is what its proposals have in common
(https://github.com/ollama/ollama/pull/8106, 12030, 16820): a text is called `content`, as in llama-server, or `text`,
as in the first of them, whose clients find it under that name in the reply too. `add_special` and `parse_special`, and
what they are when they are not said, are llama-server's.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from compat.ollama.gojson import encode
from compat.ollama.options import parse_options
from compat.ollama.schema import KeepAlive, Token
from engines.errors import BadRequest
from engines.events import Timings, Tokenization
from engines.request import Origin, TokenizeRequest

MAX_CHARACTERS = 4 << 20
MAX_TOKENS = 1 << 20
"""What one request may hold: some seconds of work, during which the model's other prompts wait."""


class TokenizeBody(Struct):
    """`POST /api/tokenize`."""

    model: str = ""
    content: str = ""
    text: str = ""
    add_special: bool = False
    parse_special: bool = True
    keep_alive: KeepAlive | None = None
    options: dict[str, Any] = {}


class DetokenizeBody(Struct):
    """`POST /api/detokenize`."""

    model: str = ""
    tokens: list[Token] = []
    keep_alive: KeepAlive | None = None
    options: dict[str, Any] = {}


class TokenizeReply(Struct):
    """The reply to `TokenizeBody`. Durations are nanoseconds."""

    model: str
    tokens: tuple[int, ...]
    total_duration: int
    load_duration: int


class DetokenizeReply(Struct):
    """The reply to `DetokenizeBody`; both names mean the same text."""

    model: str
    content: str
    text: str
    total_duration: int
    load_duration: int


def parse_tokenize(body: TokenizeBody, *, request_id: str, origin: Origin) -> TokenizeRequest:
    """The request of a body. Raises BadRequest, or OptionTypeError, which answers 500."""
    if body.content and body.text:
        raise BadRequest("content and text mean the same: send one of them", param="text")
    text = body.content or body.text
    if len(text) > MAX_CHARACTERS:
        raise BadRequest(f"the text is too long: at most {MAX_CHARACTERS} characters are possible", param="content")
    return TokenizeRequest(
        id=request_id,
        model=body.model,
        origin=origin,
        text=text,
        add_special=body.add_special,
        parse_special=body.parse_special,
        load=parse_options(body.options)[1],
        keep_alive_s=body.keep_alive,
    )


def parse_detokenize(body: DetokenizeBody, *, request_id: str, origin: Origin) -> TokenizeRequest:
    """The request of a body. Raises as `parse_tokenize` does."""
    if len(body.tokens) > MAX_TOKENS:
        raise BadRequest(f"there are too many tokens: at most {MAX_TOKENS} are possible", param="tokens")
    return TokenizeRequest(
        id=request_id,
        model=body.model,
        origin=origin,
        tokens=tuple(body.tokens),
        load=parse_options(body.options)[1],
        keep_alive_s=body.keep_alive,
    )


def render_tokenize(body: TokenizeBody, found: Tokenization) -> bytes:
    """The reply's body."""
    return encode(TokenizeReply(body.model, found.tokens, *_durations(found.timings)))


def render_detokenize(body: DetokenizeBody, found: Tokenization) -> bytes:
    """The reply's body."""
    return encode(DetokenizeReply(body.model, found.text, found.text, *_durations(found.timings)))


def _durations(timings: Timings) -> tuple[int, int]:
    return round(timings.total_s * 1e9), round((timings.queue_s + timings.load_s) * 1e9)
