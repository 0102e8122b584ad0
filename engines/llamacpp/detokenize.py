"""From tokens to text, a piece at a time: characters are never cut in half, and stop strings never show.

Both filters share one form: `decode(chunk)` returns what is safe to send now, `flush()` what is left at the end.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence

from engines.events import TokenLogprob


class Detokenizer:
    """Joins the bytes of tokens into whole characters; what never becomes valid UTF-8 turns into U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def decode(self, piece: bytes) -> str:
        """The characters completed by `piece`."""
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What half a character leaves behind at the end."""
        return self._decoder.decode(b"", final=True)


class StopFilter:
    """Holds back text that may be the beginning of a stop string.

    The match that is complete first wins, the longest where two end together, so that it does not matter how the text
    is cut into pieces. `matched` tells that one was found; everything from its beginning on is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""
        self.matched = False

    def decode(self, text: str) -> str:
        """What of `text`, and of what was held back, can be sent."""
        if not self._stops or self.matched:
            return "" if self.matched else text
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.matched = True
            return self._take(min(found)[1], drop_rest=True)
        return self._take(len(self._held) - self._length_of_possible_stop())

    def flush(self) -> str:
        """What was held back for a stop string that did not come."""
        return self._take(len(self._held))

    def _take(self, length: int, *, drop_rest: bool = False) -> str:
        taken, self._held = self._held[:length], "" if drop_rest else self._held[length:]
        return taken

    def _length_of_possible_stop(self) -> int:
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class TextStream:
    """One sequence's way from token to text, until an end token or a stop string.

    Tokens that are told of travel with the text that they complete: while text is held back, so are they, and what a
    stop string drops is dropped with its tokens.

    Args:
        piece: the bytes of a token. is_end: whether a token ends the generation.
    """

    def __init__(self, piece: Callable[[int], bytes], is_end: Callable[[int], bool], stops: Sequence[str]) -> None:
        self._piece = piece
        self._is_end = is_end
        self._detokenizer = Detokenizer()
        self._stops = StopFilter(stops)
        self._ready: list[str] = []
        self._num_seen = 0  # characters of all tokens so far
        self._num_taken = 0  # characters that left
        self._told: deque[tuple[int, TokenLogprob]] = deque()  # each with the characters seen when it was complete

    def accept(self, token: int, told: TokenLogprob | None = None) -> bool:
        """Take in a token, and what is to be told of it; True when it ends the answer."""
        if self._is_end(token):
            return True
        text = self._detokenizer.decode(self._piece(token))
        self._num_seen += len(text)
        if told is not None:
            self._told.append((self._num_seen, told))
        self._ready.append(self._stops.decode(text))
        return self._stops.matched

    def take(self) -> tuple[str, tuple[TokenLogprob, ...]]:
        """The text that became safe to send since the last call, and its tokens."""
        if not self._ready:
            return "", ()
        text = "".join(self._ready)
        self._ready.clear()
        self._num_taken += len(text)
        return text, self._take_told() if self._told else ()

    def _take_told(self) -> tuple[TokenLogprob, ...]:
        told = []
        while self._told and self._told[0][0] <= self._num_taken:
            told.append(self._told.popleft()[1])
        return tuple(told)

    def flush(self) -> tuple[str, tuple[TokenLogprob, ...]]:
        """The rest, once the answer is over."""
        rest = self._detokenizer.flush()
        self._num_seen += len(rest)
        self._ready.append(self._stops.decode(rest))
        self._ready.append(self._stops.flush())
        return self.take()
