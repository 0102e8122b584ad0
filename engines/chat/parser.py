"""Reply out: splits generated text into reasoning, answer and tool calls, a piece at a time.

Knows the two conventions that need no per-family table: reasoning between `<think>` and `</think>`, and the Qwen/Hermes
call `<tool_call>{"name": …, "arguments": {…}}</tool_call>`. Text that may be the beginning of a marker is held back;
a call that does not parse is shown as the text it is, never dropped.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from engines.events import Delta, TextDelta, ThinkingDelta, ToolCallDelta
from engines.request import ToolCall

THINK = ("<think>", "</think>")
CALL = ("<tool_call>", "</tool_call>")
_ID_ALPHABET = string.ascii_lowercase + string.digits


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """Which markers a model's template uses."""

    thinks: bool
    calls_tools: bool

    @classmethod
    def of(cls, template: str) -> ReplyFormat:
        """What the literal text of a chat template gives away (`spec/chat-formats.md` section 2)."""
        thinks = all(marker in template for marker in THINK)
        return cls(thinks=thinks, calls_tools=CALL[0] in template and "<function=" not in template)

    def starts_in_thinking(self, prompt: str) -> bool:
        """Whether a prompt ends inside an open reasoning block."""
        return self.thinks and prompt.rfind(THINK[0]) > prompt.rfind(THINK[1])


class ReplyParser:
    """One reply. `decode(chunk)` returns what is certain, `flush()` the rest.

    Args:
        reply_format: the model's markers. in_thinking: the prompt left a reasoning block open.
        with_tools: the request offers tools, so that calls are looked for.
        index: the choice that the deltas belong to.
    """

    def __init__(self, reply_format: ReplyFormat, *, in_thinking: bool, with_tools: bool, index: int = 0) -> None:
        self._index = index
        self._buffer = ""
        self._calls_tools = with_tools and reply_format.calls_tools
        self._num_calls = 0
        self._gap = ""  # white space before a call, which is nothing if the call is one and text if it is not
        self._drops_space = in_thinking
        self._state = "thinking" if in_thinking else "start" if reply_format.thinks else "answer"

    @property
    def is_thinking(self) -> bool:
        """Whether the text arriving now is reasoning."""
        return self._state == "thinking"

    @property
    def is_calling(self) -> bool:
        """Whether the text arriving now is a tool call, shown or not once it is whole."""
        return self._state == "call"

    @property
    def skips_space(self) -> bool:
        """Whether all that arrived since the last marker was white space, which is not shown."""
        return self._drops_space

    @property
    def has_calls(self) -> bool:
        """Whether a tool call was made."""
        return self._num_calls > 0

    def decode(self, text: str) -> list[Delta]:
        """Take in the next piece of the reply."""
        self._buffer += text
        deltas: list[Delta] = []
        while (step := self._step()) is not None:
            deltas += step
        return deltas

    def flush(self) -> list[Delta]:
        """What was held back when the reply is over."""
        rest, self._buffer = self._buffer, ""
        if self._state == "thinking":
            return self._thought(rest.rstrip())
        if self._state == "call":
            return self._call(rest) or self._answer(self._gap + CALL[0] + rest)
        return self._answer(rest if rest.strip() or not self.has_calls else "")

    def _step(self) -> list[Delta] | None:
        """One state's work on the buffer; None when it needs more text."""
        if self._drops_space:
            self._buffer = self._buffer.lstrip()
            if not self._buffer:
                return None
            self._drops_space = False
        match self._state:
            case "start":
                return self._start()
            case "thinking":
                return self._until(THINK[1], self._thought, then="answer")
            case "call":
                return self._finish_call()
            case _ if self._calls_tools:
                return self._until(CALL[0], self._answer, then="call")
            case _:
                text, self._buffer = self._buffer, ""
                return self._answer(text) if text else None

    def _start(self) -> list[Delta] | None:
        """A reasoning block may only open the reply; anything else first means there is none."""
        text = self._buffer.lstrip()
        if text.startswith(THINK[0]):
            self._buffer, self._state, self._drops_space = text[len(THINK[0]) :], "thinking", True
            return []
        if THINK[0].startswith(text):
            return None
        self._state = "answer"
        return []

    def _until(self, marker: str, emit: Callable[[str], list[Delta]], *, then: str) -> list[Delta] | None:
        """Emit text up to `marker`, holding back white space and a possible beginning of it at the end."""
        before, found, after = self._buffer.partition(marker)
        if found:
            text = before.rstrip()
            self._gap = before[len(text) :]
            self._buffer, self._state, self._drops_space = after, then, then == "answer"
            return emit(text)
        safe = len(self._buffer) - _overlap(self._buffer, marker)
        safe = len(self._buffer[:safe].rstrip())
        text, self._buffer = self._buffer[:safe], self._buffer[safe:]
        return emit(text) if text else None

    def _finish_call(self) -> list[Delta] | None:
        body, found, after = self._buffer.partition(CALL[1])
        if not found:
            return None
        calls = self._call(body)
        self._buffer, self._state, self._drops_space = after, "answer", bool(calls)
        return calls or self._answer(self._gap + CALL[0] + body + CALL[1])

    def _thought(self, text: str) -> list[Delta]:
        return [ThinkingDelta(text, self._index)] if text else []

    def _answer(self, text: str) -> list[Delta]:
        return [TextDelta(text, self._index)] if text else []

    def _call(self, body: str) -> list[Delta]:
        try:
            value = msgspec.json.decode(body)  # stricter than json's: what it reads can be written again
        except (msgspec.DecodeError, RecursionError):
            return []
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return []
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, dict):
            return []
        self._num_calls += 1
        return [ToolCallDelta(ToolCall(new_call_id(), value["name"], arguments), self._index)]


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def new_call_id() -> str:
    """A call id as OpenAI's look: `call_` and 24 characters."""
    return "call_" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(24))
