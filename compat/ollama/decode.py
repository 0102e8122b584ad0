"""From bytes to a body struct, with the errors of Go's decoder (`spec/ollama.md` section 1).

Keys match exactly first and then whatever their case; null counts as absent. Both are settled by `_fold` before
msgspec fills the structs. Knows the wording of `msgspec.ValidationError`, because msgspec reports the path and the kind
of a fault only as text.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from compat.keep_alive import parse_keep_alive
from compat.ollama.embeddings import EmbedBody, EmbeddingsBody, RerankBody
from compat.ollama.gojson import decode_first, quote
from compat.ollama.images import decode_image
from compat.ollama.manage import CopyBody, CreateBody, DeleteBody, TransferBody
from compat.ollama.schema import ChatBody, GenerateBody, GenerationBody, KeepAlive, ShowBody
from compat.ollama.tokens import DetokenizeBody, TokenizeBody
from engines.errors import BadRequest
from engines.request import JSON

T = TypeVar("T")
_G = TypeVar("_G", bound=GenerationBody)

_BODIES = (
    *(ChatBody, GenerateBody, ShowBody, EmbedBody, EmbeddingsBody, RerankBody),
    *(CreateBody, CopyBody, DeleteBody, TransferBody, TokenizeBody, DetokenizeBody),
)
_TYPES: dict[type, inspect.Type] = {kind: inspect.type_info(kind) for kind in _BODIES}
_FOLDED = (inspect.StructType, inspect.ListType, inspect.DictType)

_MAX_TOP_LOGPROBS = 20
_LEVELS = '"high", "medium", "low", "max", true, or false'
_COMPLAINT = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?", re.DOTALL)
_WRONG_TYPE = re.compile(r"Expected `(?P<expected>[^`]*)`, got `(?P<got>[^`]*)`")
_JSON_KINDS = {"list": "array", "dict": "object"}
_GO_GOT = {"str": "string", "int": "number", "float": "number"}
_GO_EXPECTED = {"str": "string", "array": "[]interface {}", "object": "map[string]interface {}"}


def decode_chat(data: bytes) -> ChatBody:
    """The body of a chat. Raises BadRequest."""
    return _checked(_decode(ChatBody, "ChatRequest", data))


def decode_generate(data: bytes) -> GenerateBody:
    """The body of a generation. Raises BadRequest."""
    return _checked(_decode(GenerateBody, "GenerateRequest", data))


def decode_show(data: bytes) -> ShowBody:
    """The body of a show. Raises BadRequest."""
    return _decode(ShowBody, "ShowRequest", data)


def decode_embed(data: bytes) -> EmbedBody:
    """The body of a request for embeddings. Raises BadRequest."""
    return _decode(EmbedBody, "EmbedRequest", data)


def decode_embeddings(data: bytes) -> EmbeddingsBody:
    """The body of a request for one embedding, in the old form. Raises BadRequest."""
    return _decode(EmbeddingsBody, "EmbeddingRequest", data)


def decode_rerank(data: bytes) -> RerankBody:
    """The body of a reranking. Raises BadRequest."""
    return _decode(RerankBody, "RerankRequest", data)


def decode_tokenize(data: bytes) -> TokenizeBody:
    """The body of a request for token ids. Raises BadRequest."""
    return _decode(TokenizeBody, "TokenizeRequest", data)


def decode_detokenize(data: bytes) -> DetokenizeBody:
    """The body of a request for the text of token ids. Raises BadRequest."""
    return _decode(DetokenizeBody, "DetokenizeRequest", data)


def decode_create(data: bytes) -> CreateBody:
    """The body of a request for a model. Raises BadRequest."""
    return _decode(CreateBody, "CreateRequest", data)


def decode_copy(data: bytes) -> CopyBody:
    """The body of a copy. Raises BadRequest."""
    return _decode(CopyBody, "CopyRequest", data)


def decode_delete(data: bytes) -> DeleteBody:
    """The body of a deletion. Raises BadRequest."""
    return _decode(DeleteBody, "DeleteRequest", data)


def decode_pull(data: bytes) -> TransferBody:
    """The body of a pull. Raises BadRequest."""
    return _decode(TransferBody, "PullRequest", data)


def decode_push(data: bytes) -> TransferBody:
    """The body of a push. Raises BadRequest."""
    return _decode(TransferBody, "PushRequest", data)


def _checked(body: _G) -> _G:
    if not 0 <= body.top_logprobs <= _MAX_TOP_LOGPROBS:
        raise BadRequest(f"top_logprobs must be between 0 and {_MAX_TOP_LOGPROBS}", param="top_logprobs")
    return body


def _decode(kind: type[T], go_name: str, data: bytes) -> T:
    value = decode_first(data)
    try:
        value = _fold({} if value is None else value, _TYPES[kind])
        return msgspec.convert(value, kind, dec_hook=_read_custom)
    except msgspec.ValidationError as error:
        raise _explain(str(error), go_name, value) from None
    except RecursionError:
        raise BadRequest("exceeded max depth") from None


def _fold(value: JSON, kind: inspect.Type) -> JSON:
    """The value with the keys that `kind` knows, spelled as it does, and without nulls in its objects."""
    if isinstance(kind, inspect.UnionType):
        kind = next((member for member in kind.types if isinstance(member, _FOLDED)), kind)
    match kind, value:
        case inspect.StructType(cls=struct), dict():
            exact, folded = _fields(struct)
            return {
                field.encode_name: _fold(item, field.type)
                for key, item in value.items()
                if item is not None and (field := exact.get(key) or folded.get(key.lower()))
            }
        case inspect.ListType(item_type=item_kind), list() if isinstance(item_kind, _FOLDED):
            return [_fold(item, item_kind) for item in value]
        case inspect.DictType(value_type=item_kind), dict() if isinstance(item_kind, _FOLDED):
            return {key: _fold(item, item_kind) for key, item in value.items()}
        case _:
            return value


@lru_cache
def _fields(struct: type) -> tuple[dict[str, inspect.Field], dict[str, inspect.Field]]:
    """A struct's fields by their names, and by their names in lower case."""
    described = inspect.type_info(struct)
    assert isinstance(described, inspect.StructType)
    exact = {field.encode_name: field for field in described.fields}
    return exact, {name.lower(): field for name, field in exact.items()}


def _read_custom(kind: type, value: JSON) -> Any:
    """KeepAlive and Image from their wire forms."""
    if kind is KeepAlive:
        return KeepAlive(parse_keep_alive(value) or 0.0)
    if not isinstance(value, str):
        got = type(value).__name__
        raise TypeError(f"Expected `str`, got `{_JSON_KINDS.get(got, got)}`")
    return kind(decode_image(value))


def _explain(complaint: str, go_name: str, body: JSON) -> BadRequest:
    match = _COMPLAINT.fullmatch(complaint)
    assert match is not None, "every part of the pattern is optional"
    path = re.sub(r"\[[^\]]*\]", "", match["path"] or "")
    if path == "think":
        return _wrong_think(body["think"])
    wrong = _WRONG_TYPE.fullmatch(match["what"])
    if wrong is None:
        return BadRequest(f"json: invalid value in {go_name}.{path}: {match['what']}", param=path)
    expected = wrong["expected"].split(" | ")[0]
    got = _GO_GOT.get(wrong["got"], wrong["got"])
    where = f"struct field {go_name}.{path}" if path else "value"
    target = _GO_EXPECTED.get(expected, expected) if path else f"api.{go_name}"
    return BadRequest(f"json: cannot unmarshal {got} into Go {where} of type {target}", param=path or None)


def _wrong_think(value: JSON) -> BadRequest:
    if isinstance(value, str):
        return BadRequest(f"invalid think value: {quote(value)} (must be {_LEVELS})", param="think")
    return BadRequest(f"think must be a boolean or string ({_LEVELS})", param="think")
