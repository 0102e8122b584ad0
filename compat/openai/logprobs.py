"""Log-probabilities in OpenAI's two shapes, chat's and completions' (`spec/openai.md` sections 4.6 and 5). Pure.

A token may show no text: half a character, or one that marks the end. In a stream it travels with the next text of its
choice, or with the choice's end, so that none is lost and no chunk is empty.
"""

from __future__ import annotations

import codecs
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from compat.openai.schema import ChatLogprobs, CompletionLogprobs, TokenBody, TopTokenBody
from engines.events import TextDelta, TokenLogprob

_LEAST = -9999.0
"""What stands for minus infinity, which JSON lacks."""


@dataclass(frozen=True, slots=True)
class EchoDelta(TextDelta):
    """A completion's prompt, as the first piece of a choice's text."""


class HeldTokens:
    """The tokens of each choice that wait for text to travel with."""

    def __init__(self) -> None:
        self._held: defaultdict[int, tuple[TokenLogprob, ...]] = defaultdict(tuple)

    def release(self, delta: TextDelta) -> TextDelta | None:
        """The piece with what waited for it; None when it has to wait itself."""
        if not delta.text and not isinstance(delta, EchoDelta):
            self._held[delta.index] += delta.logprobs
            return None
        held = self._held.pop(delta.index, ())
        return replace(delta, logprobs=held + delta.logprobs) if held else delta

    def flush(self, index: int) -> tuple[TokenLogprob, ...]:
        """What waits at the end of a choice."""
        return self._held.pop(index, ())


def settled(pieces: Sequence[TextDelta]) -> list[TextDelta]:
    """All pieces of one choice, every token with the text that it travels with; those that found none come last."""
    held = HeldTokens()
    released = [piece for delta in pieces if (piece := held.release(delta)) is not None]
    rest = [TextDelta("", last.index, tokens) for last in pieces[-1:] if (tokens := held.flush(last.index))]
    return released + rest


def chat_logprobs(tokens: Iterable[TokenLogprob], num_top: int) -> ChatLogprobs:
    """Chat's shape: an object for each token, with its `num_top` likeliest alternatives."""
    return ChatLogprobs(
        [
            TokenBody(*_token(token), top_logprobs=[TopTokenBody(*_token(other)) for other in token.top[:num_top]])
            for token in tokens
        ]
    )


def completion_logprobs(pieces: Iterable[TextDelta], num_top: int, *, offset: int = 0) -> CompletionLogprobs:
    """Completions' shape: parallel arrays over all tokens of consecutive pieces, each of which is whole characters.

    `offset` is where in the choice's text the first piece begins. A prompt's first token follows nothing, so there is
    no telling how likely it was.
    """
    body = CompletionLogprobs([], [], [], [])
    for piece in pieces:
        for position, (token, start) in enumerate(zip(piece.logprobs, _starts(piece), strict=True)):
            is_first = position == 0 and isinstance(piece, EchoDelta)
            body.tokens.append(_text(token))
            body.token_logprobs.append(None if is_first else _finite(token.logprob))
            body.top_logprobs.append(None if is_first else _alternatives(token, num_top))
            body.text_offset.append(offset + start)
        offset += len(piece.text)
    return body


def mean_logprob(pieces: Iterable[TextDelta]) -> float:
    """How likely an answer was, by the average of its tokens; the prompt before it does not count."""
    found = [_finite(token.logprob) for piece in pieces if not isinstance(piece, EchoDelta) for token in piece.logprobs]
    return sum(found) / len(found) if found else -math.inf


def _starts(piece: TextDelta) -> Sequence[int]:
    """Where in the piece each of its tokens begins, in characters; one that goes on with a character, before it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    starts, start = [], 0
    for token in piece.logprobs:
        starts.append(min(start, len(piece.text)))
        start += len(decoder.decode(token.data))
    return starts


def _alternatives(token: TokenLogprob, num_top: int) -> dict[str, float]:
    """The likeliest tokens by their texts, the chosen one always among them; of two that look alike, the likelier."""
    found: dict[str, float] = {}
    for other in (*token.top[:num_top], token):
        text, logprob = _text(other), _finite(other.logprob)
        found[text] = max(found.get(text, logprob), logprob)
    return found


def _token(token: TokenLogprob) -> tuple[str, float, list[int]]:
    return _text(token), _finite(token.logprob), list(token.data)


def _text(token: TokenLogprob) -> str:
    return token.data.decode(errors="replace")


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST  # also for NaN
