"""What tests ask of processes that they started."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PATIENCE_S = 20.0


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something that other processes do has happened."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


async def eventually_async(condition: Callable[[], bool]) -> None:
    """The same without holding up the event loop."""
    await asyncio.to_thread(eventually, condition)


def pid_in(path: Path) -> int:
    """The process id that a child writes into a file once it is ready."""
    eventually(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())
