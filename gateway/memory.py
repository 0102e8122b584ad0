"""How much memory models may take together, as this machine or its container has it now.

What our workers hold counts as available here, since it is the pool that shares it out: their mapped weights are page
cache to the system, and the rest is added back. A container's limit counts where it is the smaller one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_MOST_HEADROOM = 1 << 30
_REMEMBERED_S = 0.5  # looking takes some milliseconds, and every change in the pool asks


class Memory:
    """Where the pool learns its capacity.

    Args:
        limit_bytes: what the operator allows; 0 leaves it to the machine.
    """

    def __init__(self, limit_bytes: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._seen: tuple[float, int] | None = None

    def capacity_bytes(self) -> int:
        """Bytes for all models, those that are loaded included."""
        if self._limit_bytes:
            return self._limit_bytes
        now = self._clock()
        if self._seen is None or now - self._seen[0] >= _REMEMBERED_S:
            self._seen = now, self._look()
        return self._seen[1]

    def _look(self) -> int:
        machine = psutil.virtual_memory()
        total, available = machine.total, machine.available
        if (container := _container()) is not None:
            total, available = min(total, container[0]), min(available, container[1])
        return max(available + _held_by_workers() - min(total // 20, _MOST_HEADROOM), 0)


def _held_by_workers() -> int:
    """What our child processes hold that is no page cache."""
    held = 0
    for child in psutil.Process().children(recursive=True):
        try:
            memory = child.memory_info()
        except psutil.Error:  # it has just ended
            continue
        held += memory.rss - getattr(memory, "shared", 0)
    return held


def _container(root: Path = _CGROUP) -> tuple[int, int] | None:
    """A control group's limit (version 2) and what is left of it, in bytes; None without one."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        counts = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        cached = int(counts["file"])
    except (OSError, ValueError, KeyError):
        return None
    return None if limit == "max" else (int(limit), max(int(limit) - used + cached, 0))
