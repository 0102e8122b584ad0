"""How much prefill may ride along in a step that also decodes.

A long prompt that arrives must not stall those who are being answered, and must still be answered soon itself. What a
step costs is learned from the steps themselves: one that only decodes sets the pace, and the prompt tokens of the
others cost what they add to it.

Small portions are dear, since every step with prefill reads the weights for it. So steps without prefill save time for
later ones: a prompt that comes now and then takes a few large portions, and only one that lasts is down to what each
step affords. Pure: it is told what happened and asked for a number.
"""

from __future__ import annotations

MIN_CHUNK = 6
"""Prompt tokens that always ride along, so that a first token comes however slow the machine is."""

MAX_STALL_S = 0.5
"""What a step may add from savings: a reader takes it for a hiccup."""

MAX_SAVED_S = 4.0
"""Savings beyond which there is no more; a few hundred tokens where it takes this long to read them."""

_WEIGHT = 0.2  # of the newest observation in the running means


class Pace:
    """Keeps decodes with prefill beside them, in the long run, within `slowdown` times what they take without.

    Args:
        slowdown: how many times longer a step may take for those who decode, above 1.
        max_chunk: most prompt tokens of a step.
    """

    def __init__(self, *, slowdown: float = 2.5, max_chunk: int) -> None:
        self.slowdown = slowdown
        self.max_chunk = max_chunk
        self._decode_s = 0.0
        self._token_s = 0.0
        self._saved_s = MAX_SAVED_S

    @property
    def steady_chunk(self) -> int:
        """Prompt tokens that each step may take beside its decodes; a guess until both costs are known."""
        return self._tokens_in(self._earned_s)

    @property
    def chunk(self) -> int:
        """Prompt tokens that the next step may take, savings included."""
        return self._tokens_in(max(self._earned_s, min(self._saved_s, MAX_STALL_S)))

    @property
    def _earned_s(self) -> float:
        """Seconds of prefill that a step without any is worth."""
        return (self.slowdown - 1) * self._decode_s

    def _tokens_in(self, seconds: float) -> int:
        if not self._decode_s or not self._token_s:
            return min(10 * MIN_CHUNK, self.max_chunk)
        return max(MIN_CHUNK, min(int(seconds / self._token_s), self.max_chunk))

    def observe(self, *, num_decodes: int, num_prefill: int, seconds: float, prefill_s: float | None = None) -> None:
        """Learn from a step that decoded for so many sequences and prefilled so many tokens.

        `prefill_s` is what the prefill took of its time, where that is known; else what decodes do not explain.
        """
        if num_decodes == 0:
            self._token_s = _mean(self._token_s, seconds / num_prefill)
            return
        if num_prefill == 0 or prefill_s is not None:
            self._decode_s = _mean(self._decode_s, seconds - (prefill_s or 0.0))
        spent_s = 0.0
        if num_prefill and self._decode_s:
            spent_s = max(seconds - self._decode_s, 0.0) if prefill_s is None else prefill_s
        if spent_s:
            self._token_s = _mean(self._token_s, spent_s / num_prefill)
        self._saved_s = max(min(self._saved_s + self._earned_s - spent_s, MAX_SAVED_S), 0.0)


def _mean(mean: float, value: float) -> float:
    return value if not mean else mean + _WEIGHT * (value - mean)
