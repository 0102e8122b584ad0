"""Models share the memory there is: who fits, who goes, who is refused, and what is learned."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pool_bench import Asking, Bench, FakeRunner, turn

from engines.errors import ModelLoadFailed, OutOfMemory, WorkerKilled
from engines.model import ModelCard
from engines.request import FOREVER
from gateway import memory
from gateway.assignment import PATIENCE_S
from gateway.memory import Memory
from gateway.residents import Lease, RunnerKey

GIB = 1 << 30


class Machine(Bench):
    """A bench with so much memory; a model `a5` takes 5 with one window, and one more for each further window."""

    def __init__(self, capacity: int, max_windows: int = 1, **numbers: Any) -> None:
        self.capacity = capacity
        self.max_windows = max_windows
        super().__init__(
            **{"max_residents": 10, "measure": self._measure, "capacity": lambda: self.capacity * GIB, **numbers}
        )

    async def _measure(self, key: RunnerKey, card: ModelCard) -> Mapping[int, int]:
        size = int(card.name.lstrip("abcdefgh") or 0)
        return {n: (size + n - 1) * GIB for n in range(1, self.max_windows + 1)} if size else {}


async def test_models_that_fit_together_stay() -> None:
    """Up to the last byte."""
    machine = Machine(10)
    machine.release(await machine.lease("a4"))
    machine.release(await machine.lease("b6"))
    assert repr(machine.pool) == "<Pool [a4:ready:0 b6:ready:0] waiting=0>"


async def test_the_least_recently_used_idle_model_makes_room() -> None:
    """As few as are needed, and those first that were used longest ago."""
    machine = Machine(10)
    for model in ("a3", "b3", "c3"):
        machine.release(await machine.lease(model))
        machine.now += 1
    asking = machine.ask("d5")
    await turn()
    assert repr(machine.pool) == "<Pool [c3:ready:0 d5:starting:0] waiting=1>"
    asking.cancel()


async def test_a_pinned_model_goes_last() -> None:
    """Even when it was used longest ago."""
    machine = Machine(10)
    machine.release(await machine.lease("a4", keep_alive_s=FOREVER))
    machine.now += 1
    machine.release(await machine.lease("b4"))
    asking = machine.ask("c4")
    await turn()
    assert repr(machine.pool) == "<Pool [a4:ready:0 c4:starting:0] waiting=1>"
    asking.cancel()


async def test_nothing_is_evicted_when_that_would_not_be_enough() -> None:
    """A busy model holds the rest; when it is done, both go."""
    machine = Machine(10)
    machine.release(await machine.lease("a2"))
    busy = await machine.lease("b6")
    asking = machine.ask("c9")
    await turn()
    assert repr(machine.pool) == "<Pool [a2:ready:0 b6:ready:1] waiting=1>"
    machine.release(busy)
    await turn()
    assert repr(machine.pool) == "<Pool [c9:starting:0] waiting=1>"
    asking.cancel()


async def test_a_busy_model_takes_no_new_work_after_a_while() -> None:
    """Who waits for memory must not wait for ever."""
    machine = Machine(10)
    busy = await machine.lease("a6")
    asking = machine.ask("b6")
    await machine.pass_time(PATIENCE_S)
    assert machine.pool.residents[0].is_draining
    machine.release(busy)
    await turn()
    assert repr(machine.pool) == "<Pool [b6:starting:0] waiting=1>"
    asking.cancel()


async def test_a_need_beyond_the_machine_is_refused_with_both_numbers_before_anything_happens() -> None:
    """Nothing is evicted for what cannot be, and nothing is started; the next request may be luckier."""
    machine = Machine(10)
    machine.release(await machine.lease("a2"))
    with pytest.raises(OutOfMemory, match=r"requires more system memory \(11.0 GiB\) than is available \(10.0 GiB\)"):
        await machine.ask("b11")
    assert repr(machine.pool) == "<Pool [a2:ready:0] waiting=0>"
    machine.capacity = 20
    await machine.lease("b11")


async def test_memory_that_others_take_counts() -> None:
    """What is there is asked anew for each decision."""
    machine = Machine(10)
    machine.capacity = 4
    with pytest.raises(OutOfMemory, match=r"\(5.0 GiB\) than is available \(4.0 GiB\)"):
        await machine.ask("a5")


async def test_windows_shrink_before_anyone_is_evicted(caplog: pytest.LogCaptureFixture) -> None:
    """As many as fit beside what is there, which the log tells."""
    machine = Machine(10, max_windows=4)
    machine.release(await machine.lease("a3"))
    assert machine.runners[0].num_windows == 4
    with caplog.at_level(logging.WARNING):
        machine.release(await machine.lease("b2"))
    assert machine.runners[1].num_windows == 3
    assert "b2 gets room for 3 windows instead of 4, since memory is short" in caplog.text
    machine.release(await machine.lease("c1", keep_alive_s=0))
    assert [runner.num_windows for runner in machine.runners] == [4, 3, 4]


async def test_one_window_is_the_least() -> None:
    """And what the refusal counts with."""
    machine = Machine(5, max_windows=4)
    await machine.lease("a5")
    assert machine.runners[0].num_windows == 1
    with pytest.raises(OutOfMemory, match=r"\(6.0 GiB\)"):
        await machine.ask("b6")


async def test_what_a_runner_was_seen_to_take_counts_once_it_has_worked() -> None:
    """A model that takes less than expected leaves room for another."""
    machine = Machine(10)
    lease = await machine.lease("a6")
    lease.runner.size_bytes = 4 * GIB
    assert lease.resident.size_bytes == 6 * GIB
    machine.release(lease)
    assert lease.resident.size_bytes == 4 * GIB
    machine.release(await machine.lease("b6"))
    assert repr(machine.pool) == "<Pool [a6:ready:0 b6:ready:0] waiting=0>"


async def test_the_next_estimate_of_a_model_is_corrected_by_the_last_runner() -> None:
    """Half and double are the most that one measurement is believed."""
    machine = Machine(10)
    for size, expected in [(8, 8), (4, 4), (100, 12), (1, 3)]:
        lease = await machine.lease("a6")
        lease.runner.size_bytes = size * GIB
        machine.release(lease)
        machine.pool.unload("a6")
        await turn()
        assert await machine.pool._sizes(lease.resident.key, lease.resident.card) == {1: expected * GIB}
        machine.capacity = 100


async def test_models_that_nobody_can_measure_are_loaded() -> None:
    """An unknown size is no reason to refuse, and their runner chooses its windows."""
    machine = Machine(1)
    await machine.lease("a")
    assert machine.runners[0].num_windows is None


@pytest.mark.parametrize("error", [OutOfMemory("no room"), WorkerKilled("killed")])
async def test_a_load_that_runs_out_of_memory_evicts_and_is_tried_once_more(error: ModelLoadFailed) -> None:
    """Whoever is idle goes, whatever the numbers say, and the callers notice a longer load."""
    machine = Machine(10)
    machine.release(await machine.lease("a2"))
    machine.release(await machine.lease("b2"))
    first, second = machine.ask("c2"), machine.ask("c2")
    await turn()
    machine.runners[2].fail(error)
    await turn()
    assert repr(machine.pool) == "<Pool [c2:starting:0] waiting=2>"
    assert len(machine.runners) == 4
    machine.runners[3].come_up()
    assert (await first).runner is (await second).runner is machine.runners[3]


async def test_a_second_failure_is_final() -> None:
    """All who waited get the error."""
    machine = Machine(10)
    machine.release(await machine.lease("a2"))
    asking = machine.ask("c2")
    await turn()
    machine.runners[1].fail(OutOfMemory("no room"))
    await turn()
    another = machine.ask("a2")
    await turn()
    machine.runners[3].come_up()
    machine.release(await another)
    machine.runners[2].fail(OutOfMemory("no room at all"))
    with pytest.raises(OutOfMemory, match="no room at all"):
        await asking
    assert len(machine.runners) == 4


async def test_without_anyone_to_evict_there_is_no_second_try() -> None:
    """It would end alike."""
    machine = Machine(10)
    busy = await machine.lease("a2")
    asking = machine.ask("c2")
    await turn()
    machine.runners[1].fail(OutOfMemory("no room"))
    with pytest.raises(OutOfMemory):
        await asking
    machine.release(busy)
    assert len(machine.runners) == 2


async def test_other_failures_are_not_tried_again() -> None:
    """A broken file stays broken."""
    machine = Machine(10)
    machine.release(await machine.lease("a2"))
    asking = machine.ask("c2")
    await turn()
    machine.runners[1].fail(ModelLoadFailed("broken"))
    with pytest.raises(ModelLoadFailed):
        await asking
    assert repr(machine.pool) == "<Pool [a2:ready:0] waiting=0>"


@hypothesis_settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["a1", "b2", "c3", "d5", "e8", "f11"]), st.booleans()), max_size=25))
def test_the_residents_never_need_more_than_there_is(asked: list[tuple[str, bool]]) -> None:
    """Whoever asks for what in any order, and everybody is served or refused."""

    async def live() -> None:
        machine = Machine(10, max_windows=3)
        waiting: list[Asking] = []
        leases: list[Lease[FakeRunner]] = []
        for model, stays in [*asked, *[("a1", False)] * 3 * len(asked)]:
            waiting.append(machine.ask(model))
            for _ in range(3):
                await turn()
                for runner in machine.runners:
                    runner.come_up()
                assert sum(resident.need_bytes for resident in machine.pool.residents) <= 10 * GIB
            done = [task for task in waiting if task.done()]
            waiting = [task for task in waiting if not task.done()]
            leases += [task.result() for task in done if task.exception() is None]
            while leases and not stays:
                machine.release(leases.pop())
            await machine.pass_time(PATIENCE_S)
        assert waiting == []
        await machine.pool.close()

    asyncio.run(live())


def test_a_limit_is_the_capacity() -> None:
    """Whatever the machine has."""
    assert Memory(123).capacity_bytes() == 123


def test_the_machine_is_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for every change in the pool."""
    now, looks = [0.0], count(1)
    found = Memory(clock=lambda: now[0])
    monkeypatch.setattr(found, "_look", lambda: next(looks))
    assert [found.capacity_bytes(), found.capacity_bytes()] == [1, 1]
    now[0] = 0.6
    assert found.capacity_bytes() == 2


def test_capacity_is_less_than_the_machine_and_more_than_nothing() -> None:
    """Some is left for everything else."""
    assert 0 < Memory().capacity_bytes() < psutil.virtual_memory().total


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    """What its page cache holds can be had."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 200\n")
    assert memory._container(tmp_path) == (1000, 500)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container(tmp_path) is None
    assert memory._container(tmp_path / "absent") is None
