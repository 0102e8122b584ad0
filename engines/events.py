"""What comes back: the events of one answer, in order, or vectors and scores, all at once.

A stream is any number of deltas, one `ChoiceFinished` for each choice, then exactly one `Finished`. Deltas are never
half a character, and text held back for a stop string that did not come is flushed before the choice finishes.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import StrEnum

from engines.request import ToolCall

Vector = array  # of type code "f": as packed as it is computed, since a thousand texts make half a million numbers
"""One embedding, in single precision."""


class FinishReason(StrEnum):
    """Why an answer ended; the ledger keeps this word."""

    STOP = "stop"  # end of turn or a stop string
    LENGTH = "length"  # token limit or context window
    TOOL_CALLS = "tool_calls"
    CANCEL = "cancel"  # the caller left
    ERROR = "error"
    LOAD = "load"  # a request that only loaded the model
    UNLOAD = "unload"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request as the engine counted them.

    Attributes:
        prompt_tokens: the whole prompt after templating, cached ones included.
        cached_tokens: how many of them came from KV that was already there.
        completion_tokens: every generated token of every choice, the end-of-turn token included, as Ollama counts.
        thinking_tokens: how many of those were reasoning.
        truncated_tokens: prompt tokens that were left out to fit the window.
        shifted_tokens: tokens that a full window lost while the answer went on.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    thinking_tokens: int = 0
    truncated_tokens: int = 0
    shifted_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one request went, in seconds.

    Attributes:
        queue_s: waiting for a turn. load_s: waiting for the model. prefill_s: reading the prompt.
        decode_s: from the first token to the last. ttft_s: from arrival to the first token.
    """

    queue_s: float = 0.0
    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was, by the model's own logits before any sampler: natural logarithm.

    Attributes:
        data: the bytes that the token stands for, perhaps half a character; empty for control tokens.
        top: the likeliest tokens in its place, most likely first, each with an empty `top`.
    """

    token: int
    data: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of the answer, and the tokens that it completed; the text may be empty when there are some."""

    text: str
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ThinkingDelta:
    """The next piece of the reasoning before the answer, as a `TextDelta`."""

    text: str
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """One whole tool call; dialects that stream fragments cut it up themselves."""

    call: ToolCall
    index: int = 0


@dataclass(frozen=True, slots=True)
class PromptEcho:
    """The prompt as the model read it, before anything else. Its first token has a log-probability of 0: none."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """One choice is complete."""

    reason: FinishReason
    index: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The request is complete: the first choice's reason, the whole request's usage and timings.

    `tokens` holds the ids of prompt and answer when the request asked for them.
    """

    reason: FinishReason
    usage: Usage
    timings: Timings
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector for each input, in order."""

    vectors: tuple[Vector[float], ...]
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Ranking:
    """One score for each document, in order, as the model gives it: higher is nearer, the scale is the model's."""

    scores: tuple[float, ...]
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A text and its token ids, one of which was asked for."""

    text: str
    tokens: tuple[int, ...]
    timings: Timings = Timings()


Delta = TextDelta | ThinkingDelta | ToolCallDelta
Event = Delta | PromptEcho | ChoiceFinished | Finished
