"""The messages layer: turns that come before every chat, as Go writes and reads them."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import msgspec

from engines.request import JSON, Message
from engines.store.gojson import encode_json
from engines.store.manifests import decode_json


class _Function(msgspec.Struct, frozen=True):
    index: int
    name: str
    arguments: JSON


class _Call(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str = ""
    function: _Function | None = None


class _Turn(msgspec.Struct, frozen=True):
    """What is always written comes first (Ollama api/types.go, Message)."""

    role: str
    content: str = ""


class _RichTurn(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    role: str
    content: str
    thinking: str = ""
    images: tuple[str, ...] = ()
    tool_calls: tuple[_Call, ...] = ()
    tool_name: str = ""
    tool_call_id: str = ""


def encode_messages(messages: Sequence[Message]) -> bytes:
    """The layer's bytes."""
    return encode_json([_encode(message) for message in messages])


def decode_messages(text: str) -> tuple[Message, ...]:
    """The turns, of which only role and text are ever used. Raises ManifestDamaged."""
    turns = decode_json(text.encode(), tuple[_Turn, ...], "the messages layer") if text else ()
    return tuple(Message(turn.role, turn.content) for turn in turns)


def _encode(message: Message) -> _RichTurn:
    calls = (
        _Call(call.id, _Function(index, call.name, call.arguments)) for index, call in enumerate(message.tool_calls)
    )
    return _RichTurn(
        role=message.role,
        content=message.content,
        thinking=message.thinking,
        images=tuple(base64.b64encode(image).decode() for image in message.images),
        tool_calls=tuple(calls),
        tool_name=message.tool_name,
        tool_call_id=message.tool_call_id,
    )
