from __future__ import annotations

from engines.llamacpp.threads import FIRST_PAUSE_S, LOOK_S, Delays, Threads, thread_delays


class Kernel:
    """Says how long each of the computing threads waited; the test decides which share of the time."""

    def __init__(self, num_threads: int) -> None:
        self._delays = dict.fromkeys(range(num_threads), (0.0, 0.0))

    def pass_time(self, seconds: float, waiting: float, count: int) -> None:
        """Time in which the first `count` threads compute and together wait for `waiting` of it."""
        for thread in range(count):
            ran, waited = self._delays[thread]
            share = waiting / count
            self._delays[thread] = (ran + seconds * (1 - share), waited + seconds * share)

    def __call__(self) -> Delays:
        """What it says now."""
        return dict(self._delays)


class Machine:
    """Cores, of which `busy` are wanted by others, and a clock."""

    def __init__(self, num_cores: int) -> None:
        self.kernel = Kernel(num_cores)
        self.threads = Threads(num_cores, self.kernel)
        self.num_cores = num_cores
        self.busy = 0.0
        self.now = 100.0

    def run(self, seconds: float) -> list[int]:
        """Compute for so long; how many threads did, look by look."""
        counts = []
        for _ in range(round(seconds / LOOK_S)):
            crowded = max(self.threads.count + self.busy - self.num_cores, 0.0)
            self.kernel.pass_time(LOOK_S, crowded * 0.7, self.threads.count)
            self.now += LOOK_S
            self.threads.observe(LOOK_S, self.now)
            counts.append(self.threads.count)
        return counts


def test_a_quiet_machine_computes_with_every_core() -> None:
    """And so does one whose event loops need a little."""
    machine = Machine(2)
    machine.busy = 0.1
    assert set(machine.run(20)) == {2}


def test_a_busy_program_gets_its_core() -> None:
    """Within a second, because waiting for it would cost more than doing without."""
    machine = Machine(2)
    machine.run(2)
    machine.busy = 1.0
    assert machine.run(1)[-1] == 1


def test_more_cores_are_given_up_one_for_each_busy_program() -> None:
    """Not one more than needed."""
    machine = Machine(8)
    machine.run(2)
    machine.busy = 3.0
    assert machine.run(3)[-1] in (5, 6)


def test_the_core_is_taken_back_when_the_program_has_ended() -> None:
    """After a pause."""
    machine = Machine(2)
    machine.busy = 1.0
    machine.run(3)
    machine.busy = 0.0
    assert machine.run(8)[-1] == 2


def test_trying_for_more_becomes_rare_while_it_is_in_vain() -> None:
    """A minute beside a busy program is spent with one thread, but for a few looks."""
    machine = Machine(2)
    machine.busy = 1.0
    counts = machine.run(60)
    assert counts.count(2) < 12


def test_trying_is_frequent_again_after_a_quiet_time() -> None:
    """What was long ago says nothing of today."""
    machine = Machine(2)
    machine.busy = 1.0
    machine.run(60)
    machine.busy = 0.0
    machine.run(120)
    machine.busy = 1.0
    machine.run(1)
    machine.busy = 0.0
    assert machine.run(2 * FIRST_PAUSE_S + 1)[-1] == 2


def test_one_thread_is_never_given_up() -> None:
    """However busy the machine."""
    machine = Machine(2)
    machine.busy = 10.0
    assert min(machine.run(10)) == 1
    assert Threads(1, machine.kernel).observe(10.0, 0.0) is False


def test_a_system_that_says_nothing_changes_nothing() -> None:
    """The number stays."""
    threads = Threads(4, dict)
    assert not any(threads.observe(1.0, float(second)) for second in range(100))
    assert threads.count == 4


def test_linux_tells_of_this_thread() -> None:
    """It ran, at least."""
    assert any(ran > 0 for ran, _ in thread_delays().values())
