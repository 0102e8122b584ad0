"""The books of a shared KV cache."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engines.llamacpp.kvcache import KVCache, common_prefix

NUM_CELLS, NUM_SLOTS = 60, 6


def test_a_shared_prefix_is_counted_once() -> None:
    """Two sequences with a common prefix of 10 and 5 of their own hold 20 cells, not 30."""
    cache = KVCache(num_cells=100, num_slots=4)
    first = cache.open()
    cache.extend(first, 15)
    second = cache.open()
    cache.share(first, second, 10)
    cache.extend(second, 5)
    assert cache.length(second) == 15
    assert cache.num_free_cells == 80


def test_a_prefix_outlives_the_sequence_that_computed_it() -> None:
    """Dropping the first holder frees only what it held alone."""
    cache = KVCache(num_cells=100, num_slots=4)
    first, second = cache.open(), cache.open()
    cache.extend(first, 15)
    cache.share(first, second, 10)
    cache.close(first)
    assert cache.num_free_cells == 90
    cache.close(second)
    assert cache.num_free_cells == 100


def test_extending_a_shared_run_takes_cells_of_ones_own() -> None:
    """Whoever goes on after a shared prefix does not lengthen it for the others."""
    cache = KVCache(num_cells=100, num_slots=4)
    first, second = cache.open(), cache.open()
    cache.extend(first, 10)
    cache.share(first, second, 10)
    cache.extend(first, 3)
    assert (cache.length(first), cache.length(second)) == (13, 10)


def test_the_longest_kept_prefix_is_found_and_becomes_the_most_recent() -> None:
    """A hit is what saves it from being dropped next."""
    cache = KVCache(num_cells=100, num_slots=4)
    slots = [cache.open() for _ in range(3)]
    for slot, tokens in zip(slots, ([1, 2, 3], [1, 2, 9], [7]), strict=True):
        cache.extend(slot, len(tokens))
        cache.keep(slot, tokens)
    assert cache.best_kept(np.array([1, 2, 3, 4], np.int32)) == (slots[0], 3)
    assert cache.best_kept(np.array([5], np.int32)) is None
    assert cache.first_to_go() == slots[1]
    assert cache.first_to_go(but=slots[1]) == slots[2]


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_agrees_with_counting(one: list[int], other: list[int]) -> None:
    """The vectorised comparison gives what a loop gives."""
    expected = 0
    while expected < min(len(one), len(other)) and one[expected] == other[expected]:
        expected += 1
    assert common_prefix(np.array(one, np.int32), np.array(other, np.int32)) == expected


class Books(RuleBasedStateMachine):
    """The books beside a cache in which every cell is an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(num_cells=NUM_CELLS, num_slots=NUM_SLOTS)
        self.cells: dict[int, list[object]] = {}

    @precondition(lambda self: self.cache.num_free_slots)
    @rule()
    def open(self) -> None:
        self.cells[self.cache.open()] = []

    @precondition(lambda self: self.cells)
    @rule(data=st.data(), count=st.integers(1, 9))
    def extend(self, data: st.DataObject, count: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.cells)))
        if count <= self.cache.num_free_cells:
            self.cache.extend(slot, count)
            self.cells[slot] += [object() for _ in range(count)]

    @precondition(lambda self: len(self.cells) > 1)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        empty = [slot for slot, cells in self.cells.items() if not cells]
        full = [slot for slot, cells in self.cells.items() if cells]
        if empty and full:
            source, target = data.draw(st.sampled_from(full)), data.draw(st.sampled_from(empty))
            count = data.draw(st.integers(1, len(self.cells[source])))
            self.cache.share(source, target, count)
            self.cells[target] = self.cells[source][:count]

    @precondition(lambda self: self.cells)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.cells)))
        self.cache.close(slot)
        del self.cells[slot]

    @precondition(lambda self: self.cells)
    @rule(data=st.data())
    def take_over(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.cells)))
        count = data.draw(st.integers(0, len(self.cells[slot])))
        self.cache.keep(slot, range(len(self.cells[slot])))
        free = self.cache.num_free_cells + self.cache.num_freed_by(slot, count)
        self.cache.take_over(slot, count)
        assert self.cache.num_free_cells == free
        assert not self.cache.is_kept(slot)
        self.cells[slot] = self.cells[slot][:count]

    @invariant()
    def counts_agree(self) -> None:
        used = {id(cell) for cells in self.cells.values() for cell in cells}
        assert self.cache.num_free_cells == NUM_CELLS - len(used)
        assert {slot: self.cache.length(slot) for slot in self.cells} == {s: len(c) for s, c in self.cells.items()}
        assert self.cache.num_free_slots == NUM_SLOTS - len(self.cells)


TestBooks = Books.TestCase
