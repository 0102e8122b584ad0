"""The one thread that touches llama.cpp: commands in, one batch of outputs out per step.

The event loop only exchanges commands and outputs with it. A step is: apply what was asked, choose a batch, decode it,
choose tokens, publish. A cancelled sequence is gone before the next decode begins.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from engines.events import FinishReason
from engines.llamacpp.bindings import Context, DecodeFailed, OutOfCells
from engines.llamacpp.pace import Pace
from engines.llamacpp.scheduler import Batch, Clear, Copy, Scheduler, Trim
from engines.llamacpp.sequence import Sequence

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Output:
    """What one step brought one sequence: text to send, and the reason when it is over."""

    sequence: Sequence
    text: str
    reason: FinishReason | None


@dataclass(slots=True)
class Totals:
    """What the engine has computed since it started; read by others without a lock, each number whole by itself."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    sampled_tokens: int = 0
    reused_tokens: int = 0
    preemptions: int = 0
    decode_s: float = 0.0
    overhead_s: float = 0.0


class EngineLoop:
    """Runs steps in its own thread while there is work, and sleeps while there is none.

    Args:
        publish: called from the loop thread with the outputs of each step. on_failure: called once if llama.cpp fails
            for good; the loop has ended by then.
    """

    def __init__(
        self,
        context: Context,
        scheduler: Scheduler,
        publish: Callable[[list[Output]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.totals = Totals()
        self._context = context
        self._scheduler = scheduler
        self._publish = publish
        self._on_failure = on_failure
        self._pace = Pace(max_chunk=scheduler.num_batch)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._alive: set[Sequence] = set()
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)

    @property
    def num_running(self) -> int:
        """Sequences that hold cells."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for cells."""
        return len(self._scheduler.waiting)

    @property
    def num_free_cells(self) -> int:
        """KV cells that are free."""
        return self._scheduler.num_free_cells

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Take in a sequence. Callable from any thread."""
        self._commands.put(lambda: self._add(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence before the next decode; its last output has the reason `cancel`. Callable from any thread."""
        self._commands.put(lambda: self._cancel(sequence))

    def stop(self) -> None:
        """End the thread after the current step, wait for it, and free what its sequences held."""
        self._commands.put(None)
        self._thread.join()
        for sequence in self._alive:
            sequence.sampler.close()

    def _run(self) -> None:
        try:
            while self._apply_commands():
                if not self._scheduler.is_idle:
                    self.step()
        except BaseException as error:  # the thread's outermost frame, and a Rust panic is no Exception
            log.exception("engine loop failed")
            self._on_failure(error)

    def _apply_commands(self) -> bool:
        """Apply what has been asked; wait for something when there is no work. False when the loop is to end."""
        block = self._scheduler.is_idle
        while True:
            try:
                command = self._commands.get(block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = False

    def _add(self, sequence: Sequence) -> None:
        self._alive.add(sequence)
        self._scheduler.add(sequence)

    def _cancel(self, sequence: Sequence) -> None:
        if sequence in self._alive:
            self._publish([self._finish(sequence, FinishReason.CANCEL)])

    def step(self) -> None:
        """One turn: schedule, decode, choose, publish."""
        started = time.monotonic()
        batch = self._scheduler.next_batch()
        assert batch.slices, f"nothing to compute in {self._scheduler!r}"
        for change in batch.changes:
            self._apply(change)
        self.totals.preemptions += batch.num_preempted
        last_indexes = self._fill(batch, started)
        before = time.monotonic()
        try:
            self._context.decode()
        except OutOfCells:
            self._retreat()
            return
        after = time.monotonic()
        self._count(batch, after - before)
        outputs = self._choose(batch, last_indexes, after)
        if outputs:
            self._publish(outputs)
        self.totals.overhead_s += time.monotonic() - after + before - started

    def _apply(self, change: Clear | Copy | Trim) -> None:
        match change:
            case Clear(slot):
                self._context.remove(slot)
            case Copy(source, slot, count):
                self._context.copy(source, slot, count)
                self.totals.reused_tokens += count
            case Trim(slot, count):
                self._context.remove(slot, count)
                self.totals.reused_tokens += count

    def _fill(self, batch: Batch, now: float) -> list[int]:
        """Put the slices into llama.cpp's batch; returns the batch index of each one's last token."""
        self._context.clear_batch()
        indexes = []
        for piece in batch.slices:
            sequence = piece.sequence
            assert sequence.slot is not None
            sequence.scheduled = sequence.scheduled or now
            start = sequence.num_cached
            tokens = sequence.tokens[start : start + piece.count]
            indexes.append(self._context.add(sequence.slot, tokens, start, wants_logits=piece.is_last))
        return indexes

    def _choose(self, batch: Batch, last_indexes: list[int], now: float) -> list[Output]:
        """Sample a token for every sequence whose tokens are all computed."""
        ready = [(p.sequence, i) for p, i in zip(batch.slices, last_indexes, strict=True) if p.is_last]
        self._scheduler.advance(batch)
        outputs = []
        for sequence, index in ready:
            if sequence.is_full:  # nothing was to be generated
                outputs.append(self._finish(sequence, FinishReason.LENGTH))
                continue
            token = sequence.sampler.sample(index)
            sequence.tokens.append(token)
            self.totals.sampled_tokens += 1
            sequence.first_token = sequence.first_token or now
            sequence.last_token = now
            if sequence.text.accept(token):
                outputs.append(self._finish(sequence, FinishReason.STOP))
            elif sequence.is_full:
                outputs.append(self._finish(sequence, FinishReason.LENGTH))
            else:
                outputs.append(Output(sequence, sequence.text.take(), None))
        return outputs

    def _finish(self, sequence: Sequence, reason: FinishReason) -> Output:
        for slot in self._scheduler.remove(sequence):
            self._context.remove(slot)
        self._alive.discard(sequence)
        sequence.sampler.close()
        return Output(sequence, sequence.text.flush(), reason)

    def _retreat(self) -> None:
        """The cache is fuller than we counted (a sliding-window cache may be): go on with less in it."""
        num_running = len(self._scheduler.running)
        slot = self._scheduler.give_way()
        if slot is None:
            raise DecodeFailed("one sequence alone does not fit the KV cache")
        self._context.remove(slot)
        self.totals.preemptions += num_running - len(self._scheduler.running)

    def _count(self, batch: Batch, decode_s: float) -> None:
        num_decodes = sum(1 for piece in batch.slices if piece.count == 1)
        num_prefill = batch.num_tokens - num_decodes
        self.totals.steps += 1
        self.totals.decode_tokens += num_decodes
        self.totals.prefill_tokens += num_prefill
        self.totals.decode_s += decode_s
        self._pace.observe(num_decodes=num_decodes, num_prefill=num_prefill, seconds=decode_s)
        self._scheduler.busy_prefill = self._pace.chunk
