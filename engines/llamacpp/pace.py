"""How much prefill may ride along in a step that also decodes.

A long prompt that arrives must not stall those who are being answered, and must still be answered soon itself. What a
step costs is learned from the steps themselves: one that only decodes sets the pace, and the prompt tokens of the
others cost what they add to it. Pure: it is told what happened and asked for a number.
"""

from __future__ import annotations

MIN_CHUNK = 16
"""Prompt tokens that always ride along, so that a first token comes however slow the machine is."""

_WEIGHT = 0.2  # of the newest observation in the running means


class Pace:
    """Keeps steps with prefill within `slowdown` times the length of those without.

    Args:
        slowdown: how many times longer a step may take for those who decode, above 1.
        max_chunk: most prompt tokens of a step.
    """

    def __init__(self, *, slowdown: float = 2.5, max_chunk: int) -> None:
        self.slowdown = slowdown
        self.max_chunk = max_chunk
        self._decode_s = 0.0
        self._token_s = 0.0

    @property
    def chunk(self) -> int:
        """Prompt tokens that the next step may take beside its decodes; the minimum until both costs are known."""
        if not self._decode_s or not self._token_s:
            return min(4 * MIN_CHUNK, self.max_chunk)
        affordable = int((self.slowdown - 1) * self._decode_s / self._token_s)
        return max(MIN_CHUNK, min(affordable, self.max_chunk))

    def observe(self, *, num_decodes: int, num_prefill: int, seconds: float) -> None:
        """Learn from a step that decoded for so many sequences and prefilled so many tokens."""
        if num_prefill == 0:
            self._decode_s = _mean(self._decode_s, seconds)
        elif num_decodes == 0:
            self._token_s = _mean(self._token_s, seconds / num_prefill)
        elif seconds > self._decode_s > 0:
            self._token_s = _mean(self._token_s, (seconds - self._decode_s) / num_prefill)


def _mean(mean: float, value: float) -> float:
    return value if not mean else mean + _WEIGHT * (value - mean)
