"""What one step is to compute, and what is to be done to the cache before. Plain data, decided by the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from engines.llamacpp.kvcache import Tokens
from engines.llamacpp.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Slice:
    """The next `count` tokens of a sequence."""

    sequence: Sequence
    count: int

    @property
    def is_last(self) -> bool:
        """Whether it reaches the end of the sequence, so that a token can be chosen from its logits."""
        return self.count == self.sequence.num_pending


@dataclass(frozen=True, slots=True)
class Clear:
    """Forget everything in a slot. `tokens` are those that it holds, where somebody may ask for them again."""

    slot: int
    tokens: Tokens | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """Let `slot` begin with the first `count` positions of `source`."""

    source: int
    slot: int
    count: int


@dataclass(frozen=True, slots=True)
class Trim:
    """Forget all but the first `count` positions of a slot. `tokens` are as in `Clear`, those that stay included."""

    slot: int
    count: int
    tokens: Tokens | None = None


@dataclass(frozen=True, slots=True)
class Swap:
    """Let each of two slots hold what the other held."""

    slot: int
    other: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Bring back the first `count` positions of what is on the shelf under `key`; the sequence waits for it."""

    sequence: Sequence
    key: str
    count: int


Change = Clear | Copy | Trim | Swap


@dataclass(slots=True)
class Budget:
    """Prompt tokens that a step may still take.

    Attributes:
        tokens: of everyone. behind: of those of a lower class than `best`, the best of those who decode.
        measured: of those whose every token is measured.
    """

    tokens: int
    behind: int
    measured: int
    best: int

    def grant(self, sequence: Sequence, wanted: int) -> int:
        """How many of so many tokens a sequence gets, which are spent then."""
        is_behind = sequence.priority.rank > self.best
        count = min(max(wanted, 0), self.tokens, *([self.behind] * is_behind), *([self.measured] * sequence.echoes))
        self.tokens -= count
        self.behind -= count * is_behind
        self.measured -= count * sequence.echoes
        return count


@dataclass(slots=True)
class Batch:
    """What to compute in one step, and what to do to the cache before it, in this order."""

    slices: list[Slice] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    num_preempted: int = 0

    @property
    def parts(self) -> list[list[Slice]]:
        """Decodes and prefill apart, where there are both."""
        decodes = [piece for piece in self.slices if piece.count == 1]
        prefill = [piece for piece in self.slices if piece.count > 1]
        return [part for part in (decodes, prefill) if part]

    @property
    def num_tokens(self) -> int:
        """Tokens in all slices."""
        return sum(piece.count for piece in self.slices)
