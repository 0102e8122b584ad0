"""Who holds which KV cells: the books of a cache.

In one pool for all (`kv_unified`) llama.cpp copies a prefix from one sequence to another by writing metadata, so two
sequences then hold the same cells; in streams each has cells of its own. llama.cpp does not say how many cells are in
use; this does, by keeping runs of cells and who holds each. It also remembers the sequences that have finished, so that
a later prompt that begins alike starts from their cells. Pure: whoever asks it to share or drop something must tell
llama.cpp the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

Tokens: TypeAlias = "npt.NDArray[np.int32]"
"""Token ids, shape (n,)."""


@dataclass(eq=False, slots=True)
class Run:
    """Neighbouring positions whose cells are held by the same slots."""

    length: int
    holders: set[int] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class Kept:
    """What a finished sequence left behind: the tokens whose cells its slot holds, and the rank of who left it."""

    tokens: Tokens
    rank: int


class KVCache:
    """Cells, slots, and what finished sequences left behind.

    Args:
        num_cells: cells in all. num_slots: sequences that may hold cells at once, finished ones included.
        is_unified: whether sequences can hold the same cells.
    """

    def __init__(self, *, num_cells: int, num_slots: int, is_unified: bool = True) -> None:
        self.is_unified = is_unified
        self.num_cells = num_cells
        self.num_free_cells = num_cells
        self.num_idle_cells = 0  # held by kept slots alone
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._runs: dict[int, list[Run]] = {}
        self._kept: OrderedDict[int, Kept] = OrderedDict()  # least recently used first

    def __repr__(self) -> str:
        return f"<KVCache free={self.num_free_cells}/{self.num_cells} kept={len(self._kept)}>"

    @property
    def num_free_slots(self) -> int:
        """Slots that hold nothing."""
        return len(self._free_slots)

    @property
    def free_slots(self) -> list[int]:
        """The slots that hold nothing."""
        return list(self._free_slots)

    @property
    def num_kept(self) -> int:
        """Finished sequences whose cells are still there."""
        return len(self._kept)

    def length(self, slot: int) -> int:
        """Cells that a slot holds, shared ones included."""
        return sum(run.length for run in self._runs[slot])

    def num_held(self, *slots: int) -> int:
        """Cells that some slots hold, free ones none."""
        return sum(self.length(slot) for slot in slots if slot in self._runs)

    def open(self, slot: int | None = None) -> int:
        """Take a free slot, any unless one is named."""
        slot = self._free_slots[-1] if slot is None else slot
        self._free_slots.remove(slot)
        self._runs[slot] = []
        return slot

    def extend(self, slot: int, count: int) -> None:
        """Note that `count` more positions of a slot were computed."""
        assert count <= self.num_free_cells, "more cells in use than there are"
        self.num_free_cells -= count
        runs = self._runs[slot]
        if runs and runs[-1].holders == {slot}:
            runs[-1].length += count
        else:
            runs.append(Run(count, {slot}))

    def share(self, source: int, slot: int, count: int) -> None:
        """Let an empty slot hold the first `count` positions of another one's cells, or the like of them."""
        assert not self._runs[slot], "only an empty slot can take a prefix"
        if not self.is_unified:
            self.extend(slot, count)
            return
        taken: list[Run] = []
        for run in list(self._runs[source]):
            if count == 0:
                break
            if run.length > count:
                self._split(run, count)
            run.holders.add(slot)
            taken.append(run)
            count -= run.length
        assert count == 0, "the source is shorter than what is to be shared"
        self._runs[slot] = taken
        self._count_idle()

    def _split(self, run: Run, length: int) -> None:
        """Cut a run in two, in the books of everyone who holds it."""
        rest = Run(run.length - length, set(run.holders))
        run.length = length
        for holder in run.holders:
            runs = self._runs[holder]
            runs.insert(runs.index(run) + 1, rest)

    def close(self, slot: int) -> None:
        """Drop everything a slot holds; cells that nobody else holds are free."""
        self._kept.pop(slot, None)
        for run in self._runs.pop(slot):
            run.holders.discard(slot)
            if not run.holders:
                self.num_free_cells += run.length
        self._free_slots.append(slot)
        self._count_idle()

    def swap(self, one: int, other: int) -> None:
        """Let each of two slots hold what the other held; either may be free."""
        names = {one: other, other: one}
        self._runs = {names.get(slot, slot): runs for slot, runs in self._runs.items()}
        self._kept = OrderedDict((names.get(slot, slot), kept) for slot, kept in self._kept.items())
        self._free_slots = [names.get(slot, slot) for slot in self._free_slots]
        for run in {run for slot in names for run in self._runs.get(slot, ())}:
            run.holders = {names.get(slot, slot) for slot in run.holders}

    def take_over(self, slot: int, count: int) -> None:
        """Go on in a kept slot, with its first `count` positions; the rest is dropped and it is kept no longer."""
        del self._kept[slot]
        runs = self._runs[slot]
        length = 0
        for run in list(runs):
            if length < count < length + run.length:
                self._split(run, count - length)
            length += run.length
        while runs and self.length(slot) > count:
            run = runs.pop()
            run.holders.discard(slot)
            if not run.holders:
                self.num_free_cells += run.length
        self._count_idle()

    def num_freed_by(self, slot: int, count: int) -> int:
        """Cells that are free once a slot gives up all but its first `count` positions."""
        freed, end = 0, 0
        for run in self._runs[slot]:
            end += run.length
            if run.holders == {slot}:
                freed += min(run.length, max(end - count, 0))
        return freed

    def keep(self, slot: int, tokens: Iterable[int], rank: int = 0) -> None:
        """Remember a finished sequence: `tokens` are those whose cells its slot holds, `rank` whose it was."""
        self._kept[slot] = Kept(np.fromiter(tokens, np.int32), rank)
        assert len(self._kept[slot].tokens) == self.length(slot)
        self._count_idle()

    def kept_tokens(self, slot: int) -> Tokens:
        """The tokens whose cells a kept slot holds."""
        return self._kept[slot].tokens

    def kept_slots(self) -> list[int]:
        """The slots of finished sequences, least recently used first."""
        return list(self._kept)

    def can_shift(self, slot: int, start: int) -> bool:
        """Whether a slot holds everything from position `start` on alone, so that moving it moves nobody else's."""
        end = 0
        for run in self._runs[slot]:
            end += run.length
            if end > start and run.holders != {slot}:
                return False
        return True

    def drop_middle(self, slot: int, start: int, count: int) -> None:
        """Drop `count` positions of a slot from `start` on, which nobody else holds; what follows moves up."""
        kept, at = [], 0
        for run in self._runs[slot]:
            overlap = max(min(at + run.length, start + count) - max(at, start), 0)
            at += run.length
            run.length -= overlap
            self.num_free_cells += overlap
            if run.length:
                kept.append(run)
        self._runs[slot] = kept

    def _count_idle(self) -> None:
        """Done where holders change, a few times a request, so that other threads may read one plain number."""
        runs = {run for slot in self._kept for run in self._runs[slot] if run.holders <= self._kept.keys()}
        self.num_idle_cells = sum(run.length for run in runs)

    def best_kept(self, tokens: Tokens) -> tuple[int, int] | None:
        """The finished sequence that shares the longest prefix with `tokens`: its slot, and the prefix's length."""
        lengths = ((common_prefix(kept.tokens, tokens), slot) for slot, kept in self._kept.items())
        best = max(lengths, default=(0, -1))
        if best[0] == 0:
            return None
        self._kept.move_to_end(best[1])
        return best[1], best[0]

    def is_kept(self, slot: int) -> bool:
        """Whether a slot holds what a finished sequence left behind."""
        return slot in self._kept

    def first_to_go(self, *, rank: int = 0, but: int | None = None) -> int | None:
        """The kept slot to drop first for somebody of `rank`, other than `but`.

        The least recently used one of the lowest class goes first, and nothing that a better class left behind. One
        whose cells are all in use by others goes last: it frees none.
        """
        kept = [slot for slot, each in self._kept.items() if slot != but and each.rank >= rank]
        return max(kept, key=lambda slot: (self.has_idle_cells(slot), self._kept[slot].rank), default=None)

    def has_idle_cells(self, slot: int) -> bool:
        """Whether a kept slot holds cells that nobody who runs uses."""
        return any(run.holders <= self._kept.keys() for run in self._runs[slot])

    def num_idle_for(self, rank: int) -> int:
        """Cells that would be free if everything that somebody of `rank` may drop were dropped."""
        if not rank:
            return self.num_idle_cells
        mine = {slot for slot, kept in self._kept.items() if kept.rank >= rank}
        runs = {run for slot in mine for run in self._runs[slot] if run.holders <= mine}
        return sum(run.length for run in runs)


def common_prefix(one: Tokens, other: Tokens) -> int:
    """How many leading tokens are equal."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length
