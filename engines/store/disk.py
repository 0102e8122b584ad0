"""Threads for what blocks on a disk for long, apart from those in which the rest of the server looks things up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_NUM_THREADS = 4


class Disk:
    """Runs functions in threads of its own, so that a slow disk holds up nobody who does not need it."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "disk")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result. A cancellation waits until the thread has let go of what it was given.

        Otherwise a file could be closed, and its number belong to another one, while the thread still writes to it.
        """
        loop = asyncio.get_running_loop()
        working = loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            await asyncio.wait({working})
            raise

    def close(self) -> None:
        """Wait for what still runs."""
        self._threads.shutdown()
