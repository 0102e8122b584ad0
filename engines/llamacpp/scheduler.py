"""Who takes part in the next step. Pure: it counts tokens and cells and never touches llama.cpp.

One step is one batch that mixes running decodes with a chunk of waiting prefill. In one pool of cells slots are many
and cheap; what is scarce is cells. Sequences are admitted while their prompt fits, not their longest possible answer.
In streams each slot has a window of cells, and slots are what is scarce. Either way a sequence begins with the longest
prefix that anyone, running or finished, has computed already, or that is on the shelf.

Classes come first, then arrival, and batch work that has waited long moves up. When the cells run out, the lowest
class gives way: first what its finished sequences left behind, then its youngest running one, which goes back into the
queue with what it has generated and is prefilled again later. Its client notices a pause.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engines.llamacpp.batch import Batch, Budget, Clear, Copy, Restore, Slice, Swap, Trim
from engines.llamacpp.kvcache import KVCache, Tokens, common_prefix
from engines.llamacpp.layout import MAX_MEASURED
from engines.llamacpp.sequence import Sequence
from engines.llamacpp.streams import best_seat, moves
from engines.request import Priority

MIN_SHARED = 8
"""Tokens of a prefix below which copying it is not worth the trouble."""

MIN_AWAITED = 64
"""Tokens that must be saved by waiting for another's prefill; less is computed sooner than waited for."""

MIN_RESTORED = 32
"""Tokens that a prefix on the shelf must save; bringing it back takes about as long as computing a few."""

MAX_MOVED = 8192
"""Tokens that may be moved to close a gap between streams; with more, reading the weights twice is less work."""

MOST_COPIED = 256
"""Tokens of a stream that are copied for each one that is shared; copying more takes longer than computing that one."""

MAX_CONSIDERED = 32
"""Waiting sequences that a step looks at, so that a long queue costs those who run nothing."""

AGEING_S = 30.0
"""Time in the house after which batch work counts as normal. Nothing ever counts as somebody who reads along."""

_NORMAL, _BATCH = Priority.NORMAL.rank, Priority.BATCH.rank


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a sequence could begin with: the first `shared` positions of the slot `source`.

    `coming` is how long a prefix becomes that another sequence computes now, where that is worth waiting for; else 0.
    """

    source: int = -1
    shared: int = 0
    coming: int = 0

    @property
    def is_coming(self) -> bool:
        """Whether to wait."""
        return self.coming > 0

    @property
    def reachable(self) -> int:
        """Positions to be had without computing or restoring any."""
        return max(self.shared, self.coming)


class Index(Protocol):
    """What is on the shelf. `version` changes when something is put there."""

    version: int

    def longest(self, tokens: Tokens) -> tuple[str, int] | None:
        """The key of the prefix that shares most with `tokens`, and how much."""


class Scheduler:
    """Decides each step's batch.

    Args:
        num_cells: KV cells in all. num_slots: sequences that may hold cells at once, finished ones included.
        num_batch: most tokens of a step. busy_prefill: most prompt tokens of a step that also decodes, so that a long
            prompt does not stall those who are being answered. steady_prefill: the same for prompts of a lower class.
        headroom: free cells that each running sequence must have before another is admitted, so that one admitted in
            this step is not preempted in the next.
        shares_prefixes: whether the model's memory can copy a part of a sequence, which recurrent memory cannot.
        is_unified: whether all slots share one pool of cells; else each is a stream with cells for a whole window.
        kept_cells: most cells that finished sequences may hold beside the one that finished last. Every step looks at
            every cell in use, if only to find that it is masked: at 8 sequences 4,000 idle ones cost a tenth of it.
            Those of the class `batch` may hold a quarter of it.
        shelf: what may come back from there.
    """

    def __init__(
        self,
        *,
        num_cells: int,
        num_slots: int,
        num_batch: int,
        busy_prefill: int = 64,
        steady_prefill: int = 64,
        headroom: int = 32,
        shares_prefixes: bool = True,
        is_unified: bool = True,
        kept_cells: int | None = None,
        shelf: Index | None = None,
    ) -> None:
        self.num_cells = num_cells
        self.num_batch = num_batch
        self.busy_prefill = busy_prefill
        self.steady_prefill = steady_prefill
        self.headroom = headroom
        self.shares_prefixes = shares_prefixes
        self.kept_cells = num_cells if kept_cells is None else kept_cells
        self.cache = KVCache(num_cells=num_cells, num_slots=num_slots, is_unified=is_unified)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []  # in order of admission, so the youngest is last
        self._shelf = shelf
        self._restoring: set[Sequence] = set()
        self._reserved: dict[Sequence, int] = {}  # where the prefix is that was brought back for it
        self._restored: set[Sequence] = set()  # they have had their prefix from the shelf, or never will
        self._has_gaps = False
        self._looked: dict[Sequence, int] = {}  # at which version of the shelf

    def __repr__(self) -> str:
        return f"<Scheduler waiting={len(self.waiting)} running={len(self.running)} {self.cache!r}>"

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def is_restoring(self) -> bool:
        """Whether somebody waits for the shelf."""
        return bool(self._restoring)

    @property
    def num_free_cells(self) -> int:
        """Cells that nobody holds, or that only finished sequences hold."""
        return self.cache.num_free_cells + self.cache.num_idle_cells

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> list[Clear]:
        """Drop a sequence for good, wherever it is. What it has computed is kept for others who begin alike.

        Returns:
            The slots to clear.
        """
        self._restoring.discard(sequence)
        self._restored.discard(sequence)
        self._reserved.pop(sequence, None)
        self._looked.pop(sequence, None)
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return []
        self.running.remove(sequence)
        if not self.shares_prefixes or sequence.is_moved or sequence.num_cached < MIN_SHARED:
            return [self._release(sequence)]
        slot, sequence.slot = sequence.slot, None
        self.cache.keep(slot, sequence.tokens[: sequence.num_cached], sequence.priority.rank)
        return self._forget_beyond_budget(slot)

    def _forget_beyond_budget(self, newest: int) -> list[Clear]:
        forgotten = []
        for rank, budget in ((_BATCH, self.kept_cells // 4), (0, self.kept_cells)):
            while self.cache.num_idle_for(rank) > budget:
                slot = self.cache.first_to_go(rank=rank, but=newest)
                if slot is None or not self.cache.has_idle_cells(slot):
                    break
                forgotten.append(self._forget(slot))
        return forgotten

    def _forget(self, slot: int) -> Clear:
        tokens = self.cache.kept_tokens(slot)
        self.cache.close(slot)
        return Clear(slot, None if self._is_held(tokens) else tokens)

    def _is_held(self, tokens: Tokens) -> bool:
        """Whether somebody else holds the same and perhaps more, so that nothing is lost."""
        others = [self.cache.kept_tokens(slot) for slot in self.cache.kept_slots()]
        others += [sequence.prompt[: sequence.num_cached] for sequence in self.running]
        return any(len(other) >= len(tokens) and common_prefix(other, tokens) == len(tokens) for other in others)

    def forget_all(self, *, but: int = 0) -> list[Clear]:
        """Forget every finished sequence but the `but` most recently used ones."""
        slots = self.cache.kept_slots()
        return [self._forget(slot) for slot in slots[: len(slots) - but]]

    def give_way(self) -> Clear | None:
        """Free some cells of the lowest class that has any: of a finished sequence, else of the youngest running one.

        Returns:
            The slot to clear; None when only one sequence is left, which must not be stopped.
        """
        lowest = max((sequence.priority.rank for sequence in self.running), default=0)
        can_preempt = len(self.running) > 1
        slot = self.cache.first_to_go(rank=lowest if can_preempt else 0)
        if slot is not None:
            return self._forget(slot)
        return self._preempt(lowest) if can_preempt else None

    def wanted(self, now: float = 0.0) -> list[Restore]:
        """What those who wait could begin with that is on the shelf and longer than what the cache has.

        Each is told once; its sequence waits until `restored`. Those behind it may pass.
        """
        if self._shelf is None or not self.shares_prefixes:
            return []
        wanted: list[Restore] = []
        queue = self._queue(now)
        for sequence in queue if self.cache.is_unified else queue[: self._num_seats]:
            if sequence.echoes or sequence in self._restoring or sequence in self._restored:
                continue
            if self._looked.get(sequence) == self._shelf.version:
                continue
            self._looked[sequence] = self._shelf.version
            found = self._shelf.longest(sequence.prompt[: len(sequence.tokens) - 1])
            if found is not None and found[1] - self._longest_prefix(sequence).reachable >= MIN_RESTORED:
                self._restoring.add(sequence)
                wanted.append(Restore(sequence, *found))
        return wanted

    @property
    def _num_seats(self) -> int:
        """Slots that nobody runs in."""
        return self.cache.num_free_slots + self.cache.num_kept

    def _queue(self, now: float) -> list[Sequence]:
        """Those who wait, whose turn is first; of a long queue its beginning."""
        return sorted(self.waiting, key=lambda each: _turn(each, now))[:MAX_CONSIDERED]

    def next_batch(self, now: float = 0.0) -> Batch:
        """Choose the next step: decodes first, then prefill of the running, then of those who wait, better ones before.

        `now` is in the clock of `Sequence.arrived`.
        """
        batch = Batch()
        self._make_room(batch)
        decoding = self._decoding(now)
        batch.slices = [Slice(sequence, 1) for sequence in decoding]
        budget = self._budget(decoding)
        begun = sorted((s for s in self.running if s.num_pending > 1), key=lambda s: s.priority.rank)
        if begun:
            self._admit(batch, budget, now, better_than=begun[0].priority.rank)
        free = self.cache.num_free_cells - batch.num_tokens
        for sequence in begun:
            count = budget.grant(sequence, min(sequence.num_pending, free)) if sequence.slot is not None else 0
            if count > 0:
                batch.slices.append(Slice(sequence, count))
                free -= count
        self._admit(batch, budget, now)
        if not self.cache.is_unified:
            self._close_gaps(batch)
        return batch

    def _budget(self, decoding: list[Sequence]) -> Budget:
        """Beside decodes as much as their pace allows; those who read along are not stalled for those who do not."""
        if not decoding:
            return Budget(self.num_batch, self.num_batch, MAX_MEASURED, best=0)
        most = self.num_batch - len(decoding)
        best = min(sequence.priority.rank for sequence in decoding)
        return Budget(min(most, self.busy_prefill), min(most, self.steady_prefill), MAX_MEASURED, best)

    def _decoding(self, now: float) -> list[Sequence]:
        """Who decodes in the next step.

        While somebody reads along, as many of the class `batch` do as there are readers, and at least one: every
        sequence more makes the step longer for all. In one pool they take turns; in streams, where changing places is
        work, the oldest go first. What has aged is of that class no more.
        """
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        num_readers = sum(sequence.priority is Priority.INTERACTIVE for sequence in decoding)
        batch = [sequence for sequence in decoding if _rank(sequence, now) == _BATCH]
        if not num_readers or len(batch) <= num_readers:
            return decoding
        resting = set(
            (sorted(batch, key=lambda each: each.last_token) if self.cache.is_unified else batch)[num_readers:]
        )
        return [sequence for sequence in decoding if sequence not in resting]

    def advance(self, slices: list[Slice]) -> None:
        """Note that some slices were computed."""
        for piece in slices:
            assert piece.sequence.slot is not None
            piece.sequence.num_cached += piece.count
            self.cache.extend(piece.sequence.slot, piece.count)

    def shift(self, sequence: Sequence, *, in_place: bool) -> Clear | tuple[int, int]:
        """Let a full window lose its middle.

        In place if the model's memory can move what follows and nobody else holds it; else the sequence is prefilled
        anew.

        Returns:
            The slot to clear, or the position and number of the cells to remove and close up.
        """
        assert sequence.slot is not None
        keep, lost = sequence.shift()
        if not in_place or not self.cache.can_shift(sequence.slot, keep):
            return self._send_back(sequence)
        self.cache.drop_middle(sequence.slot, keep, lost)
        sequence.num_cached -= lost
        sequence.is_moved = True
        sequence.prompt = sequence.prompt[:keep]
        return keep, lost

    def make_place(self, sequence: Sequence, num_cells: int) -> tuple[int, list[Clear]] | None:
        """An empty slot for a prefix that comes back, and what to forget for it; None if it would displace somebody."""
        forgotten: list[Clear] = []
        if not self.cache.is_unified:
            seat = self._free_seat(sequence)
            if seat is None:
                return None
            if self.cache.is_kept(seat):
                forgotten.append(self._forget(seat))
            self._reserved[sequence] = seat
            return self.cache.open(seat), forgotten
        promised = sum(sequence.num_pending + self.headroom for sequence in self.running)
        if self.num_free_cells - promised < num_cells:
            return None
        while self.cache.num_free_cells < num_cells or not self.cache.num_free_slots:
            slot = self.cache.first_to_go()
            if slot is None:
                return None
            forgotten.append(self._forget(slot))
        return self.cache.open(), forgotten

    def restored(self, sequence: Sequence) -> None:
        """Note that the prefix a sequence waited for is there, or will not come."""
        if sequence in self._restoring:
            self._restoring.discard(sequence)
            self._restored.add(sequence)

    def _make_room(self, batch: Batch) -> None:
        """Free cells until everyone who runs can go on. The oldest always can: no window exceeds the cache."""
        while True:
            decodes = sum(1 for sequence in self.running if sequence.num_pending == 1)
            if not self.running or self.cache.num_free_cells >= max(decodes, 1):
                return
            num_running = len(self.running)
            change = self.give_way()
            if change is None:
                return
            batch.changes.append(change)
            batch.num_preempted += num_running - len(self.running)

    def _admit(self, batch: Batch, budget: Budget, now: float, *, better_than: int | None = None) -> None:
        """Let waiting sequences in, best class first, while budget, slots and cells last; perhaps only better ones.

        One whose beginning is being prefilled by another, or brought back, waits for that instead of computing it
        again; those behind it may pass.
        """
        promised = sum(sequence.num_pending for sequence in self.running)
        for sequence in self._queue(now):
            if budget.tokens <= 0 or (better_than is not None and _rank(sequence, now) >= better_than):
                return
            found = self._longest_prefix(sequence)
            if found.is_coming or sequence in self._restoring:
                continue
            source, shared = found.source, found.shared
            needed = sequence.num_pending - shared
            space = needed + promised + self.headroom * len(self.running)
            while not self._place(sequence, source, shared, space, batch):
                slot = self._displace(_rank(sequence, now), space, batch, now)
                if slot is None:
                    return
                source, shared = (-1, 0) if source == slot else (source, shared)
                promised = sum(each.num_pending for each in self.running)
                needed = sequence.num_pending - shared
                space = needed + promised + self.headroom * len(self.running)
            needed = sequence.num_pending
            count = budget.grant(sequence, needed)
            if count > 0:
                batch.slices.append(Slice(sequence, count))
            promised += needed

    def _place(self, sequence: Sequence, source: int, shared: int, space: int, batch: Batch) -> bool:
        """Give a sequence a slot that begins with what it shares, if `space` cells can be had; False if not.

        Finished sequences are forgotten as needed, the one to begin from last: then the newcomer goes on in its slot.
        What a better class left behind is forgotten only when nobody runs, so that nobody waits for ever.
        """
        rank = sequence.priority.rank if self.running else 0
        if not self.cache.is_unified:
            return self._seat(sequence, source, shared, batch)
        reachable = self.cache.num_free_cells + self.cache.num_idle_for(rank)
        if reachable - (shared if self.cache.is_kept(source) else 0) < space:
            return False  # before anything is forgotten in vain
        while self.cache.num_free_cells < space or not self.cache.num_free_slots:
            slot = self.cache.first_to_go(rank=rank, but=source)
            if slot is None:
                return self._take_over(sequence, source, shared, space, batch)
            batch.changes.append(self._forget(slot))
        slot = self.cache.open()
        if shared:
            self.cache.share(source, slot, shared)
            batch.changes.append(Copy(source, slot, shared))
        self._start(sequence, slot, shared)
        return True

    def _take_over(self, sequence: Sequence, source: int, shared: int, space: int, batch: Batch) -> bool:
        if not self.cache.is_kept(source):
            return False
        if self.cache.num_free_cells + self.cache.num_freed_by(source, shared) < space:
            return False
        self.cache.take_over(source, shared)
        batch.changes.append(Trim(source, shared))
        self._start(sequence, source, shared)
        return True

    def _seat(self, sequence: Sequence, source: int, shared: int, batch: Batch) -> bool:
        """The same in streams: a sequence goes on where its prefix is, if that is beside those who run."""
        slot = self._free_seat(sequence, source)
        if slot is None:
            return False
        if slot == source:
            tokens = self.cache.kept_tokens(slot)
            self.cache.take_over(slot, shared)
            is_lost = len(tokens) - shared >= MIN_RESTORED and not self._is_held(tokens)
            batch.changes.append(Trim(slot, shared, tokens if is_lost else None))
        else:
            if self.cache.is_kept(slot):
                batch.changes.append(self._forget(slot))
            self.cache.open(slot)
            if shared * MOST_COPIED < self.cache.num_held(source):
                shared = 0
            if shared:
                self.cache.share(source, slot, shared)
                batch.changes.append(Copy(source, slot, shared))
        self._start(sequence, slot, shared)
        return True

    def _free_seat(self, sequence: Sequence, source: int = -1) -> int | None:
        """The slot for a newcomer: beside those who run, and then its own, a free one, the least recently used one.

        Nobody is kept out by what a better class left behind, of which there may be a seat full everywhere; the shelf
        has room for it. A long prefix stays where it is.
        """
        kept = self.cache.kept_slots()
        if source in kept and self.cache.num_held(source) > MAX_MOVED:
            return source
        seats = [*(slot for slot in kept if slot == source), *sorted(self.cache.free_slots), *kept]
        promised = {slot for other, slot in self._reserved.items() if other is not sequence}
        taken = {each.slot for each in self.running if each.slot is not None}
        return best_seat(taken, [slot for slot in seats if slot not in promised] or seats)

    def _close_gaps(self, batch: Batch) -> None:
        """Let those who decode in this step, or else all, sit in a row, where moving them is less work than the gap.

        A gap is left for one step: often the client whose answer has ended asks again at once, and fills it.
        """
        sitting = {each.slot: each for each in self.running if each.slot is not None}
        together = batch.parts[0] if batch.slices else []
        needed = moves([slot for piece in together if (slot := piece.sequence.slot) is not None])
        had_gaps, self._has_gaps = self._has_gaps, bool(needed)
        for slot, other in needed if had_gaps else ():
            movers = [each for each in (sitting.get(slot), sitting.get(other)) if each is not None]
            if any(each.is_moved for each in movers) or self.cache.num_held(slot, other) > MAX_MOVED:
                continue
            self.cache.swap(slot, other)
            names = {slot: other, other: slot}
            for each in movers:
                assert each.slot is not None
                each.slot = names[each.slot]
            self._reserved = {each: names.get(place, place) for each, place in self._reserved.items()}
            batch.changes.append(Swap(slot, other))
        batch.slices.sort(key=lambda piece: piece.sequence.slot or 0)

    def _displace(self, rank: int, space: int, batch: Batch, now: float) -> int | None:
        """Preempt the youngest running one of a class below `rank`, if that may make room; the slot that it had."""
        lower = [sequence for sequence in self.running if _rank(sequence, now) > rank]
        held = sum(sequence.num_cached for sequence in lower)
        can_have = self.cache.num_free_cells + self.cache.num_idle_for(rank) + held
        if not lower or (self.cache.is_unified and can_have < space):
            return None
        victim = max(reversed(lower), key=lambda sequence: sequence.priority.rank)
        change = self._preempt_this(victim)
        batch.slices = [piece for piece in batch.slices if piece.sequence is not victim]
        batch.changes.append(change)
        batch.num_preempted += 1
        return change.slot

    def _start(self, sequence: Sequence, slot: int, shared: int) -> None:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self._restored.discard(sequence)
        self._reserved.pop(sequence, None)
        self._looked.pop(sequence, None)
        sequence.slot, sequence.num_cached = slot, shared
        if not sequence.num_generated:
            sequence.num_reused = shared

    def _longest_prefix(self, sequence: Sequence) -> Prefix:
        """Where to take a prefix from. At least one token is left to compute, because the cache keeps no logits."""
        if not self.shares_prefixes or sequence.echoes:
            return Prefix()
        wanted = sequence.prompt[: len(sequence.tokens) - 1]
        source, best = self.cache.best_kept(wanted) or (-1, 0)
        coming = 0
        for other in self.running:
            assert other.slot is not None
            shared = common_prefix(other.prompt, wanted)
            if min(shared, other.num_cached) > best:
                source, best = other.slot, min(shared, other.num_cached)
            if shared > other.num_cached and other.priority.rank <= sequence.priority.rank:
                coming = max(coming, shared)
        coming = coming if coming - best >= MIN_AWAITED else 0
        return Prefix(source, best, coming) if best >= MIN_SHARED else Prefix(coming=coming)

    def _preempt(self, rank: int) -> Clear:
        """Preempt the youngest running sequence of a class."""
        return self._preempt_this(next(s for s in reversed(self.running) if s.priority.rank == rank))

    def _preempt_this(self, sequence: Sequence) -> Clear:
        is_true = self.shares_prefixes and not sequence.is_moved
        computed = np.array(sequence.tokens[: sequence.num_cached], np.int32)
        return Clear(self._send_back(sequence).slot, computed if is_true else None)

    def _send_back(self, sequence: Sequence) -> Clear:
        """To the head of the queue, with nothing in the cache."""
        self.running.remove(sequence)
        self.waiting.insert(0, sequence)
        change = self._release(sequence)
        sequence.restart()
        return change

    def _release(self, sequence: Sequence) -> Clear:
        assert sequence.slot is not None
        slot, sequence.slot = sequence.slot, None
        self.cache.close(slot)
        return Clear(slot)


def _rank(sequence: Sequence, now: float) -> int:
    """Its class as it counts now."""
    is_old = now - sequence.arrived > AGEING_S
    return min(sequence.priority.rank, _NORMAL) if is_old else sequence.priority.rank


def _turn(sequence: Sequence, now: float) -> tuple[int, float]:
    """Sorts those who wait."""
    return _rank(sequence, now), sequence.arrived
