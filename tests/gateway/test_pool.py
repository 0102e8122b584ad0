"""The pool's life as a diary: what is resident and who waits, after each thing that happens."""

import asyncio
import logging
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_bench import Asking, Bench, turn

from engines.errors import HeadwaterError, ModelLoadFailed, ServerBusy, WorkerCrashed
from engines.request import FOREVER
from gateway.assignment import PATIENCE_S
from gateway.pool import MAX_BACK_OFF_S, QUEUE_FULL, SHUTTING_DOWN
from gateway.residents import Lease, State


async def test_twenty_first_requests_start_one_runner() -> None:
    """A load is shared by everybody who waits for it."""
    bench = Bench(places=32)
    asking = [bench.ask() for _ in range(20)]
    await turn()
    assert repr(bench.pool) == "<Pool [a:starting:0] waiting=20>"
    bench.runners[0].come_up()
    leases = await asyncio.gather(*asking)
    assert repr(bench.pool) == "<Pool [a:ready:20] waiting=0>"
    assert len(bench.runners) == 1
    assert {lease.runner for lease in leases} == {bench.runners[0]}
    assert bench.runners[0].timeout_s == 60.0


async def test_a_lease_says_how_long_it_took_and_whether_a_load_was_part_of_it() -> None:
    """Waiting for a load and waiting for a place are told apart."""
    bench = Bench(places=1)
    asking = bench.ask()
    await turn()
    bench.now = 7.0
    bench.runners[0].come_up()
    first = await asking
    assert (first.waited_s, first.loaded) == (7.0, True)
    asking = bench.ask()
    await turn()
    bench.now = 9.0
    bench.release(first)
    second = await asking
    assert (second.waited_s, second.loaded) == (2.0, False)


async def test_a_caller_leaving_during_the_load_fails_neither_the_load_nor_the_others() -> None:
    """Even when it is the caller who caused the load."""
    bench = Bench()
    first, second = bench.ask(), bench.ask()
    await turn()
    first.cancel()
    await turn()
    assert repr(bench.pool) == "<Pool [a:starting:0] waiting=1>"
    bench.runners[0].come_up()
    await second
    assert repr(bench.pool) == "<Pool [a:ready:1] waiting=0>"
    assert first.cancelled()


async def test_a_load_that_everybody_left_still_ends_as_a_resident() -> None:
    """The model is there for the next request, for its keep-alive."""
    bench = Bench()
    asking = bench.ask()
    await turn()
    asking.cancel()
    await turn()
    bench.runners[0].come_up()
    await turn()
    assert repr(bench.pool) == "<Pool [a:ready:0] waiting=0>"
    await bench.pass_time(301)
    assert repr(bench.pool) == "<Pool [] waiting=0>"


async def test_a_failed_load_reaches_all_who_wait_for_it_and_nobody_else() -> None:
    """Its error is theirs; a load of another model goes on."""
    bench = Bench()
    mine, yours, other = bench.ask("a"), bench.ask("a"), bench.ask("b")
    await turn()
    bench.runners[0].fail(ModelLoadFailed("broken file"))
    await turn()
    assert repr(bench.pool) == "<Pool [b:starting:0] waiting=1>"
    for asking in (mine, yours):
        with pytest.raises(ModelLoadFailed, match="broken file"):
            await asking
    bench.runners[1].come_up()
    await other
    assert bench.runners[0].num_stops > 0


async def test_a_bug_in_a_runner_is_an_error_for_those_who_wait(caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected exception leaves nobody waiting."""
    bench = Bench()
    asking = bench.ask()
    await turn()
    with caplog.at_level(logging.ERROR):
        bench.runners[0].fail(RuntimeError("oops"))
        with pytest.raises(HeadwaterError, match="oops"):
            await asking
    assert repr(bench.pool) == "<Pool [] waiting=0>"
    assert "loading a failed" in caplog.text


async def fail_to_load(bench: Bench, **asked: Any) -> None:
    """One request, whose load fails."""
    asking = bench.ask(**asked)
    await turn()
    bench.runners[-1].fail(ModelLoadFailed("broken file"))
    with pytest.raises(ModelLoadFailed):
        await asking


async def test_repeated_failures_back_off_and_then_are_tried_again() -> None:
    """After the second failure in a row the error is repeated without a load, for a while."""
    bench = Bench()
    await fail_to_load(bench)
    await fail_to_load(bench)
    assert len(bench.runners) == 2
    with pytest.raises(ModelLoadFailed, match="broken file"):
        await bench.ask()
    assert len(bench.runners) == 2
    bench.now += 2.0
    await bench.lease()
    assert len(bench.runners) == 3


async def test_the_back_off_grows_to_a_limit() -> None:
    """However long a model has been failing, it is tried again in time."""
    bench = Bench()
    for _ in range(1100):
        await fail_to_load(bench)
        bench.now += MAX_BACK_OFF_S
    await bench.lease()


async def test_a_served_request_ends_a_row_of_failures() -> None:
    """Failures count in a row only."""
    bench = Bench()
    await fail_to_load(bench)
    bench.release(await bench.lease(keep_alive_s=0))
    await turn()
    await fail_to_load(bench)
    await bench.lease()
    assert repr(bench.pool) == "<Pool [a:ready:1] waiting=0>"


async def test_a_runner_that_crashes_on_every_request_backs_off() -> None:
    """That it loads well is no reason to load it over and over."""
    bench = Bench()
    for _ in range(2):
        lease = await bench.lease()
        lease.runner.crash()
        bench.release(lease)
    with pytest.raises(WorkerCrashed):
        await bench.ask()
    bench.now += 2.0
    await bench.lease()


async def test_failing_options_of_one_client_do_not_refuse_or_stop_what_works_for_others() -> None:
    """A window that does not fit in memory is one client's problem once it has failed twice."""
    bench = Bench()
    await fail_to_load(bench, num_ctx=1_000_000)
    await fail_to_load(bench, num_ctx=1_000_000)
    lease = await bench.lease(num_ctx=4096)
    with pytest.raises(ModelLoadFailed):
        await bench.ask(num_ctx=1_000_000)
    assert repr(bench.pool) == "<Pool [a:ready:1] waiting=0>"
    bench.release(lease)
    await bench.lease(num_ctx=4096)


async def test_a_larger_window_serves_a_smaller_request() -> None:
    """Nothing is reloaded for it."""
    bench = Bench()
    large = await bench.lease(num_ctx=8192)
    small = await bench.lease(num_ctx=2048)
    assert small.resident is large.resident
    assert repr(bench.pool) == "<Pool [a:ready:2] waiting=0>"


async def test_a_smaller_window_is_drained_and_replaced() -> None:
    """The requests that run on it are finished first; nobody new is let in."""
    bench = Bench()
    running = await bench.lease(num_ctx=2048)
    larger, smaller = bench.ask(num_ctx=8192), bench.ask(num_ctx=2048)
    await turn()
    assert repr(bench.pool) == "<Pool [a:ready:1] waiting=2>"
    bench.release(running)
    await turn()
    assert repr(bench.pool) == "<Pool [a:starting:0] waiting=2>"
    bench.runners[-1].come_up()
    await asyncio.gather(larger, smaller)
    assert [runner.key.num_ctx for runner in bench.runners] == [2048, 8192]


async def test_two_windows_asked_for_at_once_are_both_served() -> None:
    """The second does not stop the runner that the first is waiting for, over and over."""
    bench = Bench()
    small, large = bench.ask(num_ctx=2048), bench.ask(num_ctx=8192)
    await turn()
    bench.runners[0].come_up()
    bench.release(await small)
    await turn()
    bench.runners[1].come_up()
    await large
    assert [runner.key.num_ctx for runner in bench.runners] == [2048, 8192]


async def test_earlier_requests_are_served_before_their_runner_is_replaced() -> None:
    """Those that wait for a place on the old one are not overtaken by who needs a new one."""
    bench = Bench(places=1)
    running = await bench.lease(num_ctx=2048)
    waiting, larger = bench.ask(num_ctx=2048), bench.ask(num_ctx=8192)
    await turn()
    bench.release(running)
    bench.release(await waiting)
    await turn()
    bench.runners[1].come_up()
    await larger
    assert len(bench.runners) == 2


async def test_other_load_options_reload_the_model() -> None:
    """Options are fixed when a model is loaded."""
    bench = Bench()
    bench.release(await bench.lease(num_batch=128))
    bench.release(await bench.lease(num_batch=256))
    assert [runner.key.options.num_batch for runner in bench.runners] == [128, 256]
    assert repr(bench.pool) == "<Pool [a:ready:0] waiting=0>"


async def test_a_runner_goes_on_when_whoever_wanted_another_has_left() -> None:
    """A drain ends with its reason."""
    bench = Bench()
    running = await bench.lease(num_ctx=2048)
    larger = bench.ask(num_ctx=8192)
    await turn()
    larger.cancel()
    await turn()
    await bench.lease(num_ctx=2048)
    bench.release(running)
    assert len(bench.runners) == 1


async def test_the_least_recently_used_idle_runner_is_evicted() -> None:
    """By when its last request ended, not by when it was loaded."""
    bench = Bench(max_residents=2)
    first, second = await bench.lease("a"), await bench.lease("b")
    bench.now = 1.0
    bench.release(second)
    bench.now = 2.0
    bench.release(first)
    await bench.lease("c")
    assert repr(bench.pool) == "<Pool [a:ready:0 c:ready:1] waiting=0>"


async def test_a_busy_runner_is_not_evicted() -> None:
    """However long ago it was used last."""
    bench = Bench(max_residents=2)
    await bench.lease("a")
    bench.now = 5.0
    bench.release(await bench.lease("b"))
    await bench.lease("c")
    assert repr(bench.pool) == "<Pool [a:ready:1 c:ready:1] waiting=0>"


async def test_pinned_runners_are_evicted_last() -> None:
    """An infinite keep-alive outlasts idleness, and gives way only when nothing else can."""
    bench = Bench(max_residents=2)
    bench.release(await bench.lease("pinned", keep_alive_s=FOREVER))
    bench.now = 5.0
    bench.release(await bench.lease("b"))
    bench.release(await bench.lease("c"))
    assert repr(bench.pool) == "<Pool [pinned:ready:0 c:ready:0] waiting=0>"
    await bench.lease("c")
    await bench.lease("d")
    assert repr(bench.pool) == "<Pool [c:ready:1 d:ready:1] waiting=0>"


async def test_one_eviction_at_a_time_makes_room_for_one() -> None:
    """While room is on its way nothing else is stopped, and who came first gets it."""
    bench = Bench(max_residents=2, stops_slowly=True)
    bench.release(await bench.lease("a"))
    bench.now = 1.0
    bench.release(await bench.lease("b"))
    asking = [bench.ask("c"), bench.ask("c")]
    await turn()
    assert repr(bench.pool) == "<Pool [a:stopping:0 b:ready:0] waiting=2>"
    bench.runners[0].go()
    await turn()
    assert repr(bench.pool) == "<Pool [b:ready:0 c:starting:0] waiting=2>"
    bench.runners[2].come_up()
    await asyncio.gather(*asking)


async def test_a_slow_stop_holds_up_nobody_else() -> None:
    """Runners end outside of every decision: others are granted places, loaded and stopped meanwhile."""
    bench = Bench(stops_slowly=True)
    bench.release(await bench.lease("slow", keep_alive_s=0))
    bench.release(await bench.lease("a"))
    await bench.lease("a")
    bench.release(await bench.lease("b", keep_alive_s=0))
    assert repr(bench.pool) == "<Pool [slow:stopping:0 a:ready:1 b:stopping:0] waiting=0>"
    bench.runners[2].go()
    await turn()
    assert repr(bench.pool) == "<Pool [slow:stopping:0 a:ready:1] waiting=0>"


async def test_keep_alive_zero_answers_and_then_stops() -> None:
    """The request that says 0, and causes the load, is served before its runner goes."""
    bench = Bench()
    lease = await bench.lease(keep_alive_s=0)
    assert repr(bench.pool) == "<Pool [a:ready:1] waiting=0>"
    bench.release(lease)
    await turn()
    assert repr(bench.pool) == "<Pool [] waiting=0>"
    assert len(bench.runners) == 1


async def test_keep_alive_zero_does_not_stop_a_runner_that_others_wait_for() -> None:
    """The next in the queue gets the place; the runner goes after the last."""
    bench = Bench(places=1)
    first = await bench.lease(keep_alive_s=0)
    asking = bench.ask()
    await turn()
    bench.release(first)
    bench.release(await asking)
    await turn()
    assert repr(bench.pool) == "<Pool [] waiting=0>"
    assert len(bench.runners) == 1


async def test_a_request_without_keep_alive_leaves_the_residents_value() -> None:
    """It does not go back to the default (spec/ollama.md section 12)."""
    bench = Bench()
    bench.release(await bench.lease(keep_alive_s=1000))
    bench.release(await bench.lease())
    await bench.pass_time(999)
    assert repr(bench.pool) == "<Pool [a:ready:0] waiting=0>"
    await bench.pass_time(1)
    assert repr(bench.pool) == "<Pool [] waiting=0>"


async def test_a_request_with_keep_alive_replaces_the_residents_value() -> None:
    """Also one that is shorter than what it replaces."""
    bench = Bench()
    bench.release(await bench.lease(keep_alive_s=FOREVER))
    bench.release(await bench.lease(keep_alive_s=10))
    await bench.pass_time(10)
    assert repr(bench.pool) == "<Pool [] waiting=0>"


async def test_idleness_counts_from_the_end_of_the_last_request() -> None:
    """A long request does not use up the keep-alive."""
    bench = Bench()
    lease = await bench.lease()
    await bench.pass_time(1000)
    bench.release(lease)
    await bench.pass_time(299)
    assert repr(bench.pool) == "<Pool [a:ready:0] waiting=0>"
    await bench.pass_time(1)
    assert repr(bench.pool) == "<Pool [] waiting=0>"


async def test_an_idle_runner_expires_by_itself() -> None:
    """On the real clock, with nobody asking."""
    bench = Bench(clock=time.monotonic)
    bench.release(await bench.lease(keep_alive_s=0.01))
    async with asyncio.timeout(10):
        await bench.runners[0].stopping.wait()
    assert bench.runners[0].num_stops == 1


async def test_a_pinned_runner_never_expires() -> None:
    """Not in a hundred years."""
    bench = Bench()
    bench.release(await bench.lease(keep_alive_s=FOREVER))
    await bench.pass_time(100 * 365 * 86400)
    assert repr(bench.pool) == "<Pool [a:ready:0] waiting=0>"


async def test_places_are_limited_and_given_in_order_of_arrival() -> None:
    """Whoever came first goes first."""
    bench = Bench(places=1)
    running = await bench.lease()
    asking = [bench.ask() for _ in range(3)]
    await turn()
    assert repr(bench.pool) == "<Pool [a:ready:1] waiting=3>"
    for position, task in enumerate(asking):
        bench.release(running)
        await turn()
        assert [t.done() for t in asking] == [n <= position for n in range(3)]
        running = task.result()


async def test_a_full_queue_refuses_at_once_and_leaves_everybody_else_alone() -> None:
    """Those that run go on, those that wait are served, and what has a free place is granted."""
    bench = Bench(places=1, max_waiting=1)
    running = await bench.lease("a")
    idle = await bench.lease("b")
    bench.release(idle)
    waiting = bench.ask("a")
    await turn()
    with pytest.raises(ServerBusy) as refusal:
        await bench.ask("a")
    assert refusal.value.message == QUEUE_FULL
    assert refusal.value.retry_after_s >= 1
    await bench.lease("b")
    bench.release(running)
    await waiting


async def test_who_is_refused_evicts_nobody() -> None:
    """A crowd that does not fit in the queue cannot empty the house."""
    bench = Bench(max_residents=2, places=1, max_waiting=1)
    await bench.lease("a")
    bench.release(await bench.lease("b"))
    waiting = bench.ask("a")
    await turn()
    with pytest.raises(ServerBusy):
        await bench.ask("c")
    await turn()
    assert repr(bench.pool) == "<Pool [a:ready:1 b:ready:0] waiting=1>"
    waiting.cancel()


async def test_when_all_stay_busy_the_least_recently_used_one_drains_after_a_while() -> None:
    """A model in constant use does not keep another out for ever."""
    bench = Bench(max_residents=1, places=2)
    first = await bench.lease("a")
    other = bench.ask("b")
    await bench.pass_time(PATIENCE_S - 1)
    second = await bench.lease("a")
    await bench.pass_time(1)
    late = bench.ask("a")
    await turn()
    bench.release(first)
    await turn()
    assert repr(bench.pool) == "<Pool [a:ready:1] waiting=2>"
    bench.release(second)
    await turn()
    assert repr(bench.pool) == "<Pool [b:starting:0] waiting=2>"
    bench.runners[1].come_up()
    await other
    late.cancel()


async def test_pinned_runners_drain_last_too() -> None:
    """Patience runs out for the others first."""
    bench = Bench(max_residents=2)
    pinned = await bench.lease("pinned", keep_alive_s=FOREVER)
    bench.now = 1.0
    running = await bench.lease("b")
    other = bench.ask("c")
    await bench.pass_time(PATIENCE_S)
    bench.release(running)
    await turn()
    assert repr(bench.pool) == "<Pool [pinned:ready:1 c:starting:0] waiting=1>"
    bench.release(pinned)
    other.cancel()


async def test_the_pool_wakes_itself_when_patience_ends() -> None:
    """With nobody asking or leaving."""
    bench = Bench(max_residents=1)
    await bench.lease("a")
    asking = bench.ask("b")
    await turn()
    assert bench.pool._timer is not None
    due_s = bench.pool._timer.when() - asyncio.get_running_loop().time()
    assert due_s == pytest.approx(PATIENCE_S, abs=1)
    asking.cancel()
    await turn()
    assert bench.pool._timer is None


async def test_a_crash_removes_the_runner_and_the_next_request_starts_another() -> None:
    """Its leases are given back without harm."""
    bench = Bench()
    lease = await bench.lease()
    lease.runner.crash()
    await turn()
    assert repr(bench.pool) == "<Pool [] waiting=0>"
    bench.release(lease)
    again = await bench.lease()
    assert again.runner is not lease.runner
    assert repr(bench.pool) == "<Pool [a:ready:1] waiting=0>"


async def test_those_that_wait_for_a_place_on_a_crashed_runner_get_a_new_one() -> None:
    """The crash is an error only for the requests that were running."""
    bench = Bench(places=1)
    lease = await bench.lease()
    asking = bench.ask()
    await turn()
    lease.runner.crash()
    bench.release(lease)
    await turn()
    assert repr(bench.pool) == "<Pool [a:starting:0] waiting=1>"
    bench.runners[1].come_up()
    await asking


async def test_a_crash_while_stopping_is_no_crash() -> None:
    """A worker that ends when it is told to has not failed."""
    bench = Bench(stops_slowly=True)
    lease = await bench.lease(keep_alive_s=0)
    bench.release(lease)
    lease.runner.crash()
    assert repr(bench.pool) == "<Pool [a:stopping:0] waiting=0>"
    lease.runner.go()
    await turn()
    assert repr(bench.pool) == "<Pool [] waiting=0>"


async def test_unload_while_busy_stops_after_the_last_release() -> None:
    """Running requests are finished."""
    bench = Bench()
    first, second = await bench.lease(), await bench.lease()
    bench.pool.unload("a")
    bench.release(first)
    await turn()
    assert repr(bench.pool) == "<Pool [a:ready:1] waiting=0>"
    bench.release(second)
    await turn()
    assert repr(bench.pool) == "<Pool [] waiting=0>"


async def test_unload_stops_an_idle_runner_and_no_other_model() -> None:
    """At once."""
    bench = Bench()
    bench.release(await bench.lease("a", keep_alive_s=FOREVER))
    bench.release(await bench.lease("b"))
    bench.pool.unload("a")
    await turn()
    assert repr(bench.pool) == "<Pool [b:ready:0] waiting=0>"


async def test_unload_during_a_load_serves_who_waits_and_then_stops() -> None:
    """Requests that came before the unload are not loaded for twice."""
    bench = Bench()
    asking = bench.ask()
    await turn()
    bench.pool.unload("a")
    bench.runners[0].come_up()
    bench.release(await asking)
    await turn()
    assert repr(bench.pool) == "<Pool [] waiting=0>"
    assert len(bench.runners) == 1


async def test_unload_of_what_is_not_loaded_does_nothing() -> None:
    """It is a success."""
    bench = Bench()
    bench.pool.unload("a")
    assert repr(bench.pool) == "<Pool [] waiting=0>"


async def test_close_refuses_who_waits_and_stops_everything() -> None:
    """What runs, what idles, and what is still starting."""
    bench = Bench(places=1)
    lease = await bench.lease("busy")
    bench.release(await bench.lease("idle"))
    loading, waiting = bench.ask("loading"), bench.ask("busy")
    await turn()
    await bench.pool.close()
    for asking in (loading, waiting):
        with pytest.raises(ServerBusy, match=SHUTTING_DOWN):
            await asking
    assert repr(bench.pool) == "<Pool [] waiting=0>"
    assert all(runner.num_stops for runner in bench.runners)
    bench.release(lease)
    with pytest.raises(ServerBusy, match=SHUTTING_DOWN):
        await bench.ask("busy")
    assert repr(bench.pool) == "<Pool [] waiting=0>"


async def test_close_waits_for_what_is_already_stopping() -> None:
    """When it returns, nothing is left."""
    bench = Bench(stops_slowly=True)
    bench.release(await bench.lease(keep_alive_s=0))
    closing = asyncio.create_task(bench.pool.close())
    await turn()
    assert not closing.done()
    bench.runners[0].go()
    await closing
    assert bench.runners[0].num_stops == 1


async def test_close_in_the_instant_of_a_grant_leaves_the_lease_good() -> None:
    """A future that has its result is not touched again."""
    bench = Bench()
    asking = bench.ask()
    await turn()
    bench.runners[0].come_up()
    await asyncio.sleep(0)  # granted now
    await bench.pool.close()
    bench.release(await asking)
    assert repr(bench.pool) == "<Pool [] waiting=0>"


async def test_a_caller_who_leaves_in_the_instant_of_the_grant_gives_the_place_back() -> None:
    """Between the grant and the caller's next step."""
    bench = Bench()
    asking = bench.ask()
    await turn()
    bench.runners[0].come_up()
    await asyncio.sleep(0)
    assert repr(bench.pool) == "<Pool [a:ready:1] waiting=0>"
    asking.cancel()
    await turn()
    assert asking.cancelled()
    assert repr(bench.pool) == "<Pool [a:ready:0] waiting=0>"


async def test_statuses_tell_when_each_runner_goes() -> None:
    """Idle ones by their clock, busy ones as if they ended now, pinned ones never."""
    bench = Bench()
    bench.release(await bench.lease("idle"))
    await bench.lease("busy", keep_alive_s=50)
    await bench.lease("pinned", keep_alive_s=FOREVER)
    bench.now = 100.0
    wall = time.time()
    statuses = {status.model.name: status for status in bench.pool.statuses()}
    assert statuses["idle"].expires_at == pytest.approx(wall + 200, abs=5)
    assert statuses["busy"].expires_at == pytest.approx(wall + 50, abs=5)
    assert statuses["pinned"].expires_at == FOREVER
    assert [(s.num_active, s.num_ctx, s.state) for s in statuses.values()] == [
        (0, 4096, "ready"),
        (1, 4096, "ready"),
        (1, 4096, "ready"),
    ]


# What may happen, in any order. Positions choose among what there is at that moment.
_position = st.integers(0, 7)
_happenings = st.one_of(
    st.tuples(
        st.just("ask"),
        st.sampled_from("abc"),
        st.sampled_from([None, 0, 5, FOREVER]),
        st.sampled_from([2048, 8192]),
        st.sampled_from([None, 256]),
    ),
    st.tuples(st.sampled_from(["cancel", "release", "crash", "up", "fail", "gone"]), _position),
    st.tuples(st.just("unload"), st.sampled_from("abc")),
    st.tuples(st.just("time"), st.sampled_from([0.1, 3.0, 11.0, 400.0])),
)


class World(Bench):
    """A bench with everybody on it."""

    def __init__(self) -> None:
        super().__init__(max_residents=2, places=2, max_waiting=4, stops_slowly=True)
        self.asking: list[Asking] = []
        self.leases: list[Lease[Any]] = []

    def happen(self, what: str, *details: Any) -> None:
        """One thing, without letting anything follow from it yet."""
        match what, *details:
            case "ask", model, keep_alive_s, num_ctx, num_batch:
                self.asking.append(self.ask(model, keep_alive_s, num_ctx, num_batch=num_batch))
            case "unload", model:
                self.pool.unload(model)
            case "time", seconds:
                self.now += seconds
                self.pool._settle()
            case "cancel", position if self.asking:
                self.asking[position % len(self.asking)].cancel()
            case "release", position if self.leases:
                self.release(self.leases.pop(position % len(self.leases)))
            case _, position if self.runners:
                runner = self.runners[position % len(self.runners)]
                effects = {"up": runner.come_up, "gone": runner.go, "crash": runner.crash}
                effects.get(what, lambda: runner.fail(ModelLoadFailed("failed")))()

    async def follow(self) -> None:
        """Let everything follow, and collect what was granted."""
        await turn()
        for task in [task for task in self.asking if task.done()]:
            self.asking.remove(task)
            if task.cancelled():
                continue
            error = task.exception()
            assert error is None or isinstance(error, HeadwaterError), error
            if error is None:
                self.leases.append(task.result())

    def check(self) -> None:
        """What holds whenever nothing is about to happen."""
        pool = self.pool
        assert len(pool.residents) <= 2
        assert len(pool.waiting) == len(self.asking) <= 4
        for resident in pool.residents:
            assert resident.num_active == sum(lease.resident is resident for lease in self.leases) <= 2
            assert resident.state is State.READY or resident.num_active == 0
        for waiter in pool.waiting:
            assert not pool._assignment.open_to(waiter.key), "a free place, and a request that waits for it"

    async def wind_down(self) -> None:
        """Everything comes up, nobody stays: then everybody must be served, and closing must leave nothing."""
        for _ in range(60):
            for runner in self.runners:
                runner.come_up()
                runner.go()
            while self.leases:
                self.release(self.leases.pop())
            self.now += 40.0
            self.pool._settle()
            await self.follow()
        assert not self.asking, f"somebody waits for ever: {self.pool}"
        self.stops_slowly = False
        await self.pool.close()
        assert self.pool.residents == []
        assert all(runner.num_stops for runner in self.runners)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(_happenings, min_size=1, max_size=4), max_size=40))
def test_whatever_happens_no_place_leaks_and_nobody_waits_for_ever(batches: list[list[tuple[Any, ...]]]) -> None:
    """Callers come and go at every await, runners come up, fail, crash and are slow to go, and time passes."""

    async def live() -> None:
        world = World()
        for batch in batches:
            for happening in batch:
                world.happen(*happening)
            await world.follow()
            world.check()
        await world.wind_down()

    asyncio.run(live())


async def test_close_is_harmless_when_done_twice() -> None:
    """The second has nothing to do."""
    bench = Bench()
    await bench.lease()
    await bench.pool.close()
    await bench.pool.close()
    assert bench.runners[0].num_stops == 1
