"""From tokens to text, a piece at a time: characters are never cut in half, and stop strings never show.

Both filters share one form: `decode(chunk)` returns what is safe to send now, `flush()` what is left at the end.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


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

    Args:
        piece: the bytes of a token. is_end: whether a token ends the generation.
    """

    def __init__(self, piece: Callable[[int], bytes], is_end: Callable[[int], bool], stops: Sequence[str]) -> None:
        self._piece = piece
        self._is_end = is_end
        self._detokenizer = Detokenizer()
        self._stops = StopFilter(stops)
        self._ready: list[str] = []

    def accept(self, token: int) -> bool:
        """Take in a token; True when it ends the answer."""
        if self._is_end(token):
            return True
        self._ready.append(self._stops.decode(self._detokenizer.decode(self._piece(token))))
        return self._stops.matched

    def take(self) -> str:
        """The text that became safe to send since the last call."""
        if not self._ready:
            return ""
        text = "".join(self._ready)
        self._ready.clear()
        return text

    def flush(self) -> str:
        """The rest, once the answer is over."""
        self._ready.append(self._stops.decode(self._detokenizer.flush()))
        self._ready.append(self._stops.flush())
        return self.take()
