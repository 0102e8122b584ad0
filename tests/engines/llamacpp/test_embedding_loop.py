"""Whose inputs share a batch, and what becomes of inputs that are longer than one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import BadRequest, Cancelled
from engines.llamacpp.embedding_context import Vectors
from engines.llamacpp.embedding_loop import NOT_FINITE, EmbeddingLoop, Job, JobQueue, pool_chunks
from engines.llamacpp.threads import Threads
from engines.request import Priority
from engines.store.gguf import Pooling


def job(*sizes: int, priority: Priority = Priority.NORMAL) -> Job:
    """A job with inputs of these many tokens; every token's id is its position."""
    inputs = [list(range(size)) for size in sizes]
    return Job(inputs, priority.rank, np.zeros((len(sizes), 1), np.float32), arrived=0.0, on_end=lambda: None)


def told(taken: list[tuple[Job, int]], *jobs: Job) -> list[tuple[int, int]]:
    """A batch with each job told by its number."""
    return [(jobs.index(each), index) for each, index in taken]


class FakeContext:
    """Pools by the mean of the token ids; remembers its batches."""

    num_batch = 8
    num_sequences = 4
    pooling = Pooling.MEAN

    def __init__(self, broken: int | None = None) -> None:
        self.batches: list[list[tuple[int, list[int], int]]] = []
        self.batch: list[tuple[int, list[int], int]] = []
        self.broken = broken
        self.num_clears = 0

    def clear(self) -> None:
        """Forget everything."""
        self.num_clears += 1
        self.clear_batch()

    def clear_batch(self) -> None:
        """Forget the batch."""
        self.batch = []

    def add(self, sequence: int, tokens: Sequence[int], position: int = 0) -> None:
        """Remember."""
        self.batch.append((sequence, list(tokens), position))

    def compute(self, num_sequences: int) -> Vectors:
        """One row each."""
        self.batches.append(self.batch)
        pieces = [tokens for _, tokens, _ in self.batch]
        return np.array([[np.nan if self.broken in tokens else np.mean(tokens)] for tokens in pieces], np.float32)


def loop_of(context: FakeContext, *jobs: Job, fill: int = 8) -> EmbeddingLoop:
    """A loop whose steps are taken by hand."""

    def fail(error: BaseException) -> None:
        raise error

    loop = EmbeddingLoop(context, fill=fill, threads=Threads(1), on_failure=fail)  # type: ignore[arg-type]
    for each in jobs:
        loop.submit(each)
    loop.submit(job(1))  # so that there is no waiting for commands
    loop._apply_commands()
    return loop


def test_jobs_take_turns() -> None:
    """A long list does not hold up a short one."""
    queue, long, short = JobQueue(), job(2, 2, 2), job(2)
    queue.add(long)
    queue.add(short)
    assert told(queue.take(100, 100), long, short) == [(0, 0), (1, 0), (0, 1), (0, 2)]
    assert queue.is_empty


def test_a_batch_ends_where_the_next_input_does_not_fit() -> None:
    """Nobody overtakes it, and it is first in the next batch."""
    queue, one, two = JobQueue(), job(3, 3), job(6)
    queue.add(one)
    queue.add(two)
    assert told(queue.take(8, 100), one, two) == [(0, 0)]
    assert told(queue.take(8, 100), one, two) == [(1, 0)]
    assert told(queue.take(8, 100), one, two) == [(0, 1)]


def test_an_input_that_never_fits_goes_alone() -> None:
    """So a batch is never empty."""
    queue, huge = JobQueue(), job(1000)
    queue.add(huge)
    assert told(queue.take(8, 100), huge) == [(0, 0)]


def test_the_first_class_goes_first_and_the_last_fills_up() -> None:
    """Whoever came first."""
    queue = JobQueue()
    batch, normal, urgent = job(1, 1, priority=Priority.BATCH), job(1), job(1, priority=Priority.INTERACTIVE)
    for each in (batch, normal, urgent):
        queue.add(each)
    assert told(queue.take(3, 100), batch, normal, urgent) == [(2, 0), (1, 0), (0, 0)]


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@given(
    jobs=st.lists(st.tuples(SIZES, st.sampled_from(Priority)), max_size=6),
    num_tokens=st.integers(1, 16),
    num_inputs=st.integers(1, 5),
)
def test_every_input_is_taken_once_and_no_batch_overflows(
    jobs: list[tuple[list[int], Priority]], num_tokens: int, num_inputs: int
) -> None:
    """Whatever is asked for."""
    queue, added = JobQueue(), [job(*sizes, priority=priority) for sizes, priority in jobs]
    for each in added:
        queue.add(each)
    seen = []
    while not queue.is_empty:
        taken = queue.take(num_tokens, num_inputs)
        sizes = [len(each.inputs[index]) for each, index in taken]
        assert 1 <= len(taken) <= num_inputs
        assert sum(sizes) <= num_tokens or len(sizes) == 1
        seen += told(taken, *added)
    assert sorted(seen) == [(number, index) for number, each in enumerate(added) for index in range(len(each.inputs))]


def test_inputs_of_several_jobs_share_a_batch() -> None:
    """Each as a sequence of its own, from position 0."""
    context, one, two = FakeContext(), job(2, 3), job(1)
    loop = loop_of(context, one, two)
    loop.step()
    assert context.batches[0][:3] == [(0, [0, 1], 0), (1, [0], 0), (2, [0], 0)]
    assert [row[0] for row in one.rows] == [0.5, 1.0]
    assert (one.num_done, one.computed_tokens, one.ended > 0) == (2, 5, True)


def test_a_long_input_is_read_in_chunks() -> None:
    """At positions that go on, in one sequence, and its rows add up."""
    context, long = FakeContext(), job(20)
    loop = loop_of(context, long)
    for _ in range(4):  # one step only begins
        loop.step()
    assert [batch[0][2] for batch in context.batches] == [0, 8, 16]
    assert context.num_clears == 1
    assert long.rows[0][0] == pytest.approx(9.5)
    assert (long.computed_tokens, long.error) == (20, None)


def test_a_job_that_is_cancelled_is_never_computed_on() -> None:
    """Not even a long input that has begun; what it has cost stays."""
    context, long, waiting = FakeContext(), job(20), job(2)
    loop = loop_of(context, long, waiting)
    loop.step()
    loop.step()
    loop.cancel(long)
    loop.cancel(waiting)
    loop._apply_commands()
    assert isinstance(long.error, Cancelled)
    assert (long.computed_tokens, waiting.computed_tokens) == (8, 0)
    loop.step()
    assert context.batches[-1] == [(0, [0], 0)]


def test_numbers_that_are_none_fail_their_own_job() -> None:
    """In Ollama's words; the others in the batch get theirs."""
    context, bad, good = FakeContext(broken=4), job(5, 1), job(1)
    loop = loop_of(context, bad, good)
    loop.step()
    assert isinstance(bad.error, BadRequest)
    assert bad.error.message == NOT_FINITE
    assert good.error is None
    assert good.num_done == 1


@pytest.mark.parametrize(
    ("pooling", "expected"), [(Pooling.MEAN, 2.5), (Pooling.CLS, 1.0), (Pooling.LAST, 3.0), (Pooling.RANK, 3.0)]
)
def test_chunks_pool_as_a_whole_would(pooling: Pooling, expected: float) -> None:
    """The mean by weight, the first token's row from the first chunk, the last one's from the last."""
    first, last = np.array([1.0], np.float32), np.array([3.0], np.float32)
    assert pool_chunks(pooling, None, 0, first, 2) is first
    assert pool_chunks(pooling, first, 2, last, 6) == pytest.approx(expected)
