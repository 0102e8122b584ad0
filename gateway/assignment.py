"""Who gets which place, which model is loaded and which one goes: decided in one synchronous function.

`Assignment.assign` is called whenever anything changes. It grants places, and says which residents to start and which
to stop. It does no I/O, cannot be cut in half, and is told from outside what time it is and how much memory there is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Generic

from engines.errors import HeadwaterError, OutOfMemory
from engines.model import ModelCard
from gateway.residents import Failures, Plan, R, Resident, RunnerKey, State, Waiter

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""How long a request for another model waits while every runner stays busy, before one stops taking new work."""

MakeRunner = Callable[[RunnerKey, ModelCard, Callable[[HeadwaterError], None], int | None], R]
"""A runner for a key and card, a callback for when it ends by itself, and how many windows it is to hold at once."""


class Assignment(Generic[R]):
    """All residents and all waiters.

    Args:
        make_runner: called for each resident that is to start. on_end: told when a runner ends by itself.
        max_residents: models at once. places: requests that one resident serves at once.
        keep_alive_s: for loads whose request says nothing.
    """

    def __init__(
        self,
        make_runner: MakeRunner[R],
        *,
        on_end: Callable[[Resident[R], HeadwaterError], None],
        max_residents: int,
        places: int,
        keep_alive_s: float,
    ) -> None:
        self._make_runner = make_runner
        self._on_end = on_end
        self._max_residents = max_residents
        self._places = places
        self._keep_alive_s = keep_alive_s
        self.residents: list[Resident[R]] = []
        self.waiting: list[Waiter[R]] = []
        self.failures: dict[str, Failures] = {}

    def assign(self, now: float, capacity_bytes: float = math.inf) -> Plan[R]:
        """Decide everything that can be decided now; `capacity_bytes` is what all models may take together.

        Waiters are taken in order of arrival. For each there are seven outcomes:
        1. a ready runner that serves it has a free place: it is granted
        2. one that serves it is starting, or has no place free: it waits
        3. a runner like it keeps failing: it gets the last error until the back-off is over
        4. the same model runs with other options: once no earlier waiter wants that one, it is drained and stopped
        5. there is room, or idle runners can go: a new one starts
        6. it needs more memory than there is: it is refused before anything is done
        7. every runner is busy: it waits, and after a while the least recently used one takes no new work
        Only then do idle runners expire, so that a keep-alive of 0 does not stop the one that a waiter is about to get.
        """
        plan = Plan[R](capacity_bytes - sum(resident.size_bytes for resident in self.residents))
        self.waiting = [waiter for waiter in self.waiting if not waiter.granted.done()]  # whose callers are still there
        for waiter in list(self.waiting):
            self._place(waiter, now, plan)
        for resident in self.residents:
            resident.is_draining &= bool(self.waiting)  # nobody is left to make room for
            if resident.is_idle and (resident.expires_at <= now or resident.is_draining):
                self._stop(resident, plan)
        return plan

    def _place(self, waiter: Waiter[R], now: float, plan: Plan[R]) -> None:
        if ready := self.open_to(waiter.key):  # 1
            self._grant(waiter, min(ready, key=lambda r: r.num_active))
            return
        serving = [r for r in self.residents if r.serves(waiter.key) and r.takes_work]
        if serving:  # 2
            plan.awaited.update(serving)
            return
        if (error := self._back_off(waiter.key, now)) is not None:  # 3
            self.refuse(waiter, error)
            return
        rivals = [r for r in self.residents if r.key.model == waiter.key.model and r.key.mode == waiter.key.mode]
        if rivals:  # 4
            for rival in rivals:
                if rival not in plan.awaited:
                    self._drain(rival, plan)
            return
        self._make_room_and_start(waiter, now, plan)

    def open_to(self, key: RunnerKey) -> list[Resident[R]]:
        """Ready runners that have a free place for a request with `key`."""
        serving = [r for r in self.residents if r.serves(key) and r.takes_work]
        return [r for r in serving if r.state is State.READY and r.num_active < self._places]

    def refuse(self, waiter: Waiter[R], error: HeadwaterError) -> None:
        """End a waiter's wait with an error, if its caller is still there."""
        if waiter in self.waiting:
            self.waiting.remove(waiter)
        if not waiter.granted.done():
            waiter.granted.set_exception(error)

    def _drain(self, resident: Resident[R], plan: Plan[R]) -> None:
        resident.is_draining = True
        if resident.is_idle:
            self._stop(resident, plan)

    def _make_room_and_start(self, waiter: Waiter[R], now: float, plan: Plan[R]) -> None:
        victims = self._victims(waiter, plan)
        if victims == []:  # 5
            self._start(waiter, plan)
            return
        capacity = plan.room_bytes + sum(resident.size_bytes for resident in self.residents)
        if waiter.least_bytes > capacity:  # 6
            self.refuse(waiter, _too_large(waiter.least_bytes, capacity))
            return
        if any(r.state is State.STOPPING for r in self.residents):  # room is on its way
            return
        if victims is not None:  # 5
            for victim in victims:
                self._stop(victim, plan)
        elif now - waiter.since >= PATIENCE_S:  # 7
            busy = [r for r in self.residents if r.state is State.READY and r not in plan.awaited]
            if busy and not any(r.is_draining for r in busy):
                min(busy, key=lambda r: r.worth).is_draining = True

    def _victims(self, waiter: Waiter[R], plan: Plan[R]) -> list[Resident[R]] | None:
        """The fewest idle runners that must go first, those worth least; None when all of them are not enough."""
        idle = sorted((r for r in self.residents if r.is_idle), key=lambda r: r.worth)
        if waiter.wants_all and idle:
            return idle
        for count in range(len(idle) + 1):
            room = plan.room_bytes + sum(r.size_bytes for r in idle[:count])
            if len(self.residents) - count < self._max_residents and waiter.least_bytes <= room:
                return idle[:count]
        return None

    def _grant(self, waiter: Waiter[R], resident: Resident[R]) -> None:
        self.waiting.remove(waiter)
        resident.num_active += 1
        if waiter.keep_alive_s is not None:
            resident.keep_alive_s = waiter.keep_alive_s
        waiter.granted.set_result(resident)

    def _start(self, waiter: Waiter[R], plan: Plan[R]) -> None:
        windows = waiter.windows_within(plan.room_bytes)
        if windows is not None and windows < max(waiter.sizes):
            log.warning(
                "%s gets room for %d windows instead of %d, since memory is short",
                waiter.card.name, windows, max(waiter.sizes),
            )  # fmt: skip
        holder: list[Resident[R]] = []
        runner = self._make_runner(waiter.key, waiter.card, lambda error: self._on_end(holder[0], error), windows)
        resident = Resident(
            key=waiter.key,
            card=waiter.card,
            keep_alive_s=waiter.keep_alive_s if waiter.keep_alive_s is not None else self._keep_alive_s,
            last_used=waiter.since,
            runner=runner,
            need_bytes=waiter.sizes[windows] if windows is not None else 0,
            is_last_try=waiter.wants_all,
        )
        holder.append(resident)
        self.residents.append(resident)
        plan.room_bytes -= resident.need_bytes
        plan.start.append(resident)
        plan.awaited.add(resident)

    def _stop(self, resident: Resident[R], plan: Plan[R]) -> None:
        resident.state = State.STOPPING
        plan.stop.append(resident)

    def _back_off(self, key: RunnerKey, now: float) -> HeadwaterError | None:
        """The error to repeat instead of starting a runner that has just failed more than once."""
        failures = self.failures.get(key.model)
        if failures is None or failures.key != key:
            return None
        return failures.error if failures.count > 1 and now < failures.retry_at else None


def _too_large(need_bytes: float, have_bytes: float) -> OutOfMemory:
    """In Ollama's words (llm/server.go), which its clients know."""
    need, have = (f"{max(size, 0) / (1 << 30):.1f} GiB" for size in (need_bytes, have_bytes))
    return OutOfMemory(f"model requires more system memory ({need}) than is available ({have})")
