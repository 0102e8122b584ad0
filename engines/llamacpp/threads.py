"""How many threads compute: as many as find a core of their own.

llama.cpp's threads wait for each other hundreds of times a step, in a busy loop. One that has lost its core to another
program stops them all until it gets it back: with one busy program on two cores, decoding falls to a third, with two to
a twentieth. Fewer threads are then faster than more. The kernel tells how long each thread was ready to run and had no
core; where it does not (anything but Linux), the number stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

LOOK_S = 0.25
"""Computing time between two looks."""

FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 32.0
"""How long fewer threads compute before one more is tried; it doubles each time that was too many."""

_NOISE = 0.12  # of the time some thread may stand still for: event loops and other small things do that much

Delays = Mapping[int, tuple[float, float]]
"""Of each thread, by its id: seconds that it ran, and seconds that it waited for a core, since it began."""


class Threads:
    """Follows how many cores are free.

    Args:
        most: threads when nobody else needs a core. look: reads what the kernel says; empty where it says nothing.
    """

    def __init__(self, most: int, look: Callable[[], Delays] | None = None) -> None:
        self.count = most
        self._most = most
        self._look = look or thread_delays
        self._before: Delays = {}
        self._computed_s = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._try_more_at = 0.0

    def observe(self, seconds: float, now: float) -> bool:
        """Note that a step computed for so long and ended at `now`; whether `count` has changed."""
        if self._most == 1:
            return False
        self._computed_s += seconds
        if self._computed_s < LOOK_S:
            return False
        before, self._before = self._before, self._look()
        stalled = _waited(before, self._before, self._computed_s) / self._computed_s
        self._computed_s = 0.0
        if not before:
            return False
        return self._decide(stalled, now)

    def _decide(self, stalled: float, now: float) -> bool:
        """One thread less while that costs less than the time for which some thread had no core."""
        if self.count > 1 and stalled > 1.2 * max(1 / self.count, _NOISE):
            self.count -= min(max(int(stalled), 1), self.count - 1)  # each busy program keeps one thread waiting
            self._try_more_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)
            return True
        if self.count < self._most and now >= self._try_more_at:
            self.count += 1
            self._try_more_at = now + FIRST_PAUSE_S
            return True
        if self.count == self._most and now >= self._try_more_at + self._pause_s:
            self._pause_s = FIRST_PAUSE_S
        return False


def _waited(before: Delays, after: Delays, seconds: float) -> float:
    """Seconds that the computing threads waited for a core; those that hardly ran have other business."""
    spans = [
        (ran - before[thread][0], waited - before[thread][1])
        for thread, (ran, waited) in after.items()
        if thread in before
    ]
    return sum(waited for ran, waited in spans if ran + waited > seconds / 2)


def thread_delays() -> Delays:
    """What Linux says of this process's threads (Documentation/scheduler/sched-stats.rst)."""
    delays = {}
    own = {thread.native_id for thread in threading.enumerate() if thread is not threading.current_thread()}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        thread = int(path.parent.name)
        if thread in own:  # event loop and helpers: that they wait for us is no news
            continue
        try:
            ran, waited, _ = map(int, path.read_text().split())
        except (OSError, ValueError):  # it ended meanwhile
            continue
        delays[thread] = (ran / 1e9, waited / 1e9)
    return delays
