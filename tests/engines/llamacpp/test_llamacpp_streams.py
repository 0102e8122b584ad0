"""Who sits where when each sequence has cells of its own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engines.llamacpp.streams import best_seat, moves, span

SLOTS = st.integers(0, 15)


def test_a_newcomer_sits_beside_those_who_run() -> None:
    """In a gap between them, else next to them, and where nobody is, wherever it likes best."""
    assert best_seat([0, 1, 3], [5, 4, 2]) == 2
    assert best_seat([3, 4], [0, 7, 5]) == 5
    assert best_seat([], [6, 0]) == 6
    assert best_seat([0, 1], []) is None


def test_a_gap_is_closed_by_the_one_who_sits_apart() -> None:
    """The others stay."""
    assert moves([0, 1, 2, 7]) == [(7, 3)]
    assert moves([0, 5, 6, 7]) == [(0, 4)]
    assert moves([4, 5, 6]) == []
    assert moves([]) == []


@given(st.sets(SLOTS))
def test_after_the_moves_all_sit_in_a_row(taken: set[int]) -> None:
    """Nobody moves twice, or where somebody is, and no more move than must."""
    made = moves(taken)
    sources, targets = {slot for slot, _ in made}, {slot for _, slot in made}
    assert len(sources) == len(targets) == len(made)
    assert sources <= taken
    assert not targets & taken
    after = taken - sources | targets
    assert span(after) == len(after) == len(taken)
    rows = [range(first, first + len(taken)) for first in range(16 - len(taken) + 1)]
    assert len(made) == min(len(taken.difference(row)) for row in rows)


@given(st.sets(SLOTS), st.lists(SLOTS, unique=True))
def test_a_seat_is_one_of_the_candidates(taken: set[int], candidates: list[int]) -> None:
    """And none of them is nearer."""
    seat = best_seat(taken, candidates)
    assert (seat is None) == (not candidates)
    assert seat is None or all(span([*taken, seat]) <= span([*taken, each]) for each in candidates)
