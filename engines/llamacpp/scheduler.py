"""Who takes part in the next step. Pure: it counts tokens and cells and never touches llama.cpp.

One step is one batch that mixes every running decode with a chunk of waiting prefill. Slots are many and cheap; what is
scarce is cells. Sequences are admitted while their prompt fits, not their longest possible answer, and begin with the
longest prefix that anyone, running or finished, has computed already. When the cells run out, finished sequences are
forgotten first; then the youngest running one is preempted: it loses its cells, goes back to the head of the queue with
what it has generated, and is prefilled again later. Its client notices a pause.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from engines.llamacpp.kvcache import KVCache, common_prefix
from engines.llamacpp.sequence import Sequence

MIN_SHARED = 8
"""Tokens of a prefix below which copying it is not worth the trouble."""

MIN_AWAITED = 64
"""Tokens that must be saved by waiting for another's prefill; less is computed sooner than waited for."""


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
    """Forget everything in a slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Let `slot` begin with the first `count` positions of `source`."""

    source: int
    slot: int
    count: int


@dataclass(frozen=True, slots=True)
class Trim:
    """Forget all but the first `count` positions of a slot."""

    slot: int
    count: int


@dataclass(slots=True)
class Batch:
    """What to compute in one step, and what to do to the cache before it, in this order."""

    slices: list[Slice] = field(default_factory=list)
    changes: list[Clear | Copy | Trim] = field(default_factory=list)
    num_preempted: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens in all slices."""
        return sum(piece.count for piece in self.slices)


class Scheduler:
    """Decides each step's batch.

    Args:
        num_cells: KV cells in all. num_slots: sequences that may hold cells at once, finished ones included.
        num_batch: most tokens of a step. busy_prefill: most prompt tokens of a step that also decodes, so that a long
            prompt does not stall those who are being answered.
        headroom: free cells that each running sequence must have before another is admitted, so that one admitted in
            this step is not preempted in the next.
        shares_prefixes: whether the model's memory can copy a part of a sequence, which recurrent memory cannot.
        kept_cells: most cells that finished sequences may hold beside the one that finished last. Every step looks at
            every cell in use, if only to find that it is masked: at 8 sequences 4,000 idle ones cost a tenth of it.
    """

    def __init__(
        self,
        *,
        num_cells: int,
        num_slots: int,
        num_batch: int,
        busy_prefill: int = 64,
        headroom: int = 32,
        shares_prefixes: bool = True,
        kept_cells: int | None = None,
    ) -> None:
        self.num_cells = num_cells
        self.num_batch = num_batch
        self.busy_prefill = busy_prefill
        self.headroom = headroom
        self.shares_prefixes = shares_prefixes
        self.kept_cells = num_cells if kept_cells is None else kept_cells
        self.cache = KVCache(num_cells=num_cells, num_slots=num_slots)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission, so the youngest is last

    def __repr__(self) -> str:
        return f"<Scheduler waiting={len(self.waiting)} running={len(self.running)} {self.cache!r}>"

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def num_free_cells(self) -> int:
        """Cells that nobody holds, or that only finished sequences hold."""
        return self.cache.num_free_cells + self.cache.num_idle_cells

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> list[int]:
        """Drop a sequence for good, wherever it is. What it has computed is kept for others who begin alike.

        Returns:
            The slots to clear.
        """
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return []
        self.running.remove(sequence)
        if not self.shares_prefixes or sequence.num_cached < MIN_SHARED:
            return [self._release(sequence)]
        slot, sequence.slot = sequence.slot, None
        self.cache.keep(slot, sequence.tokens[: sequence.num_cached])
        return self._forget_beyond_budget(slot)

    def _forget_beyond_budget(self, newest: int) -> list[int]:
        forgotten = []
        while self.cache.num_idle_cells > self.kept_cells:
            slot = self.cache.least_recently_used(but=newest)
            if slot is None:
                break
            self.cache.close(slot)
            forgotten.append(slot)
        return forgotten

    def give_way(self) -> int | None:
        """Free some cells: those of a finished sequence, else of the youngest running one, which will start over.

        Returns:
            The slot to clear; None when only one sequence is left, which must not be stopped.
        """
        kept = self.cache.least_recently_used()
        if kept is not None:
            self.cache.close(kept)
            return kept
        return self._preempt_youngest() if len(self.running) > 1 else None

    def next_batch(self) -> Batch:
        """Choose the next step: decodes first, then prefill of the running, then of the waiting."""
        batch = Batch()
        self._make_room(batch)
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        prefilling = [sequence for sequence in self.running if sequence.num_pending > 1]
        batch.slices = [Slice(sequence, 1) for sequence in decoding]
        budget = min(self.num_batch - len(decoding), self.busy_prefill if decoding else self.num_batch)
        free = self.cache.num_free_cells - len(decoding)
        for sequence in prefilling:
            count = min(sequence.num_pending, budget, free)
            if count > 0:
                batch.slices.append(Slice(sequence, count))
                budget, free = budget - count, free - count
        self._admit(batch, budget)
        return batch

    def advance(self, batch: Batch) -> None:
        """Note that a batch was computed."""
        for piece in batch.slices:
            assert piece.sequence.slot is not None
            piece.sequence.num_cached += piece.count
            self.cache.extend(piece.sequence.slot, piece.count)

    def _make_room(self, batch: Batch) -> None:
        """Free cells until everyone who runs can go on. The oldest always can: no window exceeds the cache."""
        while True:
            decodes = sum(1 for sequence in self.running if sequence.num_pending == 1)
            if not self.running or self.cache.num_free_cells >= max(decodes, 1):
                return
            num_running = len(self.running)
            slot = self.give_way()
            if slot is None:
                return
            batch.changes.append(Clear(slot))
            batch.num_preempted += num_running - len(self.running)

    def _admit(self, batch: Batch, budget: int) -> None:
        """Let waiting sequences in, first come first served, while budget, slots and cells last.

        One whose beginning is being prefilled by another waits for that instead of computing it again; those behind it
        may pass.
        """
        promised = sum(sequence.num_pending for sequence in self.running)
        for sequence in list(self.waiting):
            if budget <= 0:
                return
            source, shared, is_coming = self._longest_prefix(sequence)
            if is_coming:
                continue
            needed = sequence.num_pending - shared
            space = needed + promised + self.headroom * len(self.running)
            if not self._place(sequence, source, shared, space, batch):
                return
            count = min(needed, budget)
            batch.slices.append(Slice(sequence, count))
            budget, promised = budget - count, promised + needed

    def _place(self, sequence: Sequence, source: int, shared: int, space: int, batch: Batch) -> bool:
        """Give a sequence a slot that begins with what it shares, if `space` cells can be had; False if not.

        Finished sequences are forgotten as needed, the one to begin from last: then the newcomer goes on in its slot.
        """
        reachable = self.cache.num_free_cells + self.cache.num_idle_cells
        if reachable - (shared if self.cache.is_kept(source) else 0) < space:
            return False  # before anything is forgotten in vain
        while self.cache.num_free_cells < space or not self.cache.num_free_slots:
            slot = self.cache.least_recently_used(but=source)
            if slot is None:
                return self._take_over(sequence, source, shared, space, batch)
            self.cache.close(slot)
            batch.changes.append(Clear(slot))
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

    def _start(self, sequence: Sequence, slot: int, shared: int) -> None:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.slot, sequence.num_cached = slot, shared
        if not sequence.num_generated:
            sequence.num_reused = shared

    def _longest_prefix(self, sequence: Sequence) -> tuple[int, int, bool]:
        """Where to take a prefix from, how long it is, and whether a longer one is being prefilled right now.

        At least one token is left to compute, because the cache keeps no logits.
        """
        if not self.shares_prefixes:
            return -1, 0, False
        wanted = sequence.prompt[: len(sequence.tokens) - 1]
        source, best = self.cache.best_kept(wanted) or (-1, 0)
        coming = 0
        for other in self.running:
            assert other.slot is not None
            shared = common_prefix(other.prompt, wanted)
            if min(shared, other.num_cached) > best:
                source, best = other.slot, min(shared, other.num_cached)
            if shared > other.num_cached:
                coming = max(coming, shared)
        if coming - best >= MIN_AWAITED:
            return source, best, True
        return (source, best, False) if best >= MIN_SHARED else (-1, 0, False)

    def _preempt_youngest(self) -> int:
        sequence = self.running.pop()
        slot = self._release(sequence)
        sequence.num_cached = 0
        self.waiting.appendleft(sequence)
        return slot

    def _release(self, sequence: Sequence) -> int:
        assert sequence.slot is not None
        slot, sequence.slot = sequence.slot, None
        self.cache.close(slot)
        return slot
