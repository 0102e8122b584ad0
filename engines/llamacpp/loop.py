"""The one thread that touches llama.cpp: commands in, one batch of outputs out per step.

The event loop only exchanges commands and outputs with it. A step is: apply what was asked, choose a batch, decode it,
choose tokens, publish. A cancelled sequence is gone before the next decode begins. What the cache forgets goes to the
shelf, and comes back from there, between two decodes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from engines.events import FinishReason, TokenLogprob
from engines.llamacpp.batch import Batch, Change, Clear, Copy, Restore, Slice, Swap, Trim
from engines.llamacpp.context import Context, DecodeFailed, OutOfCells
from engines.llamacpp.kvcache import Tokens
from engines.llamacpp.logprobs import Likelihoods, Piece
from engines.llamacpp.pace import Pace
from engines.llamacpp.scheduler import Scheduler
from engines.llamacpp.sequence import Sequence
from engines.llamacpp.shelf import Shelf
from engines.llamacpp.threads import Threads

log = logging.getLogger(__name__)

MIN_CLOSED_UP = 512
"""Cells that must become free to look at before moving others for it."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one step brought one sequence: text to send, its tokens if they are told, and the reason when it is over."""

    sequence: Sequence
    text: str
    logprobs: tuple[TokenLogprob, ...]
    reason: FinishReason | None


@dataclass(slots=True)
class Totals:
    """What the engine has computed since it started; read by others without a lock, each number whole by itself."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    sampled_tokens: int = 0
    reused_tokens: int = 0
    saved_tokens: int = 0
    restored_tokens: int = 0
    shifted_tokens: int = 0
    preemptions: int = 0
    decode_s: float = 0.0
    overhead_s: float = 0.0


class EngineLoop:
    """Runs steps in its own thread while there is work, and sleeps while there is none.

    Args:
        pace: how much prefill may ride along with decodes. threads: how many of them compute.
        piece: the bytes of a token, for those who are told.
        shelf: where prefixes that the cache forgets are saved; None forgets them for good.
        publish: called from the loop thread with the outputs of each step. on_failure: called once if llama.cpp fails
            for good; the loop has ended by then.
    """

    def __init__(
        self,
        context: Context,
        scheduler: Scheduler,
        publish: Callable[[list[Output]], None],
        on_failure: Callable[[BaseException], None],
        *,
        pace: Pace,
        threads: Threads,
        piece: Piece,
        shelf: Shelf | None = None,
    ) -> None:
        self.totals = Totals()
        self._context = context
        self._scheduler = scheduler
        self._publish = publish
        self._on_failure = on_failure
        self._pace = pace
        self._threads = threads
        self._piece = piece
        self._shelf = shelf
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._alive: set[Sequence] = set()
        self._has_failed = False
        self._peak_cells = 0
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
        """End the thread after the current step, wait for it, save what is cached, and free what sequences held."""
        self._commands.put(None)
        self._thread.join()
        for sequence in self._alive:
            sequence.sampler.close()
        if self._shelf is not None and not self._has_failed:
            for change in self._scheduler.forget_all():
                self._apply(change)
            self._shelf.close()

    def _run(self) -> None:
        block = True
        try:
            while self._apply_commands(block=block):
                block = self._scheduler.is_idle or not self.step()
                if self._scheduler.is_idle:
                    self._close_ranks()
        except BaseException as error:  # the thread's outermost frame, and a Rust panic is no Exception
            log.exception("engine loop failed")
            self._has_failed = True
            self._on_failure(error)

    def _apply_commands(self, *, block: bool) -> bool:
        """Apply what has been asked; wait for something when there is no work. False when the loop is to end."""
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

    def step(self) -> bool:
        """One turn: schedule, decode, choose, publish. False when all who are here wait for the shelf.

        In streams, decodes and prefill are computed one after the other: llama.cpp would read the weights for each
        anyway, and in one pass everybody looks at as many cells as the longest has.
        """
        started = time.monotonic()
        for restore in self._scheduler.wanted(started):
            self._bring_back(restore)
        batch = self._scheduler.next_batch(started)
        for change in batch.changes:
            self._apply(change)
        self.totals.preemptions += batch.num_preempted
        if not batch.slices:
            assert self._scheduler.is_restoring, f"nothing to compute in {self._scheduler!r}"
            return False
        seconds: list[float] = []
        self.totals.steps += 1
        for part in [batch.slices] if self._scheduler.cache.is_unified else batch.parts:
            last_indexes = self._fill(part, started)
            before = time.monotonic()
            try:
                self._context.decode()
            except OutOfCells:
                self._retreat()
                return True
            after = time.monotonic()
            seconds.append(after - before)
            self._count(part, after - before)
            outputs = self._choose(part, last_indexes, after)
            if outputs:
                self._publish(outputs)
        ended = time.monotonic()
        self._learn(batch, seconds, ended)
        self.totals.overhead_s += ended - started - sum(seconds)
        return True

    def _close_ranks(self) -> None:
        """While nobody runs, move what is kept to the first cells, if the cache was much fuller than it is now.

        In one pool a step looks at every cell up to the last one in use, so one prefix far behind costs as much as a
        full cache.
        """
        cache = self._scheduler.cache
        if not cache.is_unified or self._peak_cells - (cache.num_cells - cache.num_free_cells) < MIN_CLOSED_UP:
            return
        for change in self._scheduler.forget_all(but=1):
            self._apply(change)
        for slot in cache.kept_slots():
            state = self._context.state(slot)
            self._context.remove(slot)
            if not state or not self._context.set_state(slot, state):
                cache.close(slot)
        self._peak_cells = cache.num_cells - cache.num_free_cells

    def _apply(self, change: Change) -> None:
        match change:
            case Clear(slot, tokens):
                if tokens is not None:
                    self._save(slot, tokens)
                self._context.remove(slot)
            case Copy(source, slot, count):
                self._context.copy(source, slot, count)
                self.totals.reused_tokens += count
            case Trim(slot, count, tokens):
                if tokens is not None:
                    self._save(slot, tokens)
                self._context.remove(slot, count)
                self.totals.reused_tokens += count
            case Swap(slot, other):
                self._context.swap(slot, other)

    def _save(self, slot: int, tokens: Tokens) -> None:
        """Hand what a slot holds to the shelf, if it is worth it."""
        if self._shelf is not None and self._shelf.wants(tokens) and (state := self._context.state(slot)):
            self._shelf.save(tokens, state)
            self.totals.saved_tokens += len(tokens)

    def _bring_back(self, restore: Restore) -> None:
        """Put a prefix back into the cache: at once from memory, in a while from the disk."""
        assert self._shelf is not None
        state = self._shelf.state(restore.key)
        if state is not None:
            self._restore(restore, state)
        else:
            self._shelf.read(restore.key, lambda found: self._commands.put(lambda: self._restore(restore, found)))

    def _restore(self, restore: Restore, state: memoryview | bytes | None) -> None:
        """Put a prefix into the cache as if a sequence had just finished there; whoever waited for it finds it so."""
        assert self._shelf is not None
        tokens = self._shelf.tokens(restore.key)
        if state is None:
            self._shelf.drop(restore.key)
        if restore.sequence not in self._alive:
            return
        self._scheduler.restored(restore.sequence)
        place = self._scheduler.make_place(restore.sequence, len(tokens)) if state and tokens is not None else None
        if state is None or tokens is None or place is None:
            return
        slot, forgotten = place
        for change in forgotten:
            self._apply(change)
        if not self._context.set_state(slot, state):
            log.warning("a saved prefix of %d tokens could not be restored", len(tokens))
            self._scheduler.cache.close(slot)
            return
        self._context.remove(slot, restore.count)
        self._scheduler.cache.extend(slot, restore.count)
        self._scheduler.cache.keep(slot, tokens[: restore.count], restore.sequence.priority.rank)
        self.totals.restored_tokens += restore.count

    def _fill(self, slices: list[Slice], now: float) -> list[int]:
        """Put slices into llama.cpp's batch; returns the batch index of each one's last token."""
        self._context.clear_batch()
        indexes = []
        for piece in slices:
            sequence = piece.sequence
            assert sequence.slot is not None
            sequence.scheduled = sequence.scheduled or now
            start = sequence.num_cached
            tokens = sequence.tokens[start : start + piece.count]
            measures = sequence.echoes and start < sequence.num_prompt
            indexes.append(
                self._context.add(sequence.slot, tokens, start, wants_logits=piece.is_last, wants_all=measures)
            )
        return indexes

    def _choose(self, slices: list[Slice], last_indexes: list[int], now: float) -> list[Output]:
        """Sample a token for every sequence whose tokens are all computed."""
        pieces = list(zip(slices, last_indexes, strict=True))
        ready = [(piece.sequence, index) for piece, index in pieces if piece.is_last]
        for piece, index in pieces:
            if piece.sequence.echoes:
                self._measure(piece, index)
        self._scheduler.advance(slices)
        self._peak_cells = max(self._peak_cells, self._scheduler.cache.num_cells - self._scheduler.cache.num_free_cells)
        return [self._sample(sequence, index, now) for sequence, index in ready]

    def _sample(self, sequence: Sequence, index: int, now: float) -> Output:
        """One token more for a sequence."""
        if sequence.num_generated >= sequence.max_tokens:  # nothing was to be generated
            return self._finish(sequence, FinishReason.LENGTH)
        told = None
        if sequence.num_logprobs is None:
            token = sequence.sampler.sample(index)
        else:
            likelihoods = Likelihoods(self._context.logits(index), sequence.num_logprobs, self._piece)
            token = sequence.sampler.sample(index)
            told = likelihoods.of(token)
        sequence.tokens.append(token)
        self.totals.sampled_tokens += 1
        sequence.first_token = sequence.first_token or now
        sequence.last_token = now
        if sequence.text.accept(token, told):
            return self._finish(sequence, FinishReason.STOP)
        if sequence.is_full:
            return self._finish(sequence, FinishReason.LENGTH)
        if sequence.fills_window:
            self._shift(sequence)
        return Output(sequence, *sequence.text.take(), None)

    def _shift(self, sequence: Sequence) -> None:
        """Let a full window lose its middle, in place where the cache allows it."""
        slot = sequence.slot
        assert slot is not None
        before = sequence.num_shifted
        change = self._scheduler.shift(sequence, in_place=self._context.can_shift)
        self.totals.shifted_tokens += sequence.num_shifted - before
        if isinstance(change, Clear):
            self._apply(change)
        else:
            self._context.close_up(slot, *change)

    def _measure(self, piece: Slice, last_index: int) -> None:
        """Note how likely each token of the prompt was after those before it; the first one has none."""
        sequence = piece.sequence
        start = sequence.num_cached
        for offset in range(piece.count):
            position = start + offset + 1
            if len(sequence.prompt_logprobs) + 1 == position < sequence.num_prompt:  # once, if it is computed again
                logits = self._context.logits(last_index - piece.count + 1 + offset)
                likelihoods = Likelihoods(logits, sequence.num_logprobs or 0, self._piece)
                sequence.prompt_logprobs.append(likelihoods.of(sequence.tokens[position]))

    def _finish(self, sequence: Sequence, reason: FinishReason) -> Output:
        for change in self._scheduler.remove(sequence):
            self._apply(change)
        self._alive.discard(sequence)
        sequence.sampler.close()
        return Output(sequence, *sequence.text.flush(), reason)

    def _retreat(self) -> None:
        """The cache is fuller than we counted (a sliding-window cache may be): go on with less in it."""
        num_running = len(self._scheduler.running)
        change = self._scheduler.give_way()
        if change is None:
            raise DecodeFailed("one sequence alone does not fit the KV cache")
        self._apply(change)
        self.totals.preemptions += num_running - len(self._scheduler.running)

    def _count(self, slices: list[Slice], seconds: float) -> None:
        num_decodes = sum(1 for piece in slices if piece.count == 1)
        self.totals.decode_tokens += num_decodes
        self.totals.prefill_tokens += sum(piece.count for piece in slices) - num_decodes
        self.totals.decode_s += seconds

    def _learn(self, batch: Batch, seconds: list[float], now: float) -> None:
        """What the step's parts took decides how much the next one may take on, and how many threads compute it."""
        num_decodes = sum(1 for piece in batch.slices if piece.count == 1)
        self._pace.observe(
            num_decodes=num_decodes,
            num_prefill=batch.num_tokens - num_decodes,
            seconds=sum(seconds),
            prefill_s=seconds[1] if len(seconds) > 1 else None,
        )
        self._scheduler.busy_prefill = self._pace.chunk
        self._scheduler.steady_prefill = self._pace.steady_chunk
        if self._threads.observe(sum(seconds), now):
            self._context.set_threads(self._threads.count)
