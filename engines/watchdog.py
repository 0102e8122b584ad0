"""Ends a worker that hangs: one that has work and finishes no step, or whose event loop has stopped turning.

A request that waits for ever is worse than one that fails. The stacks of all threads go to stderr, where the parent
keeps them, and the process ends with a status of its own. Patience is counted in looks and not by the clock, so that a
machine that was asleep wakes up to no verdict. Its limit: it runs in Python, so code that never lets go of the
interpreter's lock stops it too; that is noticed by the parent, to whom the worker no longer answers.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import threading
import time

from engines.inference import InferenceBackend

EXIT_HUNG = 5
HUNG_PREFIX = "watchdog: "
INTERVAL_S = 1.0
LOOP_LIMIT_S = 60.0
_GRACE_FOR_SIZE_S = 30.0
"""Further seconds for each gigabyte of weights: a step of a large model on a slow machine may take minutes."""


class Patience:
    """How long nothing has moved. Pure: it is told what there is to see, once every `interval_s`.

    Args:
        step_limit_s: the longest step. loop_limit_s: the longest that the event loop may be silent.
    """

    def __init__(self, *, step_limit_s: float, loop_limit_s: float, interval_s: float = INTERVAL_S) -> None:
        self._step_limit = step_limit_s / interval_s
        self._loop_limit = loop_limit_s / interval_s
        self._interval_s = interval_s
        self._steps = self._beats = -1.0
        self._still = self._silent = 0

    def look(self, *, num_busy: int, steps: float, beats: float) -> str | None:
        """Take note of the work there is, of the steps done and of the event loop's turns; what hangs, if anything."""
        self._still = self._still + 1 if num_busy and steps == self._steps else 0
        self._silent = self._silent + 1 if beats == self._beats else 0
        self._steps, self._beats = steps, beats
        if self._silent >= self._loop_limit:
            return f"the event loop has been stuck for {self._silent * self._interval_s:g} s"
        if self._still >= self._step_limit:
            return f"no step has finished for {self._still * self._interval_s:g} s, with {num_busy} requests in hand"
        return None


def step_limit_s(limit_s: float, size_bytes: int) -> float:
    """The longest step of a model whose weights have that size."""
    return limit_s + _GRACE_FOR_SIZE_S * size_bytes / 1e9


def watch(engine: InferenceBackend, events: asyncio.AbstractEventLoop, patience: Patience) -> None:
    """Start watching; the thread ends with the process."""
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1

    def run() -> None:
        while not events.is_closed():
            time.sleep(INTERVAL_S)
            stats = engine.stats()
            num_busy = stats.num_running + stats.num_waiting if "steps" in stats.totals else 0
            verdict = patience.look(num_busy=num_busy, steps=stats.totals.get("steps", 0), beats=beats)
            if verdict is not None:
                _end(verdict)
            if not events.is_closed():
                events.call_soon_threadsafe(beat)

    threading.Thread(target=run, name="watchdog", daemon=True).start()


def _end(verdict: str) -> None:
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    sys.stderr.write(f"{HUNG_PREFIX}{verdict}\n")  # last, for the parent keeps the end
    sys.stderr.flush()
    os._exit(EXIT_HUNG)
