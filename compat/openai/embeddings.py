"""Embeddings in OpenAI's words: body to request, vectors to reply (`spec/openai.md` section 6). Pure.

An `input` may also be a content object, or a list of such, as in llama-server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from compat.keep_alive import parse_keep_alive
from compat.openai.refusals import invalid, invalid_type, unsupported_value
from compat.openai.schema import Token
from compat.vectors import render_base64, render_numbers
from engines.errors import BadRequest
from engines.events import Embeddings, Usage
from engines.model import ModelCard
from engines.options import OptionTypeError, parse_load_options
from engines.request import EmbedRequest, LoadOptions, Origin, Priority

MAX_INPUTS = 2048
UNKNOWN_TOKEN = "unknown_token"  # noqa: S105  # the engine's reason for refusing token ids
_GPT_TOKENS = (
    "These token ids were probably made with another model's tokenizer: send text instead; in LangChain's "
    "OpenAIEmbeddings set check_embedding_ctx_length=False."
)
_encode = msgspec.json.Encoder().encode


class Part(Struct):
    """One part of a content object."""

    type: str
    text: str | None = None


class Content(Struct):
    """An input as llama-server also takes it."""

    content: str | list[Part]


class EmbeddingsBody(Struct, kw_only=True):
    """The body of `POST /v1/embeddings`. `options` and `keep_alive` are Ollama's."""

    model: str
    input: str | Content | list[str | Token | list[Token] | Content] | None = None
    encoding_format: str | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    truncate: bool | None = None
    options: dict[str, Any] | None = None
    keep_alive: Any = None


class EmbeddingReply(Struct):
    """One vector."""

    object: str
    index: int
    embedding: msgspec.Raw | str


class UsageReply(Struct):
    """What it cost; nothing is generated. The last is absent where nothing was cut."""

    prompt_tokens: int
    total_tokens: int
    truncated_tokens: int | UnsetType = UNSET


class EmbeddingsReply(Struct):
    """The reply."""

    object: str
    model: str
    data: list[EmbeddingReply]
    usage: UsageReply


def parse_embeddings(body: EmbeddingsBody, card: ModelCard, *, request_id: str, origin: Origin) -> EmbedRequest:
    """The request of a body. Raises BadRequest."""
    wants_base64(body)
    if body.dimensions is not None and 0 < card.embedding_length < body.dimensions:
        why = f"the model's vectors have {card.embedding_length} dimensions"
        raise invalid("dimensions", why, "integer_above_max_value")
    inputs = _inputs(body)
    return EmbedRequest(
        id=request_id,
        model=body.model,
        origin=origin,
        inputs=inputs,
        truncate=bool(body.truncate),
        dimensions=body.dimensions,
        priority=Priority.NORMAL if len(inputs) == 1 else Priority.BATCH,
        load=load_options(body.options),
        keep_alive_s=parse_keep_alive(body.keep_alive),
    )


def wants_base64(body: EmbeddingsBody) -> bool:
    """Which of the two encodings. Raises BadRequest for any other."""
    encoding = (body.encoding_format or "float").lower()
    if encoding not in ("float", "base64"):
        raise invalid("encoding_format", "expected 'float' or 'base64'")
    return encoding == "base64"


def load_options(options: dict[str, Any] | None) -> LoadOptions:
    """Ollama's load options, in this dialect's errors. Raises BadRequest."""
    try:
        return parse_load_options(options or {})
    except OptionTypeError as error:
        raise BadRequest(f"Invalid 'options': {error.message}.", param="options", reason="invalid_type") from None


def _inputs(body: EmbeddingsBody) -> tuple[str | tuple[int, ...], ...]:
    """One entry for each input. A flat list of numbers is a single input in token ids."""
    given = body.input
    if given is None or given == [] or (isinstance(given, list) and [] in given):
        raise invalid("input", "nothing to embed")
    if not isinstance(given, list):
        return (_text(given),)
    if all(isinstance(item, int) for item in given):
        return (tuple(item for item in given if isinstance(item, int)),)
    if len(given) > MAX_INPUTS:
        raise invalid("input", f"expected at most {MAX_INPUTS} inputs", "array_above_max_length")
    return tuple(_input(item, position) for position, item in enumerate(given))


def _input(item: str | int | list[int] | Content, position: int) -> str | tuple[int, ...]:
    if isinstance(item, int):
        raise invalid_type(f"input[{position}]", "str", "int")
    return tuple(item) if isinstance(item, list) else _text(item)


def _text(item: str | Content) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item.content, str):
        return item.content
    if any(part.type != "text" for part in item.content):
        raise unsupported_value("input", "only text can be embedded")
    return "".join(part.text or "" for part in item.content)


def explain_tokens(error: BadRequest) -> BadRequest:
    """An engine's refusal, with what to do about token ids that the model does not have."""
    if error.reason != UNKNOWN_TOKEN:
        return error
    return invalid("input", f"{error.message}. {_GPT_TOKENS.removesuffix('.')}")


def render_embeddings(body: EmbeddingsBody, embeddings: Embeddings) -> bytes:
    """The reply's body."""
    vectors = embeddings.vectors
    rendered: Sequence[msgspec.Raw | str]
    rendered = [render_base64(vector) for vector in vectors] if wants_base64(body) else render_numbers(vectors)
    data = [EmbeddingReply("embedding", index, vector) for index, vector in enumerate(rendered)]
    return _encode(EmbeddingsReply("list", body.model, data, render_prompt_usage(embeddings.usage)))


def render_prompt_usage(usage: Usage) -> UsageReply:
    """`usage` of what reads and writes nothing."""
    return UsageReply(usage.prompt_tokens, usage.prompt_tokens, usage.truncated_tokens or UNSET)
