from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engines.llamacpp.batch import Batch, Change, Clear, Copy, Restore, Swap, Trim
from engines.llamacpp.detokenize import TextStream
from engines.llamacpp.kvcache import Tokens, common_prefix
from engines.llamacpp.scheduler import AGEING_S, Scheduler
from engines.llamacpp.sequence import Sequence
from engines.request import Priority


class NoSampler:
    """Never asked: these tests append tokens themselves."""

    def sample(self, index: int) -> int:
        raise NotImplementedError

    def close(self) -> None:
        """It holds nothing."""


def sequence(num_prompt: int, *, num_ctx: int = 1000, max_tokens: int = 1000) -> Sequence:
    """A new sequence whose prompt has that many tokens."""
    return asking(list(range(num_prompt)), num_ctx=num_ctx, max_tokens=max_tokens)


def asking(prompt: list[int], *, num_ctx: int = 1000, max_tokens: int = 1000, **more: Any) -> Sequence:
    """A new sequence with that prompt."""
    text = TextStream(lambda token: b"x", lambda token: False, ())
    return Sequence(prompt, num_ctx, max_tokens, NoSampler(), text, **more)


def scheduler(**changes: Any) -> Scheduler:
    """A roomy scheduler without headroom that shares nothing, unless said otherwise."""
    roomy = {"num_cells": 1000, "num_slots": 8, "num_batch": 100, "headroom": 0, "shares_prefixes": False}
    return Scheduler(**{**roomy, **changes})


def cleared(batch: Batch) -> list[int]:
    """The slots that a batch clears."""
    return [change.slot for change in batch.changes if isinstance(change, Clear)]


def step(machine: Scheduler) -> Batch:
    """One whole step: every sequence whose tokens are all computed gets one more, as the engine loop does it."""
    batch = machine.next_batch()
    ready = [piece.sequence for piece in batch.slices if piece.is_last]
    machine.advance(batch.slices)
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
        machine.advance(batch.slices)
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
    assert machine.remove(first) == [Clear(0)]
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
    slots: list[int] = []
    while not slots:
        slots = cleared(step(machine))
    assert slots == [1]
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
        if cleared(batch):
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
    """Waiting, prefilling, decoding and preempted sequences can be dropped; only a slot needs clearing."""
    machine = scheduler(num_cells=40, num_batch=20, num_slots=2)
    decoding, prefilling, waiting = sequence(5), sequence(30), sequence(1)
    machine.add(decoding)
    step(machine)
    machine.add(prefilling)
    step(machine)
    machine.add(waiting)
    assert prefilling.num_pending > 1
    assert machine.remove(waiting) == []
    assert machine.remove(prefilling) == [Clear(1)]
    machine.add(prefilling := sequence(10))
    step(machine)
    change = machine.give_way()
    assert change is not None
    assert change.slot == 1
    assert machine.remove(prefilling) == []
    assert machine.remove(decoding) == [Clear(0)]
    assert machine.is_idle
    assert machine.num_free_cells == 40


def test_a_prompt_that_begins_like_a_running_one_copies_its_cells() -> None:
    """The second computes only what differs, and the cells of the common part are counted once."""
    machine = scheduler(shares_prefixes=True)
    first, second = asking([1] * 50 + [2] * 10), asking([1] * 50 + [3] * 5)
    machine.add(first)
    step(machine)
    machine.add(second)
    batch = step(machine)
    assert batch.changes == [Copy(0, 1, 50)]
    assert shape(batch) == [(first, 1), (second, 5)]
    assert second.num_reused == 50
    assert machine.cache.num_free_cells == 1000 - 61 - 5


def test_a_prefix_that_is_being_prefilled_is_waited_for() -> None:
    """Of several prompts with one unseen beginning, one computes it and the others begin where it ends."""
    machine = scheduler(shares_prefixes=True, num_batch=200)
    alike = [asking([1] * 300 + [2 + i] * 3) for i in range(3)]
    for each in alike:
        machine.add(each)
    other = asking([9] * 4)
    machine.add(other)
    assert shape(step(machine)) == [(alike[0], 200)]
    batch = step(machine)
    assert shape(batch) == [(alike[0], 103), (other, 4)], "an unrelated prompt may pass"
    batch = step(machine)
    assert [change.count for change in batch.changes if isinstance(change, Copy)] == [300, 300]
    assert all(each.num_reused == 300 for each in alike[1:])


def test_what_a_finished_sequence_computed_is_reused() -> None:
    """The next turn of a chat begins with the whole last one, its answer included."""
    machine = scheduler(shares_prefixes=True)
    turn = asking(list(range(20)))
    machine.add(turn)
    for _ in range(5):
        step(machine)
    assert machine.remove(turn) == [], "kept, so there is nothing to clear"
    following = asking([*turn.tokens[:-1], 7, 8])
    machine.add(following)
    assert shape(step(machine)) == [(following, 2)]
    assert following.num_reused == 24


def test_finished_sequences_are_forgotten_before_anyone_is_preempted() -> None:
    """Their cells are the first to go, least recently used first."""
    machine = scheduler(shares_prefixes=True, num_cells=40)
    for start in (100, 200):
        machine.add(done := asking(list(range(start, start + 10))))
        step(machine)
        machine.remove(done)
    machine.add(asking(list(range(30))))
    assert cleared(step(machine)) == [0]


def test_a_prompt_goes_on_in_the_slot_it_begins_from_when_there_is_no_room_for_both() -> None:
    """A kept sequence that fills the cache gives up its tail to one that begins alike."""
    machine = scheduler(shares_prefixes=True, num_cells=40)
    machine.add(done := asking([1] * 36))
    step(machine)
    machine.remove(done)
    machine.add(new := asking([1] * 10 + [2] * 20))
    batch = step(machine)
    assert batch.changes == [Trim(0, 10)]
    assert shape(batch) == [(new, 20)]
    assert machine.cache.num_free_cells == 10


def test_finished_sequences_beyond_the_budget_are_forgotten() -> None:
    """The least recently used go, and the one that finished last stays however large it is."""
    machine = scheduler(shares_prefixes=True, kept_cells=25)
    for start, cleared_slots in ((100, []), (200, []), (300, [0])):
        machine.add(done := asking(list(range(start, start + 10))))
        step(machine)
        assert [change.slot for change in machine.remove(done)] == cleared_slots
    machine.add(large := asking([7] * 90))
    step(machine)
    assert sorted(change.slot for change in machine.remove(large)) == [1, 2]
    assert machine.cache.num_idle_cells == 90


def test_nothing_is_forgotten_for_a_prompt_that_would_not_fit_all_the_same() -> None:
    """While a running sequence holds the cells that it needs, a waiting one costs nobody a kept prefix."""
    machine = scheduler(shares_prefixes=True, num_cells=100)
    machine.add(done := asking([1] * 20))
    step(machine)
    machine.remove(done)
    machine.add(asking([2] * 60))
    step(machine)
    machine.add(large := asking([3] * 50))
    for _ in range(3):
        assert step(machine).changes == []
    assert large.slot is None
    assert machine.cache.num_kept == 1


def test_a_better_class_goes_first_whenever_it_arrived() -> None:
    """Within a class, first come first served; batch work that has waited long counts as normal."""
    machine = scheduler(num_slots=1)
    machine.add(running := sequence(3))
    step(machine)
    names = {
        name: asking([1], priority=priority, arrived=arrived)
        for name, priority, arrived in (
            ("old batch", Priority.BATCH, 1.0),
            ("batch", Priority.BATCH, 80.0),
            ("first", Priority.NORMAL, 70.0),
            ("second", Priority.NORMAL, 75.0),
            ("reader", Priority.INTERACTIVE, 90.0),
        )
    }
    for each in names.values():
        machine.add(each)
    order = []
    for _ in names:
        machine.remove(running)
        machine.next_batch(now=91.0)
        (running,) = machine.running
        order.append(next(name for name, each in names.items() if each is running))
        running.num_cached = 1
        machine.cache.extend(running.slot or 0, 1)
    assert order == ["reader", "old batch", "first", "second", "batch"]


def test_batch_work_takes_turns_beside_a_reader() -> None:
    """One of it decodes in each step while one person reads along, and all of it once nobody does."""
    machine = scheduler()
    reader = asking([1, 2], priority=Priority.INTERACTIVE)
    batch = [asking([3 + i], priority=Priority.BATCH) for i in range(3)]
    for each in (reader, *batch):
        machine.add(each)
    step(machine)
    seen = []
    for now in range(1, 4):
        first, other = shape(step(machine))
        assert first == (reader, 1)
        other[0].last_token = now
        seen.append(other[0])
    assert set(seen) == set(batch)
    machine.remove(reader)
    assert len(shape(step(machine))) == 3


def test_batch_work_that_has_aged_rests_no_more() -> None:
    """It counts as normal wherever classes are compared, so a place that it was given is used."""
    machine = scheduler()
    batch = [asking([3 + i], priority=Priority.BATCH) for i in range(3)]
    for each in (asking([1, 2], priority=Priority.INTERACTIVE), *batch):
        machine.add(each)
    step(machine)
    assert len(machine.next_batch(now=1.0).slices) == 2
    assert len(machine.next_batch(now=2 * AGEING_S).slices) == 4


def test_batch_work_is_displaced_by_who_needs_its_cells() -> None:
    """The youngest of it goes back into the queue, and what it has computed is offered to the shelf."""
    machine = scheduler(num_cells=60, shares_prefixes=True)
    old, young = (asking([i] * 20, priority=Priority.BATCH) for i in (1, 2))
    machine.add(old)
    machine.add(young)
    step(machine)
    machine.add(chat := asking([3] * 30))
    batch = step(machine)
    (change,) = batch.changes
    assert isinstance(change, Clear)
    assert change.tokens is not None
    assert change.tokens.tolist() == [2] * 20
    assert shape(batch) == [(old, 1), (chat, 30)]
    assert machine.waiting == [young]
    assert batch.num_preempted == 1


def test_batch_work_does_not_displace_its_equals_or_betters() -> None:
    """It waits."""
    machine = scheduler(num_cells=60)
    machine.add(sequence(40))
    step(machine)
    machine.add(late := asking([1] * 30, priority=Priority.BATCH))
    assert step(machine).num_preempted == 0
    assert late.slot is None


def test_what_readers_left_behind_is_not_forgotten_for_batch_work() -> None:
    """Batch work waits for its own kind to finish; when nobody runs at all, it gets its place."""
    machine = scheduler(num_cells=60, shares_prefixes=True)
    machine.add(reader := asking([1] * 30, priority=Priority.INTERACTIVE))
    step(machine)
    machine.remove(reader)
    machine.add(first := asking([2] * 20, priority=Priority.BATCH))
    machine.add(second := asking([3] * 20, priority=Priority.BATCH))
    step(machine)
    assert (first.slot is None, second.slot is None) == (False, True)
    assert machine.cache.num_kept == 1
    machine.remove(first)
    step(machine)
    assert second.slot is not None
    assert machine.cache.num_kept == 1, "what the first left behind went instead"


class OneTitle:
    """A shelf with one prefix."""

    def __init__(self, *tokens: int) -> None:
        self.version = 0
        self._tokens = np.array(tokens, np.int32)

    def longest(self, tokens: Tokens) -> tuple[str, int] | None:
        """How much of the prefix is asked for."""
        shared = common_prefix(self._tokens, tokens)
        return ("key", shared) if shared else None


def test_a_prefix_on_the_shelf_is_waited_for_once() -> None:
    """Others pass meanwhile, and what came back is shared like what anyone left behind."""
    machine = scheduler(shares_prefixes=True, shelf=OneTitle(*[1] * 200), num_batch=400)
    machine.add(waits := asking([1] * 210))
    machine.add(passes := asking([2] * 5))
    assert machine.wanted() == [Restore(waits, "key", 200)]
    batch = machine.next_batch()
    assert shape(batch) == [(passes, 5)]
    machine.advance(batch.slices)
    assert machine.wanted() == []
    place = machine.make_place(sequence(5), 200)
    assert place is not None
    machine.cache.extend(place[0], 200)
    machine.cache.keep(place[0], [1] * 200)
    machine.restored(waits)
    assert machine.wanted() == []
    assert (waits, 10) in shape(machine.next_batch())
    assert waits.num_reused == 200


def test_a_prefix_that_cannot_be_read_is_computed() -> None:
    """And not asked for again."""
    machine = scheduler(shares_prefixes=True, shelf=OneTitle(*[1] * 200), num_batch=400)
    machine.add(waits := asking([1] * 210))
    assert machine.wanted() == [Restore(waits, "key", 200)]
    assert machine.next_batch().slices == []
    assert machine.is_restoring
    machine.restored(waits)
    assert machine.wanted() == []
    assert shape(machine.next_batch()) == [(waits, 210)]


def test_the_shelf_is_asked_only_for_what_is_not_to_be_had_otherwise() -> None:
    """What runs, or was left behind, or is being computed, is as long; and again only when there is something new."""
    machine = scheduler(shares_prefixes=True, shelf=(shelf := OneTitle(*[1] * 200)), num_batch=150)
    machine.add(first := asking([1] * 300))
    machine.restored(first)
    machine.next_batch()
    machine.waiting.clear()
    machine.add(asking([1] * 250))
    assert machine.wanted() == [], "the first will have computed it"
    shelf.version += 1
    machine.running.clear()
    assert [restore.count for restore in machine.wanted()] == [200]


def test_a_prefix_does_not_come_back_at_the_cost_of_those_who_run() -> None:
    """Their cells and those of their prompts are taken."""
    machine = scheduler(num_cells=100, shares_prefixes=True)
    machine.add(sequence(70))
    step(machine)
    assert machine.make_place(sequence(5), 40) is None
    assert machine.make_place(sequence(5), 20) is not None


def test_a_prompt_that_is_measured_is_computed_whole_and_in_small_pieces() -> None:
    """Every token needs a row of logits, and a cached prefix has none."""
    machine = scheduler(shares_prefixes=True)
    machine.add(first := asking([1] * 50))
    step(machine)
    machine.add(measured := asking([1] * 50, echoes=True))
    assert [shape(step(machine))[-1] for _ in range(2)] == [(measured, 32), (measured, 18)]
    assert measured.num_reused == 0
    machine.remove(first)


def test_a_full_window_closes_up_in_place() -> None:
    """The cells of the lost middle are free, and the rest is still there."""
    machine = scheduler(num_cells=40)
    machine.add(full := asking([1] * 19, num_ctx=20, num_keep=4))
    step(machine)
    assert full.fills_window
    assert machine.shift(full, in_place=True) == (4, 8)
    assert (len(full.tokens), full.num_cached, full.num_shifted, full.num_generated) == (12, 11, 8, 1)
    assert machine.cache.num_free_cells == 40 - 11
    assert shape(step(machine)) == [(full, 1)]
    assert machine.remove(full) == [Clear(0)], "its cells are not what a fresh prefill would compute"


def test_a_full_window_that_shares_cells_is_computed_anew() -> None:
    """Moving them would move the other's too."""
    machine = scheduler(shares_prefixes=True)
    first = asking([1] * 18, num_ctx=20, num_keep=4)
    machine.add(first)
    step(machine)
    machine.add(asking([1] * 18 + [2], num_ctx=30))
    step(machine)
    assert first.fills_window
    assert machine.shift(first, in_place=True) == Clear(0)
    assert machine.waiting == [first]
    assert (first.num_cached, first.num_shifted, len(first.tokens)) == (0, 8, 12)


def streams(**changes: Any) -> Scheduler:
    """A scheduler of four streams."""
    return scheduler(**{"num_cells": 4000, "num_slots": 4, "shares_prefixes": True, "is_unified": False, **changes})


def test_a_conversation_goes_on_in_its_stream() -> None:
    """Nothing is copied, and what follows the common part is dropped; it was short."""
    machine = streams()
    machine.add(first := asking([1] * 50))
    step(machine)
    machine.remove(first)
    machine.add(again := asking([1] * 49 + [2] * 10))
    batch = machine.next_batch()
    assert batch.changes == [Trim(0, 49)]
    assert shape(batch) == [(again, 10)]
    assert again.slot == 0


def test_what_is_cut_off_a_stream_can_be_saved() -> None:
    """A newcomer that shares only the beginning of a finished one gets its stream; the rest is worth keeping."""
    machine = streams()
    machine.add(first := asking([1] * 20 + [2] * 60))
    step(machine)
    machine.remove(first)
    machine.add(asking([1] * 20 + [3] * 10))
    [trim] = machine.next_batch().changes
    assert isinstance(trim, Trim)
    assert trim.tokens is not None
    assert list(trim.tokens) == first.tokens[:80]


def test_a_prefix_is_copied_to_a_stream_beside_its_owner() -> None:
    """The owner goes on with its own cells."""
    machine = streams()
    machine.add(asking([1] * 50))
    step(machine)
    machine.add(other := asking([1] * 45 + [2] * 5))
    assert machine.next_batch().changes == [Copy(0, 1, 45)]
    assert other.num_reused == 45


def test_a_long_stream_is_not_copied_for_a_few_tokens() -> None:
    """A state is copied whole, so computing them takes less time."""
    machine = streams(num_cells=40_000, num_batch=9000)
    machine.add(asking([1] * 9 + [2] * 8000, num_ctx=10_000))
    step(machine)
    machine.add(other := asking([1] * 9 + [3] * 20))
    batch = machine.next_batch()
    assert batch.changes == []
    assert (other, 29) in shape(batch)


def test_a_gap_between_streams_is_closed() -> None:
    """After a step, the last one changes places with what the one that finished has left behind."""
    machine = streams()
    three = [asking([number] * 20) for number in range(3)]
    for each in three:
        machine.add(each)
    step(machine)
    machine.remove(three[1])
    assert step(machine).changes == []
    batch = step(machine)
    assert batch.changes == [Swap(2, 1)]
    assert [each.slot for each in (three[0], three[2])] == [0, 1]
    assert machine.cache.kept_slots() == [2]


def test_a_newcomer_waits_when_every_stream_is_taken() -> None:
    """However short it is; somebody of a lower class makes way for it."""
    machine = streams(num_batch=200)
    running = [asking([number] * 20, priority=Priority.NORMAL) for number in range(4)]
    for each in running:
        machine.add(each)
    step(machine)
    machine.add(equal := asking([7], priority=Priority.NORMAL))
    step(machine)
    assert equal.slot is None
    machine.add(reader := asking([8] * 9, priority=Priority.INTERACTIVE))
    assert step(machine).num_preempted == 1
    assert reader.slot == 3
    assert running[3].slot is None


def test_what_readers_left_behind_keeps_nobody_out_of_a_stream() -> None:
    """It goes to the shelf, even while another reader runs."""
    machine = streams(num_slots=2, num_cells=2000)
    readers = [asking([number] * 40, priority=Priority.INTERACTIVE) for number in range(2)]
    for each in readers:
        machine.add(each)
    step(machine)
    machine.remove(readers[0])
    machine.add(newcomer := asking([7] * 9, priority=Priority.BATCH))
    [clear] = step(machine).changes
    assert isinstance(clear, Clear)
    assert clear.tokens is not None
    assert newcomer.slot == 0


def test_a_reader_does_not_wait_for_a_long_prompt_of_a_lower_class() -> None:
    """Neither behind it, nor for what they have in common."""
    machine = streams(num_batch=100)
    machine.add(long := asking([1] * 900, priority=Priority.NORMAL))
    step(machine)
    machine.add(reader := asking([1] * 950, priority=Priority.INTERACTIVE))
    assert shape(step(machine)) == [(reader, 100)]
    assert reader.num_reused == 100
    assert long.slot is not None


def test_prefixes_come_back_for_as_many_as_have_a_seat() -> None:
    """One that was brought back for somebody is not dropped for the next one in the queue."""
    machine = streams(num_slots=2, num_cells=2000, shelf=OneTitle(*[1] * 200), num_batch=400)
    waiting = [asking([1] * (201 + number)) for number in range(3)]
    for each in waiting:
        machine.add(each)
    wanted = machine.wanted()
    assert [restore.sequence for restore in wanted] == waiting[:2]
    places = [machine.make_place(restore.sequence, 200) for restore in wanted]
    assert places == [(0, []), (1, [])]


NUM_CELLS, NUM_SLOTS, NUM_BATCH = 48, 5, 16


class Cells:
    """What llama.cpp would hold: each slot's tokens, changed as the scheduler says."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}

    def apply(self, change: Change) -> None:
        """Do as llama.cpp does; what is to be saved must be there."""
        match change:
            case Clear(slot, tokens):
                assert tokens is None or list(tokens) == self.of(slot)
                self.tokens.pop(slot, None)
            case Copy(source, slot, count):
                assert not self.of(slot)
                assert len(self.of(source)) >= count
                self.tokens[slot] = self.of(source)[:count]
            case Trim(slot, count, tokens):
                assert tokens is None or list(tokens) == self.of(slot)
                del self.tokens[slot][count:]
            case Swap(one, other):
                self.tokens[one], self.tokens[other] = self.of(other), self.of(one)

    def of(self, slot: int) -> list[int]:
        """A slot's tokens."""
        return self.tokens.get(slot, [])


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, departures and steps, with windows that may each fill the whole cache."""

    shares_prefixes = False
    is_unified = True
    num_cells = NUM_CELLS

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler(
            num_cells=self.num_cells,
            num_slots=NUM_SLOTS,
            num_batch=NUM_BATCH,
            busy_prefill=4,
            headroom=3,
            shares_prefixes=self.shares_prefixes,
            is_unified=self.is_unified,
        )
        self.alive: list[Sequence] = []
        self.cells = Cells()

    @rule(
        num_prompt=st.integers(1, NUM_CELLS - 1),
        num_alike=st.integers(0, NUM_CELLS),
        room=st.integers(0, 30),
        max_tokens=st.integers(0, 30),
        priority=st.sampled_from(Priority),
        num_keep=st.none() | st.integers(0, NUM_CELLS),
        echoes=st.booleans(),
    )
    def arrive(self, num_prompt: int, num_alike: int, room: int, max_tokens: int, **more: Any) -> None:
        """A request with any prompt, of which some begins like others, and any window that the cache can hold."""
        num_ctx = min(num_prompt + 1 + room, NUM_CELLS)
        prompt = [index if index < num_alike else 1000 + index for index in range(num_prompt)]
        new = asking(prompt, num_ctx=num_ctx, max_tokens=max_tokens, **more)
        self.alive.append(new)
        self.scheduler.add(new)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """A client hangs up."""
        self.finish(data.draw(st.sampled_from(self.alive)))

    @precondition(lambda self: self.scheduler.waiting and self.shares_prefixes)
    @rule(data=st.data())
    def bring_back(self, data: st.DataObject) -> None:
        """A prefix comes from the shelf for somebody who waits."""
        sequence = data.draw(st.sampled_from(self.scheduler.waiting))
        tokens = sequence.tokens[: data.draw(st.integers(1, len(sequence.tokens)))]
        place = self.scheduler.make_place(sequence, len(tokens))
        if place is not None:
            for change in place[1]:
                self.cells.apply(change)
            self.cells.tokens[place[0]] = list(tokens)
            self.scheduler.cache.extend(place[0], len(tokens))
            self.scheduler.cache.keep(place[0], tokens, sequence.priority.rank)

    @precondition(lambda self: self.alive)
    @rule()
    def take_step(self) -> None:
        """One turn of the engine loop, which always computes something, after what everybody has in the cache."""
        batch = self.scheduler.next_batch()
        assert batch.slices
        assert batch.num_tokens <= NUM_BATCH
        assert len({piece.sequence for piece in batch.slices}) == len(batch.slices)
        for change in batch.changes:
            self.cells.apply(change)
        for piece in batch.slices:
            each = piece.sequence
            assert each.slot is not None
            assert self.cells.of(each.slot) == each.tokens[: each.num_cached]
            self.cells.tokens[each.slot] = each.tokens[: each.num_cached + piece.count]
        ready = [piece.sequence for piece in batch.slices if piece.is_last]
        self.scheduler.advance(batch.slices)
        for each in ready:
            if each.num_generated < each.max_tokens:
                each.tokens.append(0)
            if each.is_full:
                self.finish(each)
            elif each.fills_window:
                self.shift(each)

    def shift(self, each: Sequence) -> None:
        """A full window loses its middle."""
        assert each.slot is not None
        held = self.cells.of(each.slot)
        change = self.scheduler.shift(each, in_place=self.shares_prefixes)
        if isinstance(change, Clear):
            self.cells.apply(change)
        else:
            keep, lost = change
            del held[keep : keep + lost]

    @precondition(lambda self: len(self.scheduler.running) > 1)
    @rule()
    def retreat(self) -> None:
        """The cache turned out fuller than counted."""
        change = self.scheduler.give_way()
        assert change is not None
        self.cells.apply(change)

    def finish(self, each: Sequence) -> None:
        """A sequence ends."""
        self.alive.remove(each)
        for change in self.scheduler.remove(each):
            self.cells.apply(change)

    @invariant()
    def cells_are_enough(self) -> None:
        """Nothing is counted as cached beyond what the cache holds, and idle cells are those of nobody who runs."""
        cache = self.scheduler.cache
        assert cache.num_free_cells >= 0
        busy = {run for each in self.scheduler.running if each.slot is not None for run in cache._runs[each.slot]}
        assert self.scheduler.num_free_cells == self.num_cells - sum(run.length for run in busy)

    @invariant()
    def slots_are_kept_apart(self) -> None:
        """Everyone is in one place, who runs has a slot of its own, and no slot is lost."""
        slots = [each.slot for each in self.scheduler.running if each.slot is not None]
        assert len(slots) == len(self.scheduler.running)
        cache = self.scheduler.cache
        assert sorted([*slots, *cache._free_slots, *cache._kept]) == list(range(NUM_SLOTS))
        assert [cache.length(slot) for slot in slots] == [each.num_cached for each in self.scheduler.running]
        assert all(list(cache.kept_tokens(slot)) == self.cells.of(slot) for slot in cache.kept_slots())
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


class SharingMachine(SchedulerMachine):
    """The same with prefixes shared."""

    shares_prefixes = True


class StreamsMachine(SharingMachine):
    """The same with a window of cells for each slot; those of a step sit in a row."""

    is_unified = False
    num_cells = NUM_CELLS * NUM_SLOTS

    @invariant()
    def nobody_outgrows_a_stream(self) -> None:
        """A slot holds a window at most."""
        assert all(len(tokens) <= NUM_CELLS for tokens in self.cells.tokens.values())


StreamsMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestStreamsMachine = StreamsMachine.TestCase
SharingMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestSharingMachine = SharingMachine.TestCase
SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
