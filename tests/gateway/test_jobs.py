"""Work in threads, seen from the event loop."""

import asyncio
import threading

import pytest

from engines.errors import BadRequest, Cancelled, ServerBusy
from engines.library import Progress
from gateway.jobs import MAX_WAITING, NUM_THREADS, Jobs, Report


async def test_everything_that_was_said_is_heard_before_the_end() -> None:
    """In order, and then what went wrong."""

    def work(report: Report) -> None:
        for name in "abc":
            report(Progress(name))
        raise BadRequest("no")

    jobs = Jobs()
    job = jobs.start(work)
    assert [(await anext(job)).status for _ in range(3)] == ["a", "b", "c"]
    with pytest.raises(BadRequest, match="no"):
        await anext(job)
    await jobs.close()


async def test_a_slow_reader_gets_the_newest_of_each_step() -> None:
    """The thread never waits for it, and what is kept does not grow."""
    done = threading.Event()

    def work(report: Report) -> None:
        report(Progress("first"))
        for number in range(100_000):
            report(Progress("copying", "sha256:x", 100_000, number))
        report(Progress("last"))
        done.set()

    jobs = Jobs()
    job = jobs.start(work)
    assert await asyncio.to_thread(done.wait, 20)
    assert [step async for step in job] == [
        Progress("first"),
        Progress("copying", "sha256:x", 100_000, 99_999),
        Progress("last"),
    ]
    await jobs.close()


async def test_whoever_closes_ends_the_work_and_waits_for_it() -> None:
    """What the work does about it has been done when closing returns."""
    cleaned = threading.Event()

    def work(report: Report) -> None:
        try:
            while True:
                report(Progress("working"))
        except Cancelled:
            cleaned.set()
            raise

    jobs = Jobs()
    job = jobs.start(work)
    assert await anext(job) == Progress("working")
    await job.aclose()
    assert cleaned.is_set()
    await job.aclose()
    await jobs.close()


async def test_closing_all_ends_what_runs_and_starts_nothing_more() -> None:
    """Also what still waits for a thread."""
    started: list[None] = []

    def work(report: Report) -> None:
        started.append(None)
        while True:
            report(Progress("working"))

    jobs = Jobs()
    for _ in range(NUM_THREADS + MAX_WAITING):
        jobs.start(work)
    with pytest.raises(ServerBusy):
        jobs.start(work)
    await jobs.close()
    assert len(started) <= NUM_THREADS
