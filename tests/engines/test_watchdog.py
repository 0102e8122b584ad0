from __future__ import annotations

from engines.watchdog import Patience, step_limit_s


def patience(step_limit_s: float = 3.0, loop_limit_s: float = 5.0) -> Patience:
    """One that looks once a second."""
    return Patience(step_limit_s=step_limit_s, loop_limit_s=loop_limit_s, interval_s=1.0)


def test_work_without_steps_is_a_verdict_after_the_limit() -> None:
    """And it names how long and how much."""
    watch = patience()
    said = [watch.look(num_busy=2, steps=7, beats=beats) for beats in range(4)]
    assert said == [None, None, None, "no step has finished for 3 s, with 2 requests in hand"]


def test_a_step_now_and_then_is_enough() -> None:
    """Slow is not stuck."""
    watch = patience()
    assert all(watch.look(num_busy=1, steps=second // 3, beats=second) is None for second in range(100))


def test_idle_workers_need_no_steps() -> None:
    """Nothing to do is no hanging."""
    watch = patience()
    assert all(watch.look(num_busy=0, steps=0, beats=second) is None for second in range(100))


def test_a_silent_event_loop_is_a_verdict_even_without_work() -> None:
    """Nobody could bring it any."""
    watch = patience()
    said = [watch.look(num_busy=0, steps=0, beats=0) for _ in range(6)]
    assert said[:5] == [None] * 5
    assert said[5] == "the event loop has been stuck for 5 s"


def test_without_a_limit_there_is_no_verdict() -> None:
    """Whoever says so waits for ever."""
    watch = patience(step_limit_s=float("inf"), loop_limit_s=float("inf"))
    assert all(watch.look(num_busy=1, steps=0, beats=0) is None for _ in range(1000))


def test_large_models_may_take_longer() -> None:
    """Half a minute for each gigabyte."""
    assert step_limit_s(120, 0) == 120
    assert step_limit_s(120, 40 * 10**9) == 1320
