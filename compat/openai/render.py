"""Events and models to OpenAI's JSON (`spec/openai.md` sections 1.2, 4.8, 4.9, 5 and 7). Pure.

The order of a stream's chunks is what official clients' accumulators demand: every choice's role first and in order,
one kind of thing per delta, one finish chunk per choice, usage last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from msgspec import UNSET

from compat.openai.logprobs import HeldTokens, chat_logprobs, completion_logprobs, mean_logprob, settled
from compat.openai.schema import (
    CallChunk,
    CalledFunction,
    CallReply,
    ChatChoice,
    ChatLogprobs,
    Choice,
    ChunkChoice,
    CompletionChoice,
    CompletionDetails,
    CompletionLogprobs,
    CompletionReply,
    Delta,
    MessageReply,
    ModelBody,
    PromptDetails,
    UsageBody,
)
from compat.services import Answer
from compat.services import Choice as Collected
from engines.events import (
    ChoiceFinished,
    Event,
    Finished,
    FinishReason,
    TextDelta,
    ThinkingDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from engines.model import ModelCard
from engines.request import ToolCall

encode: Callable[[object], bytes] = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Reply:
    """What all parts of one answer share.

    Attributes:
        model: as the client typed it. num_choices: of all prompts together.
        include_usage: a stream ends with a usage chunk. parallel_tool_calls: False shows the first call only.
        logprobs: how many likely alternatives to show of each token; None shows no log-probabilities.
        best_of, num_kept: choices that each prompt was given, and how many of them are shown.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    num_choices: int = 1
    include_usage: bool = False
    parallel_tool_calls: bool = True
    logprobs: int | None = None
    best_of: int = 1
    num_kept: int = 1

    def whole(self, object_name: str, choices: list[Choice], usage: Usage) -> bytes:
        """The body of a reply that is not streamed."""
        return encode(self._around(object_name, choices, render_usage(usage)))

    def chunk(self, object_name: str, *choices: Choice) -> bytes:
        """One chunk; its `usage` is null exactly when a usage chunk will follow."""
        return encode(self._around(object_name, list(choices), None if self.include_usage else UNSET))

    def usage_chunk(self, object_name: str, usage: Usage) -> bytes | None:
        """The last chunk, when the client asked for it."""
        return encode(self._around(object_name, [], render_usage(usage))) if self.include_usage else None

    def _around(
        self, object_name: str, choices: list[Choice], usage: UsageBody | msgspec.UnsetType | None
    ) -> CompletionReply:
        return CompletionReply(self.id, object_name, self.created, self.model, self.fingerprint, choices, usage)


class Chunks(Protocol):
    """One streamed answer, event by event."""

    def opening(self) -> Iterator[bytes]:
        """The chunks before any event."""

    def render(self, event: Event) -> bytes | None:
        """The event's chunk, as JSON; None when the event shows nothing."""


@dataclass(slots=True)
class ChatChunks:
    """Chunks of a chat completion."""

    reply: Reply
    num_calls: Counter[int] = field(default_factory=Counter)
    held: HeldTokens = field(default_factory=HeldTokens)

    def opening(self) -> Iterator[bytes]:
        """The role of every choice, because a choice may first appear only after all before it."""
        for index in range(self.reply.num_choices):
            yield self._chunk(index, Delta(role="assistant", content=""))

    def render(self, event: Event) -> bytes | None:
        """The event's chunk."""
        match event:
            case TextDelta():
                piece = self.held.release(event)
                return self._chunk(piece.index, Delta(content=piece.text), tokens=piece.logprobs) if piece else None
            case ThinkingDelta(text, index):
                return self._chunk(index, Delta(reasoning_content=text, reasoning=text)) if text else None
            case ToolCallDelta(call, index):
                return self._call(call, index)
            case ChoiceFinished(reason, index):
                return self._chunk(index, Delta(), render_reason(reason), tokens=self.held.flush(index))
            case Finished(usage=usage):
                return self.reply.usage_chunk("chat.completion.chunk", usage)
            case _:
                return None

    def _call(self, call: ToolCall, index: int) -> bytes | None:
        number = self.num_calls[index]
        if number and not self.reply.parallel_tool_calls:
            return None
        self.num_calls[index] += 1
        function = CalledFunction(call.name, render_arguments(call))
        return self._chunk(index, Delta(tool_calls=(CallChunk(number, call.id, "function", function),)))

    def _chunk(
        self, index: int, delta: Delta, finish_reason: str | None = None, *, tokens: Sequence[TokenLogprob] = ()
    ) -> bytes:
        logprobs = _chat_logprobs(self.reply, tokens) if tokens else None
        choice = ChunkChoice(index, delta, logprobs, finish_reason)
        return self.reply.chunk("chat.completion.chunk", choice)


@dataclass(slots=True)
class CompletionChunks:
    """Chunks of a completion, which knows nothing but text."""

    reply: Reply
    held: HeldTokens = field(default_factory=HeldTokens)
    num_characters: Counter[int] = field(default_factory=Counter)

    def opening(self) -> Iterator[bytes]:
        """Nothing."""
        return iter(())

    def render(self, event: Event) -> bytes | None:
        """The event's chunk."""
        match event:
            case TextDelta():
                piece = self.held.release(event)
                return self._chunk(piece) if piece else None
            case ChoiceFinished(reason, index):
                return self._chunk(TextDelta("", index, self.held.flush(index)), render_reason(reason))
            case Finished(usage=usage):
                return self.reply.usage_chunk("text_completion", usage)
            case _:
                return None

    def _chunk(self, piece: TextDelta, finish_reason: str | None = None) -> bytes:
        index = piece.index
        logprobs = _completion_logprobs(self.reply, [piece], self.num_characters[index]) if piece.logprobs else None
        self.num_characters[index] += len(piece.text)
        choice = CompletionChoice(index, piece.text, logprobs, finish_reason)
        return self.reply.chunk("text_completion", choice)


def render_chat(reply: Reply, answer: Answer) -> bytes:
    """The body of a chat completion that is not streamed."""
    choices: list[Choice] = [
        ChatChoice(
            index,
            _message(reply, choice),
            _chat_logprobs(reply, [token for piece in choice.pieces for token in piece.logprobs]),
            _reason(choice),
        )
        for index, choice in enumerate(answer.choices)
    ]
    return reply.whole("chat.completion", choices, _usage(answer))


def render_completion(reply: Reply, answer: Answer) -> bytes:
    """The body of a completion that is not streamed."""
    choices: list[Choice] = [
        CompletionChoice(index, choice.text, _completion_logprobs(reply, settled(choice.pieces)), _reason(choice))
        for index, choice in enumerate(_kept(reply, answer))
    ]
    return reply.whole("text_completion", choices, _usage(answer))


def _kept(reply: Reply, answer: Answer) -> list[Collected]:
    """The choices that are shown: of each prompt the likeliest ones, best first, when there are more than asked for."""
    if reply.best_of == reply.num_kept:
        return answer.choices
    prompts = [answer.choices[first : first + reply.best_of] for first in range(0, len(answer.choices), reply.best_of)]
    return [choice for tried in prompts for choice in sorted(tried, key=_likelihood, reverse=True)[: reply.num_kept]]


def _likelihood(choice: Collected) -> float:
    return mean_logprob(choice.pieces)


def _chat_logprobs(reply: Reply, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
    return None if reply.logprobs is None else chat_logprobs(tokens, reply.logprobs)


def _completion_logprobs(reply: Reply, pieces: Sequence[TextDelta], offset: int = 0) -> CompletionLogprobs | None:
    return None if reply.logprobs is None else completion_logprobs(pieces, reply.logprobs, offset=offset)


def _message(reply: Reply, choice: Collected) -> MessageReply:
    shown = choice.tool_calls if reply.parallel_tool_calls else choice.tool_calls[:1]
    calls = [
        CallReply(delta.call.id, "function", CalledFunction(delta.call.name, render_arguments(delta.call)))
        for delta in shown
    ]
    return MessageReply(
        role="assistant",
        content=choice.text or (None if calls else ""),
        reasoning_content=choice.thinking or UNSET,
        reasoning=choice.thinking or UNSET,
        tool_calls=calls or UNSET,
    )


def _reason(choice: Collected) -> str:
    return render_reason(choice.finished.reason if choice.finished else FinishReason.STOP)


def _usage(answer: Answer) -> Usage:
    return answer.finished.usage if answer.finished else Usage()


def render_reason(reason: FinishReason) -> str:
    """OpenAI's finish reason, which has no word for ends that a client does not live to see."""
    return reason.value if reason in (FinishReason.LENGTH, FinishReason.TOOL_CALLS) else "stop"


def render_arguments(call: ToolCall) -> str:
    """A call's arguments as JSON text, `{}` when there are none."""
    return call.arguments or "{}" if isinstance(call.arguments, str) else encode(call.arguments).decode()


def render_usage(usage: Usage) -> UsageBody:
    """`usage` (section 1.3)."""
    return UsageBody(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.total_tokens,
        PromptDetails(usage.cached_tokens),
        CompletionDetails(usage.thinking_tokens),
        usage.truncated_tokens or UNSET,
    )


def render_model(card: ModelCard, model_id: str) -> ModelBody:
    """One entry of the models list, under the id that its reader will use."""
    length = card.context_length or UNSET
    return ModelBody(
        id=model_id,
        created=int(card.modified_at),
        owned_by=card.namespace,
        context_length=length,
        max_model_len=length,
        capabilities=card.capabilities,
    )


def render_fingerprint(card: ModelCard) -> str:
    """`system_fingerprint`: constant per model."""
    return f"fp_{card.digest[:8]}"
