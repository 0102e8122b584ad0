"""Long work in threads, seen from the event loop as an iterator of how far it is.

The thread never waits for whoever reads: what is not read in time is replaced by what is newer of the same step, so a
client that stops reading holds up nothing and costs no memory. Its surprise: closing the iterator ends the work at its
next word, and waits for that, so that what it would have left behind is gone when the caller goes on.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from engines.errors import Cancelled, ServerBusy
from engines.library import Progress

Report = Callable[[Progress], None]
Work = Callable[[Report], None]

NUM_THREADS = 8
MAX_WAITING = 64


class Jobs:
    """Threads for work that takes seconds to hours, apart from those in which the server looks things up."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, "job")
        self._open: set[Job] = set()

    def start(self, work: Work) -> Job:
        """Run `work` as soon as a thread is free. Raises ServerBusy when too many wait already."""
        if len(self._open) >= NUM_THREADS + MAX_WAITING:
            raise ServerBusy("too many models are being made")
        job = Job(self._threads, work, self._open)
        self._open.add(job)
        return job

    async def close(self) -> None:
        """End all work and wait for its end."""
        await asyncio.gather(*(job.aclose() for job in [*self._open]))
        self._threads.shutdown()


class Job(AsyncIterator[Progress]):
    """One piece of work. Raises what it raises, after everything that it said before."""

    def __init__(self, threads: ThreadPoolExecutor, work: Work, open_jobs: set[Job]) -> None:
        self._loop = asyncio.get_running_loop()
        self._said: dict[tuple[str, str], Progress] = {}
        self._mutex = threading.Lock()
        self._heard = asyncio.Event()
        self._is_unwanted = False
        self._open_jobs = open_jobs
        self._done = self._loop.run_in_executor(threads, lambda: self._run(work))
        self._done.add_done_callback(self._end)

    def _run(self, work: Work) -> None:
        if not self._is_unwanted:  # left before a thread was free
            work(self._report)

    def _report(self, progress: Progress) -> None:
        """Called in the thread. Raises Cancelled when nobody listens any more."""
        if self._is_unwanted:
            raise Cancelled
        with self._mutex:
            step = (progress.status, progress.digest)
            self._said.pop(step, None)  # what is said again moves to the end
            self._said[step] = progress
        self._loop.call_soon_threadsafe(self._heard.set)

    def _end(self, done: asyncio.Future[None]) -> None:
        self._open_jobs.discard(self)
        done.exception()  # seen, whether or not anybody reads on
        self._heard.set()

    async def __anext__(self) -> Progress:
        while True:
            with self._mutex:
                if self._said:
                    return self._said.pop(next(iter(self._said)))
            if self._done.done():
                self._done.result()
                raise StopAsyncIteration
            self._heard.clear()
            if not self._said and not self._done.done():
                await self._heard.wait()

    async def aclose(self) -> None:
        """End the work and wait for its end."""
        self._is_unwanted = True
        await asyncio.wait({self._done})
