"""Who takes part in the next step. Pure: it counts tokens and cells and never touches llama.cpp.

One step is one batch that mixes every running decode with a chunk of waiting prefill. Slots are many and cheap; what is
scarce is cells. Sequences are admitted while their prompt fits, not their longest possible answer, and when the cells
run out the youngest one is preempted: it loses its cells, goes back to the head of the queue with what it has
generated, and is prefilled again later. Its client notices a pause.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class Batch:
    """What to compute in one step, and which slots to clear before it."""

    slices: list[Slice] = field(default_factory=list)
    cleared: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens in all slices."""
        return sum(piece.count for piece in self.slices)


class Scheduler:
    """Decides each step's batch.

    Args:
        num_cells: KV cells in all. num_slots: sequences that may hold cells at once.
        num_batch: most tokens of a step. busy_prefill: most prompt tokens of a step that also decodes, so that a long
            prompt does not stall those who are being answered.
        headroom: free cells that each running sequence must have before another is admitted, so that one admitted in
            this step is not preempted in the next.
    """

    def __init__(
        self, *, num_cells: int, num_slots: int, num_batch: int, busy_prefill: int = 64, headroom: int = 32
    ) -> None:
        self.num_cells = num_cells
        self.num_batch = num_batch
        self.busy_prefill = busy_prefill
        self.headroom = headroom
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission, so the youngest is last
        self._free_slots = list(range(num_slots - 1, -1, -1))

    def __repr__(self) -> str:
        return f"<Scheduler waiting={len(self.waiting)} running={len(self.running)} free_cells={self.num_free_cells}>"

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def num_free_cells(self) -> int:
        """Cells that no running sequence holds."""
        return self.num_cells - sum(sequence.num_cached for sequence in self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> int | None:
        """Drop a sequence for good, wherever it is.

        Returns:
            The slot to clear, or None when it held none.
        """
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return None
        self.running.remove(sequence)
        return self._release(sequence)

    def preempt_youngest(self) -> int:
        """Take the cells of the sequence admitted last; it waits at the head of the queue.

        Returns:
            The slot to clear.
        """
        sequence = self.running.pop()
        slot = self._release(sequence)
        sequence.num_cached = 0
        self.waiting.appendleft(sequence)
        return slot

    def next_batch(self) -> Batch:
        """Choose the next step: decodes first, then prefill of the running, then of the waiting."""
        batch = Batch()
        self._make_room(batch)
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        prefilling = [sequence for sequence in self.running if sequence.num_pending > 1]
        batch.slices = [Slice(sequence, 1) for sequence in decoding]
        budget = min(self.num_batch - len(decoding), self.busy_prefill if decoding else self.num_batch)
        free = self.num_free_cells - len(decoding)
        for sequence in prefilling:
            count = min(sequence.num_pending, budget, free)
            if count > 0:
                batch.slices.append(Slice(sequence, count))
                budget, free = budget - count, free - count
        promised = sum(s.num_pending for s in prefilling) + len(decoding) - batch.num_tokens
        self._admit(batch, budget, free - promised)
        return batch

    def advance(self, batch: Batch) -> None:
        """Note that a batch was computed."""
        for piece in batch.slices:
            piece.sequence.num_cached += piece.count

    def _make_room(self, batch: Batch) -> None:
        """Preempt the youngest until the others can go on. The oldest always can: no window exceeds the cache."""
        while len(self.running) > 1:
            decodes = sum(1 for sequence in self.running if sequence.num_pending == 1)
            if self.num_free_cells >= max(decodes, 1):
                return
            batch.cleared.append(self.preempt_youngest())

    def _admit(self, batch: Batch, budget: int, free: int) -> None:
        """Let waiting sequences in, first come first served, while budget, slots and cells last."""
        while self.waiting and self._free_slots and budget > 0:
            sequence = self.waiting[0]
            if sequence.num_pending + self.headroom * len(self.running) > free:
                return
            self.running.append(self.waiting.popleft())
            sequence.slot = self._free_slots.pop()
            count = min(sequence.num_pending, budget)
            batch.slices.append(Slice(sequence, count))
            budget, free = budget - count, free - sequence.num_pending

    def _release(self, sequence: Sequence) -> int:
        assert sequence.slot is not None
        slot, sequence.slot = sequence.slot, None
        self._free_slots.append(slot)
        return slot
