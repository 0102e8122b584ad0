from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engines.llamacpp.detokenize import TextStream
from engines.llamacpp.scheduler import Batch, Scheduler
from engines.llamacpp.sequence import Sequence


class NoSampler:
    """Never asked: these tests append tokens themselves."""

    def sample(self, index: int) -> int:
        raise NotImplementedError

    def close(self) -> None:
        """It holds nothing."""


def sequence(num_prompt: int, *, num_ctx: int = 1000, max_tokens: int = 1000) -> Sequence:
    """A new sequence whose prompt has that many tokens."""
    text = TextStream(lambda token: b"x", lambda token: False, ())
    return Sequence(list(range(num_prompt)), num_ctx, max_tokens, NoSampler(), text)


def scheduler(**changes: Any) -> Scheduler:
    """A roomy scheduler without headroom, unless said otherwise."""
    return Scheduler(**{"num_cells": 1000, "num_slots": 8, "num_batch": 100, "headroom": 0, **changes})


def step(machine: Scheduler) -> Batch:
    """One whole step: every sequence whose tokens are all computed gets one more, as the engine loop does it."""
    batch = machine.next_batch()
    ready = [piece.sequence for piece in batch.slices if piece.is_last]
    machine.advance(batch)
    for each in ready:
        each.tokens.append(0)
    return batch


def shape(batch: Batch) -> list[tuple[Sequence, int]]:
    """Who computes how many tokens."""
    return [(piece.sequence, piece.count) for piece in batch.slices]


def test_an_idle_scheduler_has_nothing_to_compute() -> None:
    """Without sequences there is no work and the batch is empty."""
    machine = scheduler()
    assert machine.is_idle
    assert machine.next_batch() == Batch()


def test_a_prompt_is_prefilled_in_chunks_of_the_batch_size() -> None:
    """A prompt longer than a batch takes several steps, and only the last one asks for logits."""
    machine, long = scheduler(num_batch=100), sequence(250)
    machine.add(long)
    batches = []
    for _ in range(3):
        batch = machine.next_batch()
        batches.append([(piece.count, piece.is_last) for piece in batch.slices])
        machine.advance(batch)
    assert batches == [[(100, False)], [(100, False)], [(50, True)]]


def test_decodes_come_first_and_limit_the_prefill_beside_them() -> None:
    """While somebody is answered, a long prompt gets no more than `busy_prefill` tokens of each step."""
    machine = scheduler(num_batch=100, busy_prefill=10)
    answered, long = sequence(5), sequence(50)
    machine.add(answered)
    step(machine)
    machine.add(long)
    assert shape(step(machine)) == [(answered, 1), (long, 10)]
    assert shape(step(machine)) == [(answered, 1), (long, 10)]


def test_prefill_has_the_whole_batch_when_nobody_decodes() -> None:
    """Two prompts that arrive together share one step up to the batch size, in order of arrival."""
    machine = scheduler(num_batch=100, busy_prefill=10)
    first, second = sequence(60), sequence(60)
    machine.add(first)
    machine.add(second)
    assert shape(step(machine)) == [(first, 60), (second, 40)]
    assert shape(step(machine)) == [(first, 1), (second, 10)]


def test_waiting_is_first_come_first_served() -> None:
    """A short prompt does not overtake a long one that does not fit yet."""
    machine = scheduler(num_cells=100)
    running, long, short = sequence(50), sequence(80), sequence(5)
    machine.add(running)
    step(machine)
    machine.add(long)
    machine.add(short)
    step(machine)
    assert machine.running == [running]
    assert list(machine.waiting) == [long, short]
    machine.remove(running)
    step(machine)
    assert machine.running == [long, short]


def test_admission_leaves_headroom_for_those_who_run() -> None:
    """A newcomer is let in once its prompt and the headroom of every running sequence fit the free cells."""
    machine = scheduler(num_cells=100, headroom=32)
    machine.add(sequence(30))
    step(machine)
    newcomer = sequence(40)
    machine.add(newcomer)
    step(machine)
    assert newcomer.slot is None, "69 free cells are less than 40 + 32"
    machine.remove(newcomer)
    smaller = sequence(36)
    machine.add(smaller)
    step(machine)
    assert smaller.slot is not None


def test_a_prompt_half_prefilled_keeps_its_cells_promised() -> None:
    """Cells that a running prefill still needs are not given to a newcomer."""
    machine = scheduler(num_cells=100, num_batch=20)
    machine.add(sequence(90))
    step(machine)
    late = sequence(30)
    machine.add(late)
    for _ in range(4):
        step(machine)
        assert late.slot is None


def test_no_more_sequences_run_than_there_are_slots() -> None:
    """The third of two slots waits, and gets the slot that becomes free."""
    machine = scheduler(num_slots=2)
    first, second, third = sequence(3), sequence(3), sequence(3)
    for each in (first, second, third):
        machine.add(each)
    step(machine)
    assert (first.slot, second.slot, third.slot) == (0, 1, None)
    assert machine.remove(first) == 0
    step(machine)
    assert third.slot == 0


def test_the_youngest_is_preempted_and_later_resumes_with_what_it_said() -> None:
    """When cells run out, the last admitted gives up its cells, waits at the head, and is prefilled again whole."""
    machine = scheduler(num_cells=20)
    old, young, waiting = sequence(8, num_ctx=20), sequence(8, num_ctx=20), sequence(4, num_ctx=20)
    machine.add(old)
    machine.add(young)
    step(machine)
    machine.add(waiting)
    cleared: list[int] = []
    while not cleared:
        cleared = step(machine).cleared
    assert cleared == [1]
    assert (young.slot, young.num_cached) == (None, 0)
    assert list(machine.waiting) == [young, waiting], "ahead of those who never ran"
    said = len(young.tokens)
    assert young.num_generated > 0
    machine.remove(old)
    batch = step(machine)
    assert batch.slices[0].sequence is young
    assert batch.slices[0].count == said, "prompt and generated tokens"
    assert young.num_prompt == 8


def test_a_preempted_sequence_does_not_return_in_the_same_step() -> None:
    """Preemption frees cells for the others; readmitting its victim at once would only waste a prefill."""
    machine = scheduler(num_cells=16)
    old, young = sequence(7, num_ctx=16), sequence(7, num_ctx=16)
    machine.add(old)
    machine.add(young)
    for _ in range(3):
        batch = step(machine)
        if batch.cleared:
            assert shape(batch) == [(old, 1)]
            return
    raise AssertionError("nobody was preempted")


def test_the_oldest_always_goes_on() -> None:
    """A sequence that may fill the whole cache does so, whoever else wants cells."""
    machine = scheduler(num_cells=30, num_slots=8)
    oldest = sequence(10, num_ctx=30)
    machine.add(oldest)
    for _ in range(7):
        machine.add(sequence(10, num_ctx=30))
    while not oldest.is_full:
        assert any(piece.sequence is oldest for piece in step(machine).slices)
        for other in [each for each in machine.running if each is not oldest and each.is_full]:
            machine.remove(other)


def test_removal_works_in_every_state() -> None:
    """Waiting, prefilling, decoding and preempted sequences can all be dropped; only those with a slot need clearing."""
    machine = scheduler(num_cells=40, num_batch=20, num_slots=2)
    decoding, prefilling, waiting = sequence(5), sequence(30), sequence(1)
    machine.add(decoding)
    step(machine)
    machine.add(prefilling)
    step(machine)
    machine.add(waiting)
    assert prefilling.num_pending > 1
    assert machine.remove(waiting) is None
    assert machine.remove(prefilling) == 1
    machine.add(prefilling := sequence(10))
    step(machine)
    machine.preempt_youngest()
    assert machine.remove(prefilling) is None
    assert machine.remove(decoding) == 0
    assert machine.is_idle
    assert machine.num_free_cells == 40


NUM_CELLS, NUM_SLOTS, NUM_BATCH = 48, 5, 16


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, departures and steps, with windows that may each fill the whole cache."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler(
            num_cells=NUM_CELLS, num_slots=NUM_SLOTS, num_batch=NUM_BATCH, busy_prefill=4, headroom=3
        )
        self.alive: list[Sequence] = []

    @rule(num_prompt=st.integers(1, NUM_CELLS - 1), room=st.integers(0, 30), max_tokens=st.integers(0, 30))
    def arrive(self, num_prompt: int, room: int, max_tokens: int) -> None:
        """A request with any prompt and any window that the cache can hold."""
        num_ctx = min(num_prompt + 1 + room, NUM_CELLS)
        new = sequence(num_prompt, num_ctx=num_ctx, max_tokens=max_tokens)
        self.alive.append(new)
        self.scheduler.add(new)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """A client hangs up."""
        self.finish(data.draw(st.sampled_from(self.alive)))

    @precondition(lambda self: self.alive)
    @rule()
    def take_step(self) -> None:
        """One turn of the engine loop, which always computes something."""
        batch = self.scheduler.next_batch()
        assert batch.slices
        assert batch.num_tokens <= NUM_BATCH
        assert len({piece.sequence for piece in batch.slices}) == len(batch.slices)
        ready = [piece.sequence for piece in batch.slices if piece.is_last]
        self.scheduler.advance(batch)
        for each in ready:
            if not each.is_full:
                each.tokens.append(0)
            if each.is_full:
                self.finish(each)

    @precondition(lambda self: len(self.scheduler.running) > 1)
    @rule()
    def retreat(self) -> None:
        """The cache turned out fuller than counted."""
        self.scheduler.preempt_youngest()

    def finish(self, each: Sequence) -> None:
        """A sequence ends."""
        self.alive.remove(each)
        self.scheduler.remove(each)

    @invariant()
    def cells_are_enough(self) -> None:
        """Nothing is counted as cached beyond what the cache holds."""
        assert sum(each.num_cached for each in self.alive) <= NUM_CELLS
        assert self.scheduler.num_free_cells >= 0

    @invariant()
    def slots_are_kept_apart(self) -> None:
        """Everyone is in one place, who runs has a slot of its own, and no slot is lost."""
        slots = [each.slot for each in self.scheduler.running]
        assert None not in slots
        assert sorted([*slots, *self.scheduler._free_slots]) == list(range(NUM_SLOTS))
        assert all(each.slot is None and each.num_cached == 0 for each in self.scheduler.waiting)
        assert {*self.scheduler.running, *self.scheduler.waiting} == set(self.alive)

    def teardown(self) -> None:
        """Whatever happened before, everyone finishes once nobody new arrives."""
        for _ in range(10_000):
            if not self.alive:
                break
            self.take_step()
        assert not self.alive, "a sequence never finished"
        assert self.scheduler.is_idle


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
