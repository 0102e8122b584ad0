"""The handle on real worker processes, whose engine is fake."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_house import DIGEST, ask, describe_model, fake_backend, texts, until, worker_pids

from engines.backend import Backend, BackendConfiguration
from engines.errors import HeadwaterError, ModelLoadFailed, PromptTooLong, ServerBusy, WorkerCrashed, WorkerKilled
from engines.events import ChoiceFinished, Event, Finished, FinishReason, TextDelta, Usage
from engines.request import GenerateRequest, Mode, Sampling
from gateway.runner import Reply, Runner

LONG = " ".join(f"word{n}" for n in range(200))


class Handle:
    """A runner, and what it said of its end."""

    def __init__(self, root: Path, backend: Backend | None = None, mode: Mode = Mode.COMPLETION) -> None:
        self.exits: list[HeadwaterError] = []
        self.runner = Runner(
            backend or fake_backend(root),
            root / "w.sock",
            model=DIGEST,
            model_ref="demo:latest",
            mode=mode,
            config=BackendConfiguration(),
            on_exit=self.exits.append,
        )


Make = Callable[..., Awaitable[Handle]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Starts a runner of a fake model; none is left after the test."""
    handles: list[Handle] = []

    async def start(timeout_s: float = 30.0, **says: Any) -> Handle:
        describe_model(tmp_path, **says)
        handles.append(Handle(tmp_path))
        await handles[-1].runner.start(timeout_s)
        return handles[-1]

    yield start
    for handle in handles:
        await handle.runner.stop()
    assert worker_pids() == []
    assert not (tmp_path / "w.sock").exists()


async def events_of(reply: Reply) -> list[Event]:
    """All of them."""
    return [event async for event in reply]


async def test_a_started_runner_is_ready(make: Make) -> None:
    """It knows what its worker says of itself."""
    runner = (await make(num_ctx=77)).runner
    assert runner.health.num_ctx == 77
    assert runner.health.size_bytes > 0
    assert "headwater_engine_sequences_running 0" in await runner.metrics()
    assert len(worker_pids()) == 1


async def test_an_answer_comes_as_events_and_ends_with_usage_and_timings(make: Make) -> None:
    """Deltas, one finished choice, and the end; usage is true after each."""
    runner = (await make()).runner
    reply = await runner.generate(ask("one two three"))
    assert await anext(reply) == TextDelta("one")
    assert reply.usage == Usage(prompt_tokens=3, completion_tokens=1)
    *rest, finished = await events_of(reply)
    assert rest == [TextDelta(" two"), TextDelta(" three"), ChoiceFinished(FinishReason.STOP)]
    assert isinstance(finished, Finished)
    assert finished.usage == reply.usage == Usage(prompt_tokens=3, completion_tokens=3)
    assert finished.timings.decode_s > 0
    await reply.finish()


async def test_a_raw_prompt_and_a_token_limit_reach_the_worker(make: Make) -> None:
    """What a request says is what the worker does."""
    runner = (await make()).runner
    request = GenerateRequest("req_raw", "demo", ask().origin, prompt="a b c", sampling=Sampling(max_tokens=2))
    *_, finished = await events_of(await runner.generate(request))
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.usage.completion_tokens) == (FinishReason.LENGTH, 2)


async def test_connections_are_used_again(make: Make) -> None:
    """One after the other they need only one, and many at once do not mix."""
    runner = (await make()).runner
    for _ in range(3):
        reply = await runner.generate(ask("one two"))
        await events_of(reply)
        await reply.finish()
    assert len(runner._client._idle) == 1
    replies = await asyncio.gather(*(runner.generate(ask(f"alpha {n} omega")) for n in range(20)))
    said = await asyncio.gather(*(texts(reply) for reply in replies))
    assert ["".join(words) for words in said] == [f"alpha {n} omega" for n in range(20)]


async def test_a_refusal_is_raised_before_anything_is_streamed(make: Make) -> None:
    """With its own class and numbers, and the worker goes on."""
    runner = (await make(num_ctx=3)).runner
    with pytest.raises(PromptTooLong) as refusal:
        await runner.generate(ask("one two three four"))
    assert (refusal.value.prompt_tokens, refusal.value.num_ctx) == (4, 3)
    assert await texts(await runner.generate(ask("one"))) == ["one"]


async def test_cancel_ends_the_request_and_tells_its_cost(make: Make) -> None:
    """What was generated, not what was read; the worker is free afterwards."""
    runner = (await make(tokens_per_s=200)).runner
    reply = await runner.generate(ask(LONG))
    await anext(reply)
    cost = await reply.cancel()
    assert cost is not None
    usage, timings = cost
    assert usage.prompt_tokens == 200
    assert 1 <= usage.completion_tokens < 100
    assert timings.decode_s > 0
    assert "headwater_engine_sequences_running 0" in await runner.metrics()


async def test_cancel_of_what_the_worker_does_not_know_tells_nothing(make: Make) -> None:
    """There is no cost to tell."""
    runner = (await make()).runner
    assert await runner.cancel("req_unknown") is None


async def test_cancel_after_the_end_never_makes_it_cost_more(make: Make) -> None:
    """The worker may have forgotten it already, or tells the truth once more."""
    runner = (await make()).runner
    reply = await runner.generate(ask("one two"))
    await events_of(reply)
    cost = await reply.cancel()
    assert cost is None or cost[0] == reply.usage == Usage(prompt_tokens=2, completion_tokens=2)


async def test_a_failed_load_says_why(tmp_path: Path) -> None:
    """The worker's own words; nothing is left of it."""
    describe_model(tmp_path, fail="tensor 'blk.0' is damaged")
    handle = Handle(tmp_path)
    with pytest.raises(ModelLoadFailed, match=r"^tensor 'blk.0' is damaged"):
        await handle.runner.start(30)
    assert [type(error) for error in handle.exits] == [ModelLoadFailed]
    assert worker_pids() == []


async def test_a_load_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """The error says how long that was; its end is no second event."""
    describe_model(tmp_path, load_s=60)
    handle = Handle(tmp_path)
    with pytest.raises(ModelLoadFailed, match=r"demo:latest was not ready within 0\.5 s"):
        await handle.runner.start(0.5)
    assert handle.exits == []
    assert worker_pids() == []


class Unstartable(Backend):
    """A backend whose program is not there."""

    name = "unstartable"

    def status(self) -> str:
        """Not there."""
        return "Error: binary not found"

    async def run(self, *args: Any) -> None:
        """Fail as the operating system does."""
        raise FileNotFoundError(2, "No such file or directory", "llama-server")


async def test_a_program_that_is_not_there_is_a_failed_load(tmp_path: Path) -> None:
    """The operating system's words are kept."""
    with pytest.raises(ModelLoadFailed, match=r"could not start a worker: .*llama-server"):
        await Handle(tmp_path, Unstartable()).runner.start(30)


async def test_a_worker_killed_in_the_middle_is_an_error_that_says_so(make: Make) -> None:
    """Its end is told once, to whoever owns the runner, before the callers hear of it."""
    handle = await make(tokens_per_s=20)
    replies = [await handle.runner.generate(ask(LONG)) for _ in range(2)]
    for reply in replies:
        await anext(reply)
    (pid,) = worker_pids()
    os.kill(pid, signal.SIGKILL)
    for reply in replies:
        with pytest.raises(WorkerCrashed, match="killed by SIGKILL"):
            await events_of(reply)
        assert reply.usage.completion_tokens >= 1
        assert await reply.cancel() is None
    assert [type(error) for error in handle.exits] == [WorkerKilled]
    with pytest.raises(WorkerCrashed, match="killed by SIGKILL"):
        await handle.runner.generate(ask())


async def test_a_worker_that_crashes_by_itself_is_told_with_its_exit_status(make: Make) -> None:
    """The request that killed it, and the last true usage."""
    runner = (await make(crash_after=2)).runner
    reply = await runner.generate(ask("one two three four"))
    assert await anext(reply) == TextDelta("one")
    assert await anext(reply) == TextDelta(" two")
    with pytest.raises(WorkerCrashed, match="exit status 9"):
        await events_of(reply)
    assert reply.usage.completion_tokens == 2
    reply.close()


async def test_stop_during_the_load_ends_the_start_too(tmp_path: Path) -> None:
    """At once, not when the load's time is over."""
    describe_model(tmp_path, load_s=60)
    handle = Handle(tmp_path)
    starting = asyncio.create_task(handle.runner.start(float("inf")))
    await until(worker_pids)
    await handle.runner.stop()
    with pytest.raises(ModelLoadFailed, match="was stopped while it was loading"):
        await starting
    assert handle.exits == []
    assert worker_pids() == []


async def test_stop_before_the_worker_was_even_started_ends_the_start_too(tmp_path: Path) -> None:
    """A task that never ran is over as well."""
    describe_model(tmp_path)
    handle = Handle(tmp_path)
    starting = asyncio.create_task(handle.runner.start(float("inf")))
    await asyncio.sleep(0)
    await handle.runner.stop()
    with pytest.raises(ModelLoadFailed, match="was stopped"):
        await starting
    await handle.runner.stop()
    assert worker_pids() == []


async def test_after_stop_everything_says_no(make: Make) -> None:
    """Nothing hangs, and nothing starts again."""
    handle = await make()
    await handle.runner.stop()
    assert handle.exits == []
    assert await handle.runner.metrics() == ""
    assert await handle.runner.cancel("req_x") is None
    with pytest.raises(ServerBusy):
        await handle.runner.generate(ask())
    assert worker_pids() == []


async def test_stop_ends_running_requests_as_errors(make: Make) -> None:
    """Nobody waits for ever on a worker that is gone."""
    handle = await make(tokens_per_s=20)
    reply = await handle.runner.generate(ask(LONG))
    reading = asyncio.create_task(events_of(reply))
    await handle.runner.stop()
    with pytest.raises(HeadwaterError):
        await reading
    reply.close()
