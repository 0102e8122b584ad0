"""Events to Ollama's JSON (`spec/ollama.md` sections 2, 5.1 and 5.2). Pure.

A stream's objects are put together from bytes that never change and the few that do, because one is made for every
token. The surprise: all tool calls of an answer wait for its last object, where Ollama's native mode has them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from msgspec import UNSET, UnsetType

from compat.ollama.gojson import encode
from compat.ollama.logprobs import render_logprobs
from compat.ollama.schema import (
    CalledFunction,
    CallReply,
    ChatDebugReply,
    ChatReply,
    DebugInfo,
    GenerateDebugReply,
    GenerateReply,
    MessageReply,
)
from compat.services import Answer
from engines.events import Event, Finished, FinishReason, TextDelta, ThinkingDelta, TokenLogprob, ToolCallDelta, Usage
from engines.request import ToolCall

_Count = int | UnsetType
_OUR_ID_CHARACTERS = len("call_") + 8


class Reply(Protocol):
    """One answer's objects; `now_ns` is nanoseconds since the epoch."""

    def render(self, event: Event, now_ns: int) -> bytes | None:
        """The event's object in a stream, without its line's end; None when the event shows nothing."""

    def whole(self, answer: Answer, now_ns: int) -> bytes:
        """The only object of an answer that is not streamed."""

    def empty(self, reason: FinishReason, now_ns: int) -> bytes:
        """The object of a request that only loads or unloads the model."""

    def prompt(self, text: str, num_images: int, now_ns: int) -> bytes:
        """The object of a request that only asks what the model would be given."""


class _Head:
    """What every object begins with: the model as the client typed it, and the time."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._prefix = b'{"model":' + encode(model) + b',"created_at":"'

    def chunk(self, now_ns: int, rest: bytes, logprobs: Sequence[TokenLogprob]) -> bytes:
        """An intermediate object."""
        told = b',"logprobs":' + encode(render_logprobs(logprobs)) if logprobs else b""
        return self._prefix + render_time(now_ns).encode() + b'",' + rest + b',"done":false' + told + b"}"


class ChatObjects:
    """The objects of `/api/chat`."""

    def __init__(self, model: str) -> None:
        self._head = _Head(model)
        self._calls: list[ToolCall] = []

    def render(self, event: Event, now_ns: int) -> bytes | None:
        """The event's object."""
        match event:
            case TextDelta(text, _, logprobs) if text or logprobs:
                return self._chunk(now_ns, encode(text), logprobs)
            case ThinkingDelta(text, _, logprobs) if text or logprobs:
                thinking = b',"thinking":' + encode(text) if text else b""
                return self._chunk(now_ns, b'""' + thinking, logprobs)
            case ToolCallDelta(call):
                self._calls.append(call)
                return None
            case Finished():
                return self._last(MessageReply("assistant", "", UNSET, _render_calls(self._calls)), (), event, now_ns)
            case _:
                return None

    def whole(self, answer: Answer, now_ns: int) -> bytes:
        """The only object."""
        choice = answer.choices[0]
        calls = _render_calls([delta.call for delta in choice.tool_calls])
        message = MessageReply("assistant", choice.text, choice.thinking or UNSET, calls)
        assert answer.finished is not None, "the last event of every answer"
        return self._last(message, choice.logprobs, answer.finished, now_ns)

    def empty(self, reason: FinishReason, now_ns: int) -> bytes:
        """Load and unload."""
        message = MessageReply("assistant", "")
        return encode(ChatReply(self._head.model, render_time(now_ns), message, done=True, done_reason=reason.value))

    def prompt(self, text: str, num_images: int, now_ns: int) -> bytes:
        """Nobody has spoken, so the message has no role."""
        debug = _debug(text, num_images)
        return encode(ChatDebugReply(self._head.model, render_time(now_ns), MessageReply("", ""), False, debug))

    def _chunk(self, now_ns: int, content: bytes, logprobs: Sequence[TokenLogprob]) -> bytes:
        return self._head.chunk(now_ns, b'"message":{"role":"assistant","content":' + content + b"}", logprobs)

    def _last(self, message: MessageReply, logprobs: Sequence[TokenLogprob], finished: Finished, now_ns: int) -> bytes:
        reply = ChatReply(
            self._head.model,
            render_time(now_ns),
            message,
            True,
            _render_reason(finished.reason),
            render_logprobs(logprobs) or UNSET,
            *_statistics(finished),
            *_losses(finished.usage),
        )
        return encode(reply)


class GenerateObjects:
    """The objects of `/api/generate`."""

    def __init__(self, model: str) -> None:
        self._head = _Head(model)

    def render(self, event: Event, now_ns: int) -> bytes | None:
        """The event's object."""
        match event:
            case TextDelta(text, _, logprobs) if text or logprobs:
                return self._head.chunk(now_ns, b'"response":' + encode(text), logprobs)
            case ThinkingDelta(text, _, logprobs) if text or logprobs:
                thinking = b',"thinking":' + encode(text) if text else b""
                return self._head.chunk(now_ns, b'"response":""' + thinking, logprobs)
            case Finished():
                return self._last("", "", (), event, now_ns)
            case _:
                return None

    def whole(self, answer: Answer, now_ns: int) -> bytes:
        """The only object."""
        choice = answer.choices[0]
        assert answer.finished is not None, "the last event of every answer"
        return self._last(choice.text, choice.thinking, choice.logprobs, answer.finished, now_ns)

    def empty(self, reason: FinishReason, now_ns: int) -> bytes:
        """Load and unload."""
        return encode(GenerateReply(self._head.model, render_time(now_ns), "", UNSET, True, reason.value))

    def prompt(self, text: str, num_images: int, now_ns: int) -> bytes:
        """The prompt, and no response."""
        return encode(GenerateDebugReply(self._head.model, render_time(now_ns), "", False, _debug(text, num_images)))

    def _last(
        self, response: str, thinking: str, logprobs: Sequence[TokenLogprob], finished: Finished, now_ns: int
    ) -> bytes:
        reply = GenerateReply(
            self._head.model,
            render_time(now_ns),
            response,
            thinking or UNSET,
            True,
            _render_reason(finished.reason),
            finished.tokens or UNSET,
            *_statistics(finished),
            render_logprobs(logprobs) or UNSET,
            *_losses(finished.usage),
        )
        return encode(reply)


def _debug(prompt: str, num_images: int) -> DebugInfo:
    return DebugInfo(prompt, num_images or UNSET)


def render_time(now_ns: int) -> str:
    """RFC 3339 in UTC with as many fractional digits as it takes (section 2, `created_at`)."""
    seconds, nanoseconds = divmod(now_ns, 10**9)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{nanoseconds:09d}".rstrip("0").rstrip(".") + "Z"


def _render_reason(reason: FinishReason) -> str:
    """`length` or `stop`: a tool call is a stop to Ollama."""
    return "length" if reason is FinishReason.LENGTH else "stop"


def _statistics(finished: Finished) -> tuple[_Count, _Count, _Count, _Count, _Count, _Count]:
    """Ollama's six statistics. A model that was there already has cost a load time too, that of finding it so."""
    usage, timings = finished.usage, finished.timings
    return (
        _nanoseconds(timings.total_s),
        _nanoseconds(timings.queue_s + timings.load_s),
        usage.prompt_tokens or UNSET,
        _nanoseconds(timings.prefill_s),
        usage.completion_tokens or UNSET,
        _nanoseconds(timings.decode_s),
    )


def _losses(usage: Usage) -> tuple[_Count, bool | UnsetType]:
    """Our own two fields, for an answer whose prompt was cut or whose window moved on; else neither appears."""
    if not (usage.truncated_tokens or usage.shifted_tokens):
        return UNSET, UNSET
    return usage.prompt_tokens + usage.truncated_tokens, True


def _nanoseconds(seconds: float) -> int:
    """Never 0, which would make the field vanish."""
    return max(round(seconds * 1e9), 1)


def _render_calls(calls: list[ToolCall]) -> list[CallReply] | UnsetType:
    return [_render_call(index, call) for index, call in enumerate(calls)] or UNSET


def _render_call(index: int, call: ToolCall) -> CallReply:
    """One call. Arguments are always an object, so none are left of those that the model wrote as broken JSON."""
    arguments = call.arguments if isinstance(call.arguments, dict) else {}
    call_id = call.id[:_OUR_ID_CHARACTERS] if call.id.startswith("call_") else call.id
    return CallReply(call_id, CalledFunction(index, call.name, arguments))
