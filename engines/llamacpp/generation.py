"""The events of one request, made from the outputs of its sequences.

Owns the request's way back: outputs of the engine loop in, deltas of the reply parser out, and what it has cost at any
moment. Tokens that are told of go with the delta that shows them; those of markers and tool calls are not told.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Listing
from typing import Protocol

from engines.chat.parser import ReplyParser
from engines.chat.prompt import Prompt
from engines.errors import HeadwaterError
from engines.events import (
    ChoiceFinished,
    Delta,
    Event,
    Finished,
    FinishReason,
    PromptEcho,
    TextDelta,
    ThinkingDelta,
    Timings,
    TokenLogprob,
    Usage,
)
from engines.llamacpp.loop import Output
from engines.llamacpp.sequence import Sequence
from engines.request import GenerateRequest


class Vocabulary(Protocol):
    """What is needed to say what a token is."""

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token."""

    def is_end(self, token: int) -> bool:
        """Whether it ends a generation."""


class LlamaCppGeneration:
    """One admitted request.

    Args:
        sequences: one for each choice. parsers: how to read each one's text; None shows it as it is.
        arrived: when the request came, monotonic seconds. cancel: ends a sequence, whose last output follows.
    """

    def __init__(
        self,
        request: GenerateRequest,
        prompt: Prompt,
        sequences: Listing[Sequence],
        parsers: Listing[ReplyParser | None],
        *,
        arrived: float,
        vocabulary: Vocabulary,
        cancel: Callable[[Sequence], None],
    ) -> None:
        self._request = request
        self._prompt = prompt
        self._choices = {sequence: index for index, sequence in enumerate(sequences)}
        self._first = sequences[0]
        self._parsers = parsers
        self._untold: list[list[TokenLogprob]] = [[] for _ in sequences]
        self._arrived = arrived
        self._vocabulary = vocabulary
        self._cancel = cancel
        self._reasons: dict[int, FinishReason] = {}
        self._outputs: deque[Output] = deque()
        self._ready: deque[Event] = deque()
        self._news = asyncio.Event()
        self._error: HeadwaterError | None = None
        self._thinking_tokens = 0
        self._owes_echo = request.echo
        self._is_over = False

    def deliver(self, output: Output) -> None:
        """One output of one of its sequences."""
        self._outputs.append(output)
        if output.reason is not None:
            self._reasons[self._choices[output.sequence]] = output.reason
        self._news.set()

    def fail(self, error: HeadwaterError) -> None:
        """The engine is gone."""
        self._error = error
        self._news.set()

    @property
    def usage(self) -> Usage:
        """Tokens as the sequences hold them now."""
        return Usage(
            prompt_tokens=len(self._prompt.tokens),
            cached_tokens=self._first.num_reused,
            completion_tokens=sum(sequence.num_generated for sequence in self._choices),
            thinking_tokens=self._thinking_tokens,
            truncated_tokens=self._prompt.truncated_tokens,
            shifted_tokens=sum(sequence.num_shifted for sequence in self._choices),
        )

    @property
    def timings(self) -> Timings:
        """Times of the first choice; decoding ends with the last."""
        now = time.monotonic()
        started, prefilled = self._first.scheduled or now, self._first.first_token or now
        last = max(sequence.last_token for sequence in self._choices)
        return Timings(
            queue_s=started - self._arrived,
            prefill_s=prefilled - started,
            decode_s=max(last - prefilled, 0.0),
            ttft_s=prefilled - self._arrived,
            total_s=now - self._arrived,
        )

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._ready:
            if self._is_over:
                raise StopAsyncIteration
            await self._more()
        event = self._ready.popleft()
        self._is_over = self._is_over or isinstance(event, Finished)
        return event

    async def _more(self) -> None:
        """Wait for outputs and turn them into events."""
        while not self._outputs or not self._can_echo():
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        if self._owes_echo:
            self._owes_echo = False
            self._ready.append(self._echo())
        while self._outputs:
            self._read(self._outputs.popleft())
        if len(self._reasons) == len(self._choices):
            self._ready.append(Finished(self._reasons[0], self.usage, self.timings, self._tokens()))

    def _can_echo(self) -> bool:
        """Whether the prompt was read, if it is to be told; other choices may be ahead of the one that reads it."""
        return not self._owes_echo or self._first.first_token > 0 or 0 in self._reasons

    def _echo(self) -> PromptEcho:
        tokens = self._prompt.tokens
        data = b"".join(self._vocabulary.piece(token, special=True) for token in tokens)
        told: tuple[TokenLogprob, ...] = ()
        if self._request.logprobs is not None:
            first = TokenLogprob(tokens[0], self._vocabulary.piece(tokens[0], special=True), 0.0)
            told = (first, *self._first.prompt_logprobs)
        return PromptEcho(data.decode("utf-8", "replace"), told)

    def _read(self, output: Output) -> None:
        index = self._choices[output.sequence]
        parser = self._parsers[index]
        if parser is None:
            deltas: list[Delta] = []
            if output.text or output.logprobs:
                deltas = [TextDelta(output.text, index, output.logprobs)]
        else:
            deltas = self._parse(output, parser, index)
        self._ready.extend(deltas)
        if output.reason is not None:
            reason = output.reason
            if parser is not None and parser.has_calls and reason is FinishReason.STOP:
                reason = FinishReason.TOOL_CALLS
            self._reasons[index] = reason
            self._ready.append(ChoiceFinished(reason, index))

    def _parse(self, output: Output, parser: ReplyParser, index: int) -> list[Delta]:
        was_thinking, was_calling = parser.is_thinking, parser.is_calling
        has_token = output.reason is not FinishReason.CANCEL and output.sequence.num_generated > 0
        self._thinking_tokens += was_thinking and has_token
        deltas = parser.decode(output.text) if output.text else []
        if output.reason is not None:
            deltas += parser.flush()
        if not output.logprobs and not self._untold[index]:
            return deltas
        untold = self._untold[index]
        if was_calling or parser.is_calling:  # what a call is made of is shown as a call
            untold.clear()
            return deltas
        if was_thinking and not parser.is_thinking:  # the marker that ends the reasoning belongs to neither
            untold.clear()
        elif not parser.skips_space:  # white space that is not shown is not told either
            untold.extend(output.logprobs)
        return self._tell(deltas, untold)

    def _tell(self, deltas: list[Delta], untold: list[TokenLogprob]) -> list[Delta]:
        """The deltas, the first of text or reasoning with the tokens that wait to be told."""
        for at, delta in enumerate(deltas):
            if isinstance(delta, (TextDelta, ThinkingDelta)):
                deltas[at] = type(delta)(delta.text, delta.index, tuple(untold))
                untold.clear()
                break
        return deltas

    def _tokens(self) -> tuple[int, ...]:
        if not self._request.return_tokens:
            return ()
        tokens = self._first.tokens
        ended = self._first.num_generated > 0 and self._vocabulary.is_end(tokens[-1])
        return tuple(tokens[:-1] if ended else tokens)

    async def aclose(self) -> None:
        """Cancel what is running and wait, at most one step, until it has stopped."""
        if not self._is_over:
            for sequence, index in self._choices.items():
                if index not in self._reasons:
                    self._cancel(sequence)
            while len(self._reasons) < len(self._choices) and self._error is None:
                self._news.clear()
                await self._news.wait()
            while self._outputs:  # nobody reads them any more, but they count
                self._read(self._outputs.popleft())
        self._is_over = True
        self._ready.clear()
