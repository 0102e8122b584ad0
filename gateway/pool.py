"""Which models are loaded, who waits, who is evicted.

The decision is one synchronous function, `Pool.assign`, called whenever anything changes: it grants places, and says
which residents to start and which to stop. It does no I/O and cannot be cut in half; starting and stopping run as tasks
that report back. A load belongs to the pool: the caller who caused it may leave, and the others still get it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

from engines.errors import HeadwaterError, ServerBusy
from engines.model import ModelCard, RunnerStatus
from engines.request import FOREVER, LoadOptions, Mode

log = logging.getLogger(__name__)

QUEUE_FULL = "server busy, please try again.  maximum pending requests exceeded"
SHUTTING_DOWN = "the server is shutting down"
PATIENCE_S = 10.0
"""How long a request for another model waits while every runner stays busy, before one stops taking new work."""
MAX_BACK_OFF_S = 30.0


class State(StrEnum):
    """Where a resident is in its life."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


class Startable(Protocol):
    """What the pool needs of a runner."""

    async def start(self, timeout_s: float) -> None:
        """Return when it is ready; raise why it is not."""

    async def stop(self) -> None:
        """Return when it is gone."""


R = TypeVar("R", bound=Startable)


@dataclass(frozen=True, slots=True)
class RunnerKey:
    """What makes two requests need the same runner. `options` leaves out the window, which a larger one serves."""

    backend: str
    model: str
    mode: Mode
    options: LoadOptions
    num_ctx: int


@dataclass(eq=False, slots=True)
class Resident(Generic[R]):
    """One runner that is there, or on its way in or out.

    Attributes:
        last_used: when its last request ended, in the pool's clock. is_draining: it takes no new requests.
    """

    key: RunnerKey
    card: ModelCard
    keep_alive_s: float
    last_used: float
    runner: R
    state: State = State.STARTING
    num_active: int = 0
    is_draining: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether it could be stopped without hurting anyone."""
        return self.state is State.READY and self.num_active == 0

    @property
    def takes_work(self) -> bool:
        """Whether it serves further requests, now or once it is up."""
        return self.state is not State.STOPPING and not self.is_draining

    @property
    def expires_at(self) -> float:
        """When it will be stopped if nobody asks; only meaningful while idle."""
        return self.last_used + self.keep_alive_s

    def serves(self, key: RunnerKey) -> bool:
        """Whether a request with `key` can run here: the same, or the same with a larger window."""
        return self.key.num_ctx >= key.num_ctx and replace(self.key, num_ctx=key.num_ctx) == key


@dataclass(eq=False, slots=True)
class Waiter(Generic[R]):
    """A request that waits for a place."""

    key: RunnerKey
    card: ModelCard
    keep_alive_s: float | None
    since: float
    granted: asyncio.Future[Resident[R]]


@dataclass(slots=True)
class Failures:
    """How often runners with one key failed to come up or crashed in a row, without serving a request in between."""

    key: RunnerKey
    count: int = 0
    retry_at: float = 0.0
    error: HeadwaterError | None = None


@dataclass(frozen=True, slots=True)
class Lease(Generic[R]):
    """A place on a runner. `waited_s` was spent getting it; `loaded` tells that the model had to be loaded."""

    resident: Resident[R]
    waited_s: float
    loaded: bool

    @property
    def runner(self) -> R:
        """The runner to talk to."""
        return self.resident.runner


@dataclass(slots=True)
class Plan(Generic[R]):
    """What `assign` wants done, and what it holds on to: `awaited` are residents that earlier waiters wait for."""

    start: list[Resident[R]] = field(default_factory=list)
    stop: list[Resident[R]] = field(default_factory=list)
    awaited: set[Resident[R]] = field(default_factory=set)


def _worth(resident: Resident[Any]) -> tuple[bool, float]:
    """What is evicted first is worth least: pinned ones last, then the least recently used."""
    return resident.keep_alive_s == FOREVER, resident.last_used


class Pool(Generic[R]):
    """All residents and all waiters.

    Args:
        make_runner: a runner for a key and card; called with a callback for when it ends by itself.
        max_residents: models at once. places: requests that one resident serves at once.
        max_waiting: requests that may wait. keep_alive_s: for loads whose request says nothing.
        load_timeout_s: the longest load. clock: monotonic seconds.
    """

    def __init__(
        self,
        make_runner: Callable[[RunnerKey, ModelCard, Callable[[HeadwaterError], None]], R],
        *,
        max_residents: int,
        places: int,
        max_waiting: int,
        keep_alive_s: float,
        load_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make_runner = make_runner
        self._max_residents = max_residents
        self._places = places
        self._max_waiting = max_waiting
        self._keep_alive_s = keep_alive_s
        self._load_timeout_s = load_timeout_s
        self._clock = clock
        self.residents: list[Resident[R]] = []
        self.waiting: list[Waiter[R]] = []
        self._failures: dict[str, Failures] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        residents = " ".join(f"{r.card.name}:{r.state}:{r.num_active}" for r in self.residents)
        return f"<Pool [{residents}] waiting={len(self.waiting)}>"

    async def acquire(self, key: RunnerKey, card: ModelCard, keep_alive_s: float | None = None) -> Lease[R]:
        """A place on a runner that serves `key`, loading the model if needed.

        Raises:
            ServerBusy: the queue is full, or the pool is closed. ModelLoadFailed: the model did not come up.
        """
        if self._is_closed:
            raise ServerBusy(SHUTTING_DOWN)
        if len(self.waiting) >= self._max_waiting and not self._open_to(key):
            raise ServerBusy(QUEUE_FULL)  # before anything is decided: who is turned away must not evict others
        since = self._clock()
        was_ready = any(r.serves(key) and r.takes_work and r.state is State.READY for r in self.residents)
        waiter = Waiter(key, card, keep_alive_s, since, asyncio.get_running_loop().create_future())
        self.waiting.append(waiter)
        self._settle()
        try:
            resident = await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
                self.release(waiter.granted.result())
            elif waiter in self.waiting:
                self.waiting.remove(waiter)
                self._settle()
            raise
        return Lease(resident, self._clock() - since, loaded=not was_ready)

    def release(self, resident: Resident[R]) -> None:
        """Give a place back."""
        resident.num_active -= 1
        resident.last_used = self._clock()
        if resident.state is State.READY and resident in self.residents:  # a request ended, and it still lives
            self._failures.pop(resident.key.model, None)
        self._settle()

    def unload(self, model: str) -> None:
        """Stop every runner of a model once its running requests are done."""
        for resident in self.residents:
            if resident.key.model == model:
                resident.keep_alive_s = 0
        self._settle()

    def assign(self) -> Plan[R]:
        """Decide everything that can be decided now.

        Waiters are taken in order of arrival. For each there are six outcomes:
        1. a ready runner that serves it has a free place: it is granted
        2. one that serves it is starting, or has no place free: it waits
        3. a runner like it keeps failing: it gets the last error until the back-off is over
        4. the same model runs with other options: once no earlier waiter wants that one, it is drained and stopped
        5. there is room, or an idle runner can go: a new one starts
        6. every runner is busy: it waits, and after a while the least recently used one takes no new work
        Only then do idle runners expire, so that a keep-alive of 0 does not stop the one that a waiter is about to get.
        """
        now, plan = self._clock(), Plan[R]()
        self.waiting = [waiter for waiter in self.waiting if not waiter.granted.done()]  # whose callers are still there
        for waiter in list(self.waiting):
            self._place(waiter, now, plan)
        for resident in self.residents:
            resident.is_draining &= bool(self.waiting)  # nobody is left to make room for
            if resident.is_idle and (resident.expires_at <= now or resident.is_draining):
                self._stop(resident, plan)
        return plan

    def _place(self, waiter: Waiter[R], now: float, plan: Plan[R]) -> None:
        if ready := self._open_to(waiter.key):  # 1
            self._grant(waiter, min(ready, key=lambda r: r.num_active))
            return
        serving = [r for r in self.residents if r.serves(waiter.key) and r.takes_work]
        if serving:  # 2
            plan.awaited.update(serving)
            return
        if (error := self._back_off(waiter.key, now)) is not None:  # 3
            self.waiting.remove(waiter)
            waiter.granted.set_exception(error)
            return
        rivals = [r for r in self.residents if r.key.model == waiter.key.model and r.key.mode == waiter.key.mode]
        if rivals:  # 4
            for rival in rivals:
                if rival not in plan.awaited:
                    self._drain(rival, plan)
            return
        self._make_room_and_start(waiter, now, plan)

    def _open_to(self, key: RunnerKey) -> list[Resident[R]]:
        """Ready runners that have a free place for a request with `key`."""
        serving = [r for r in self.residents if r.serves(key) and r.takes_work]
        return [r for r in serving if r.state is State.READY and r.num_active < self._places]

    def _drain(self, resident: Resident[R], plan: Plan[R]) -> None:
        resident.is_draining = True
        if resident.is_idle:
            self._stop(resident, plan)

    def _make_room_and_start(self, waiter: Waiter[R], now: float, plan: Plan[R]) -> None:
        if len(self.residents) < self._max_residents:  # 5
            self._start(waiter, plan)
            return
        if any(r.state is State.STOPPING for r in self.residents):  # room is on its way
            return
        idle = [r for r in self.residents if r.is_idle]
        if idle:  # 5
            self._stop(min(idle, key=_worth), plan)
        elif now - waiter.since >= PATIENCE_S:  # 6
            busy = [r for r in self.residents if r.state is State.READY and r not in plan.awaited]
            if busy and not any(r.is_draining for r in busy):
                min(busy, key=_worth).is_draining = True

    def _grant(self, waiter: Waiter[R], resident: Resident[R]) -> None:
        self.waiting.remove(waiter)
        resident.num_active += 1
        if waiter.keep_alive_s is not None:
            resident.keep_alive_s = waiter.keep_alive_s
        waiter.granted.set_result(resident)

    def _start(self, waiter: Waiter[R], plan: Plan[R]) -> None:
        keep_alive_s = waiter.keep_alive_s if waiter.keep_alive_s is not None else self._keep_alive_s
        holder: list[Resident[R]] = []
        runner = self._make_runner(waiter.key, waiter.card, lambda error: self._ended(holder[0], error))
        resident = Resident(waiter.key, waiter.card, keep_alive_s, self._clock(), runner)
        holder.append(resident)
        self.residents.append(resident)
        plan.start.append(resident)
        plan.awaited.add(resident)

    def _stop(self, resident: Resident[R], plan: Plan[R]) -> None:
        resident.state = State.STOPPING
        plan.stop.append(resident)

    def _back_off(self, key: RunnerKey, now: float) -> HeadwaterError | None:
        """The error to repeat instead of starting a runner that has just failed more than once."""
        failures = self._failures.get(key.model)
        if failures is None or failures.key != key:
            return None
        return failures.error if failures.count > 1 and now < failures.retry_at else None

    def _settle(self) -> None:
        """Decide, then set in motion what was decided."""
        plan = self.assign()
        for resident in plan.start:
            log.info("loading %s", resident.card.name)
            self._spawn(self._load(resident))
        for resident in plan.stop:
            log.info("unloading %s", resident.card.name)
            self._spawn(self._unload(resident))
        self._arm_timer()

    async def _load(self, resident: Resident[R]) -> None:
        try:
            await resident.runner.start(self._load_timeout_s)
        except HeadwaterError as error:
            self._ended(resident, error)
            return
        except Exception as error:  # a bug must not leave callers waiting
            log.exception("loading %s failed", resident.card.name)
            self._ended(resident, HeadwaterError(f"loading failed: {error}"))
            return
        if resident.state is State.STARTING:
            resident.state = State.READY
            resident.last_used = self._clock()
            log.info("loaded %s", resident.card.name)
        self._settle()

    async def _unload(self, resident: Resident[R]) -> None:
        try:
            await resident.runner.stop()
        finally:
            self._remove(resident)
            self._settle()

    def _ended(self, resident: Resident[R], error: HeadwaterError) -> None:
        """A runner did not come up, or ended by itself."""
        if resident not in self.residents or resident.state is State.STOPPING:
            return
        was_starting = resident.state is State.STARTING
        self._remove(resident)
        failures = self._failures.get(resident.key.model)
        if failures is None or failures.key != resident.key:  # one entry a model: keys are the clients' to vary
            failures = self._failures[resident.key.model] = Failures(resident.key)
        failures.count += 1
        failures.retry_at = self._clock() + min(2.0 ** min(failures.count - 1, 5), MAX_BACK_OFF_S)
        failures.error = error
        if was_starting:
            for waiter in [w for w in self.waiting if resident.serves(w.key)]:
                self.waiting.remove(waiter)
                if not waiter.granted.done():
                    waiter.granted.set_exception(error)
        self._spawn(resident.runner.stop())
        self._settle()

    def _remove(self, resident: Resident[R]) -> None:
        if resident in self.residents:
            self.residents.remove(resident)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _arm_timer(self) -> None:
        """Wake up when the next idle resident expires, or the next waiter's patience ends."""
        if self._timer is not None:
            self._timer.cancel()
        times = [r.expires_at for r in self.residents if r.is_idle and r.keep_alive_s != FOREVER]
        times += [w.since + PATIENCE_S for w in self.waiting if w.since + PATIENCE_S > self._clock()]
        self._timer = None
        if times and not self._is_closed:
            delay_s = max(min(times) - self._clock(), 0.0) + 0.001
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._settle)

    def statuses(self) -> list[RunnerStatus]:
        """What is resident, for people. Never waits."""
        now, wall = self._clock(), time.time()
        return [self._status(resident, now, wall) for resident in self.residents]

    def _status(self, resident: Resident[R], now: float, wall: float) -> RunnerStatus:
        health = getattr(resident.runner, "health", None)
        expires_s = resident.expires_at - now if resident.is_idle else resident.keep_alive_s
        return RunnerStatus(
            model=resident.card,
            backend=resident.key.backend,
            mode=resident.key.mode,
            state=resident.state.value,
            num_active=resident.num_active,
            size_bytes=getattr(health, "size_bytes", 0),
            size_vram_bytes=0,
            num_ctx=getattr(health, "num_ctx", 0) or resident.key.num_ctx,
            expires_at=FOREVER if expires_s == FOREVER else wall + expires_s,
        )

    async def close(self) -> None:
        """Refuse who waits, stop every runner, and return when nothing is left."""
        self._is_closed = True
        for waiter in self.waiting:
            if not waiter.granted.done():
                waiter.granted.set_exception(ServerBusy(SHUTTING_DOWN))
        self.waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
        for resident in self.residents:
            if resident.state is not State.STOPPING:
                resident.state = State.STOPPING
                self._spawn(self._unload(resident))
        while self._tasks:
            await asyncio.wait(set(self._tasks))
