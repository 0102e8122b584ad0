"""Where sequences sit when each has cells of its own (llama.cpp's streams).

llama.cpp computes streams together only while their numbers follow each other (llama-batch.cpp, `split_equal`); every
gap between those of one step reads all weights once more. So a newcomer sits beside those who run, and a gap that
somebody leaves is closed by moving another there. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable


def span(slots: Iterable[int]) -> int:
    """From the first slot to the last one, both included; 0 without any."""
    slots = list(slots)
    return max(slots) - min(slots) + 1 if slots else 0


def best_seat(taken: Collection[int], candidates: Iterable[int]) -> int | None:
    """The candidate that keeps those who sit together, the first of several alike; None without any."""
    return min(candidates, key=lambda slot: span([*taken, slot]), default=None)


def moves(taken: Collection[int]) -> list[tuple[int, int]]:
    """The fewest moves, from slot to slot, after which those who sit in `taken` sit in a row.

    A row that nobody need leave is chosen where there is one, else the one that most sit in, the lowest of several.
    """
    if not taken:
        return []
    starts = range(min(taken), max(taken) - len(taken) + 2)
    start = max(starts, key=lambda first: sum(first <= slot < first + len(taken) for slot in taken))
    row = range(start, start + len(taken))
    outside = [slot for slot in sorted(taken) if slot not in row]
    gaps = [slot for slot in row if slot not in taken]
    return list(zip(outside, gaps, strict=True))
