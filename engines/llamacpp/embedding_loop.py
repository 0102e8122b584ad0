"""The one thread that touches llama.cpp in a worker for embeddings or reranking: inputs in, rows of numbers out.

One step is one batch, filled with whole inputs of every request that waits, the first class first and within a class
one input of each request in turn, so that a long list does not hold up a short one. Nothing is padded: llama.cpp takes
inputs of any length side by side. Its surprise: a batch is kept small (`fill`), because attention looks at every pair
of tokens of a batch, those of different inputs too, only to mask them, which costs more than a larger batch saves.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from engines.errors import BadRequest, Cancelled, HeadwaterError
from engines.llamacpp.embedding_context import EmbeddingContext, Vectors
from engines.llamacpp.threads import Threads
from engines.request import Priority
from engines.store.gguf import Pooling

log = logging.getLogger(__name__)

NOT_FINITE = "embedding contains NaN or Inf values"


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way through the loop. Only the loop's thread changes it, and anyone may read its counters.

    Attributes:
        inputs: token ids, none of them empty. rows: one for each input, filled as they are computed.
        num_taken, num_done: inputs that are or were in a batch, and those that are complete.
        started, ended: monotonic seconds, 0 while it has not.
    """

    inputs: Sequence[Sequence[int]]
    rank: int
    rows: Vectors
    arrived: float
    on_end: Callable[[], None]
    num_taken: int = 0
    num_done: int = 0
    computed_tokens: int = 0
    started: float = 0.0
    ended: float = 0.0
    error: HeadwaterError | None = None


@dataclass(slots=True)
class Totals:
    """What the loop has computed since it started; read by others without a lock, each number whole by itself."""

    steps: int = 0
    prefill_tokens: int = 0
    inputs: int = 0
    decode_s: float = 0.0
    overhead_s: float = 0.0


@dataclass(slots=True)
class Reading:
    """An input that is longer than a batch and read in chunks; `row` is pooled so far."""

    job: Job
    index: int
    position: int = 0
    row: Vectors | None = None

    @property
    def tokens(self) -> Sequence[int]:
        """The whole input."""
        return self.job.inputs[self.index]


@dataclass(slots=True)
class JobQueue:
    """Whose inputs come next. Pure."""

    lanes: tuple[deque[Job], ...] = field(default_factory=lambda: tuple(deque[Job]() for _ in Priority))

    @property
    def is_empty(self) -> bool:
        """Whether every input is taken."""
        return not any(self.lanes)

    def add(self, job: Job) -> None:
        """Let a job wait behind those of its class."""
        self.lanes[job.rank].append(job)

    def remove(self, job: Job) -> None:
        """Take a job away, wherever it is."""
        if job in self.lanes[job.rank]:
            self.lanes[job.rank].remove(job)

    def take(self, num_tokens: int, num_inputs: int) -> list[tuple[Job, int]]:
        """The next inputs that together fit, at least one; each is told by its job and its index there."""
        taken: list[tuple[Job, int]] = []
        for lane in self.lanes:
            while lane and len(taken) < num_inputs:
                job = lane[0]
                size = len(job.inputs[job.num_taken])
                if taken and size > num_tokens:
                    return taken
                taken.append((job, job.num_taken))
                job.num_taken += 1
                num_tokens -= size
                lane.rotate(-1)
                if job.num_taken == len(job.inputs):
                    lane.pop()
        return taken


class EmbeddingLoop:
    """Runs steps in its own thread while there is work, and sleeps while there is none.

    Args:
        fill: tokens that a batch of several inputs may have. threads: how many of them compute.
        on_failure: called once from the loop thread if llama.cpp fails for good; the loop has ended by then.
    """

    def __init__(
        self,
        context: EmbeddingContext,
        *,
        fill: int,
        threads: Threads,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.totals = Totals()
        self._threads = threads
        self._context = context
        self._fill = min(fill, context.num_batch)
        self._on_failure = on_failure
        self._queue = JobQueue()
        self._alive: set[Job] = set()
        self._reading: Reading | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="embedding-loop", daemon=True)

    @property
    def num_running(self) -> int:
        """Jobs that have begun."""
        return sum(1 for job in list(self._alive) if job.started)

    @property
    def num_waiting(self) -> int:
        """Jobs that have not."""
        return len(self._alive) - self.num_running

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take in a job. Callable from any thread."""
        self._commands.put(lambda: self._add(job))

    def cancel(self, job: Job) -> None:
        """End a job before the next batch. Callable from any thread."""
        self._commands.put(lambda: self._end(job, Cancelled()))

    def stop(self) -> None:
        """End the thread after the current step and wait for it."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._apply_commands():
                if not self._is_idle:
                    self.step()
        except BaseException as error:  # the thread's outermost frame
            log.exception("embedding loop failed")
            self._on_failure(error)

    @property
    def _is_idle(self) -> bool:
        return self._reading is None and self._queue.is_empty

    def _apply_commands(self) -> bool:
        """Apply what has been asked; wait for something when there is no work. False when the loop is to end."""
        block = self._is_idle
        while True:
            try:
                command = self._commands.get(block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = self._is_idle

    def _add(self, job: Job) -> None:
        self._alive.add(job)
        self._queue.add(job)

    def _end(self, job: Job, error: HeadwaterError | None = None) -> None:
        if job not in self._alive:
            return
        self._alive.discard(job)
        self._queue.remove(job)
        if self._reading is not None and self._reading.job is job:
            self._reading = None
        job.error, job.ended = error, time.monotonic()
        job.on_end()

    def step(self) -> None:
        """One turn: choose, compute, hand out."""
        if self._reading is not None:
            self._read_on(self._reading)
            return
        started = time.monotonic()
        batch = self._queue.take(self._fill, self._context.num_sequences)
        first, index = batch[0]
        if len(first.inputs[index]) > self._context.num_batch:
            self._begin(first, started)
            self._reading = Reading(first, index)
            self._context.clear()
            return
        self._context.clear()
        for sequence, (job, index) in enumerate(batch):
            self._begin(job, started)
            self._context.add(sequence, job.inputs[index])
        rows = self._compute(len(batch), sum(len(job.inputs[index]) for job, index in batch), started)
        for row, (job, index) in zip(rows, batch, strict=True):
            self._deliver(job, index, row, len(job.inputs[index]))

    def _read_on(self, reading: Reading) -> None:
        """The next chunk of a long input."""
        started = time.monotonic()
        chunk = reading.tokens[reading.position : reading.position + self._context.num_batch]
        self._context.clear_batch()
        self._context.add(0, chunk, reading.position)
        row = self._compute(1, len(chunk), started)[0]
        reading.row = pool_chunks(self._context.pooling, reading.row, reading.position, row, len(chunk))
        reading.position += len(chunk)
        if reading.position == len(reading.tokens):
            self._reading = None
            self._deliver(reading.job, reading.index, reading.row, len(chunk))
        else:
            reading.job.computed_tokens += len(chunk)

    def _begin(self, job: Job, now: float) -> None:
        job.started = job.started or now

    def _compute(self, num_inputs: int, num_tokens: int, started: float) -> Vectors:
        before = time.monotonic()
        rows = self._context.compute(num_inputs)
        after = time.monotonic()
        self.totals.steps += 1
        self.totals.prefill_tokens += num_tokens
        self.totals.decode_s += after - before
        self.totals.overhead_s += before - started
        if self._threads.observe(after - before, after):
            self._context.set_threads(self._threads.count)
        return rows

    def _deliver(self, job: Job, index: int, row: Vectors, num_tokens: int) -> None:
        if job not in self._alive:  # an earlier input of the same batch has ended it
            return
        job.rows[index] = row
        job.num_done += 1
        job.computed_tokens += num_tokens
        self.totals.inputs += 1
        if not np.isfinite(row).all():
            self._end(job, BadRequest(NOT_FINITE, param="input"))
        elif job.num_done == len(job.inputs):
            self._end(job)


def pool_chunks(pooling: int, so_far: Vectors | None, num_before: int, row: Vectors, num_tokens: int) -> Vectors:
    """What a causal input pools to after one more chunk; `so_far` covers the `num_before` tokens before it."""
    if so_far is None:
        return row
    match pooling:
        case Pooling.MEAN:
            return (so_far * num_before + row * num_tokens) / np.float32(num_before + num_tokens)
        case Pooling.CLS:
            return so_far
        case _:  # the last token, or a score that is read from it
            return row
