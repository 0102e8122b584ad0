"""Reply out: splits generated text into reasoning, answer and tool calls, a piece at a time.

Knows the conventions that need no per-family table: reasoning between two markers that open the reply, the Qwen/Hermes
call `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, and calls as a Go template has them (`calls`). Text that
may be the beginning of a marker is held back; a call that does not parse is shown as the text it is, never dropped.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection
from dataclasses import dataclass

import msgspec

from engines.chat.calls import Call, CallFinder, overlap
from engines.events import Delta, TextDelta, ThinkingDelta, ToolCallDelta
from engines.request import JSON, ToolCall

THINK = ("<think>", "</think>")
CALL = ("<tool_call>", "</tool_call>")
_ID_ALPHABET = string.ascii_lowercase + string.digits


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """Which markers a model's template uses.

    Attributes:
        thinking: what opens and closes reasoning. has_tagged_calls: calls are those of Qwen and Hermes.
        tool_tag: what comes before calls that are found by the names of the tools; empty where they are not.
    """

    thinking: tuple[str, str] | None = None
    has_tagged_calls: bool = False
    tool_tag: str = ""

    @classmethod
    def of(cls, template: str) -> ReplyFormat:
        """What the literal text of a chat template gives away (`spec/chat-formats.md` section 2)."""
        thinks = all(marker in template for marker in THINK)
        return cls(THINK if thinks else None, CALL[0] in template and "<function=" not in template)

    def starts_in_thinking(self, prompt: str) -> bool:
        """Whether a prompt ends inside an open reasoning block."""
        return self.thinking is not None and prompt.rfind(self.thinking[0]) > prompt.rfind(self.thinking[1])


class ReplyParser:
    """One reply. `decode(chunk)` returns what is certain, `flush()` the rest.

    Args:
        reply_format: the model's markers. in_thinking: the prompt left a reasoning block open.
        tools: the names of the tools that the request offers; without any no calls are looked for.
        index: the choice that the deltas belong to.
    """

    def __init__(
        self, reply_format: ReplyFormat, *, in_thinking: bool, tools: Collection[str] = (), index: int = 0
    ) -> None:
        self._index = index
        self._buffer = ""
        self._open, self._close = reply_format.thinking or THINK
        self._has_tagged_calls = bool(tools) and reply_format.has_tagged_calls
        finds_calls = any(tools) and reply_format.tool_tag != ""
        self._finder = CallFinder(reply_format.tool_tag, [*filter(None, tools)]) if finds_calls else None
        self._num_calls = 0
        self._gap = ""  # white space before a call, which is nothing if the call is one and text if it is not
        self._drops_space = in_thinking
        self._state = "thinking" if in_thinking else "start" if reply_format.thinking else "answer"

    @property
    def is_thinking(self) -> bool:
        """Whether the text arriving now is reasoning."""
        return self._state == "thinking"

    @property
    def is_calling(self) -> bool:
        """Whether the text arriving now is a tool call, shown or not once it is whole."""
        return self._state == "call" or (self._finder is not None and self._finder.is_calling)

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
        if self._finder is not None:
            return [*self._find(rest), *self._found(self._finder.flush())]
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
                return self._until(self._close, self._thought, then="answer")
            case "call":
                return self._finish_call()
            case _ if self._has_tagged_calls:
                return self._until(CALL[0], self._answer, then="call")
            case _:
                text, self._buffer = self._buffer, ""
                return self._find(text) if text else None

    def _start(self) -> list[Delta] | None:
        """A reasoning block may only open the reply; anything else first means there is none."""
        text = self._buffer.lstrip()
        if text.startswith(self._open):
            self._buffer, self._state, self._drops_space = text[len(self._open) :], "thinking", True
            return []
        if self._open.startswith(text):
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
        safe = len(self._buffer) - overlap(self._buffer, marker)
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

    def _find(self, text: str) -> list[Delta]:
        """Text of the answer, in which there may be calls without markers of their own."""
        return self._answer(text) if self._finder is None else self._found(self._finder.decode(text))

    def _found(self, pieces: list[str | Call]) -> list[Delta]:
        deltas: list[Delta] = []
        for piece in pieces:
            if isinstance(piece, str):
                deltas += self._answer(piece)
            else:
                deltas.append(self._called(*piece))
        return deltas

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
        return [self._called(value["name"], arguments)]

    def _called(self, name: str, arguments: dict[str, JSON]) -> Delta:
        self._num_calls += 1
        return ToolCallDelta(ToolCall(new_call_id(), name, arguments), self._index)


def new_call_id() -> str:
    """A call id as OpenAI's look: `call_` and 24 characters."""
    return "call_" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(24))
