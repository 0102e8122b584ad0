"""From bytes to a body struct, and from msgspec's complaints to OpenAI's error codes (`spec/openai.md` section 2.1).

Knows the wording of `msgspec.ValidationError`, because msgspec reports the path and the kind of a fault only as text.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from compat.openai.embeddings import EmbeddingsBody
from compat.openai.refusals import invalid, invalid_type, missing
from compat.openai.rerank import RerankBody, ScoreBody
from compat.openai.schema import ChatBody, CompletionBody
from engines.errors import BadRequest

T = TypeVar("T")

_CHAT = msgspec.json.Decoder(ChatBody)
_COMPLETION = msgspec.json.Decoder(CompletionBody)
_EMBEDDINGS = msgspec.json.Decoder(EmbeddingsBody)
_RERANK = msgspec.json.Decoder(RerankBody)
_SCORE = msgspec.json.Decoder(ScoreBody)
_UTF8_BOM = b"\xef\xbb\xbf"

_COMPLAINT = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>\w+)`")
_WRONG_TYPE = re.compile(r"Expected `(?P<expected>[^`]*)`, got `(?P<got>[^`]*)`")
_OUT_OF_RANGE = re.compile(r"Expected `(?P<type>int|float)` (?P<sign>[<>]=?) (?P<bound>\S+)")
_NUMBERS = {"int": "integer", "float": "decimal"}


def decode_chat(data: bytes) -> ChatBody:
    """The body of a chat completion. Raises BadRequest."""
    return _decode(_CHAT, data)


def decode_completion(data: bytes) -> CompletionBody:
    """The body of a completion. Raises BadRequest."""
    return _decode(_COMPLETION, data)


def decode_embeddings(data: bytes) -> EmbeddingsBody:
    """The body of a request for embeddings. Raises BadRequest."""
    return _decode(_EMBEDDINGS, data)


def decode_rerank(data: bytes) -> RerankBody:
    """The body of a reranking. Raises BadRequest."""
    return _decode(_RERANK, data)


def decode_score(data: bytes) -> ScoreBody:
    """The body of a scoring. Raises BadRequest."""
    return _decode(_SCORE, data)


def _decode(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data.removeprefix(_UTF8_BOM))
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The request body is not valid JSON: {error}") from None
    except RecursionError:
        raise BadRequest("The request body is nested too deeply.") from None


def _explain(complaint: str) -> BadRequest:
    match = _COMPLAINT.fullmatch(complaint)
    assert match is not None, "every part of the pattern is optional"
    # `[...]` stands for a key of an object without a fixed shape; clients know the object by its name.
    what, path = match["what"], (match["path"] or "").replace("[...]", "")
    if absent := _MISSING.fullmatch(what):
        return missing(f"{path}.{absent['field']}" if path else absent["field"])
    if wrong := _WRONG_TYPE.fullmatch(what):
        return _wrong_type(path, wrong["expected"], wrong["got"])
    if outside := _OUT_OF_RANGE.fullmatch(what):
        side = "below_min" if outside["sign"].startswith(">") else "above_max"
        bound = f"expected a value {outside['sign']} {outside['bound']}"
        return invalid(path, bound, f"{_NUMBERS[outside['type']]}_{side}_value")
    if what == "Expected `array` of length >= 1":
        return invalid(path, "empty array", "empty_array")
    return invalid(path, what) if path else BadRequest(f"Invalid request body: {what}.")


def _wrong_type(path: str, expected: str, got: str) -> BadRequest:
    if not path:
        return BadRequest(f"The request body must be a JSON object, not {got}.")
    if got == "null" and not path.endswith("]"):
        return missing(path)  # null means absent, and what may be absent also accepts null
    wanted = " or ".join(kind for kind in expected.split(" | ") if kind != "null")
    return invalid_type(path, wanted, got)
