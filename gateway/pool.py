"""Which models are loaded, who waits, who is evicted: does what `assignment` decides.

Starting and stopping run as tasks that report back. A load belongs to the pool: the caller who caused it may leave, and
the others still get it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Generic

from engines.errors import HeadwaterError, OutOfMemory, ServerBusy, WorkerKilled
from engines.model import ModelCard, RunnerStatus
from engines.request import FOREVER
from gateway.assignment import PATIENCE_S, Assignment, MakeRunner
from gateway.residents import Failures, Lease, R, Resident, RunnerKey, State, Waiter

log = logging.getLogger(__name__)

QUEUE_FULL = "server busy, please try again.  maximum pending requests exceeded"
SHUTTING_DOWN = "the server is shutting down"
MAX_BACK_OFF_S = 30.0
_TRUSTED_CORRECTION = 0.5, 2.0
"""How far what was measured may move an estimate."""

Measure = Callable[[RunnerKey, ModelCard], Awaitable[Mapping[int, int]]]
"""The memory that a runner would take, in bytes by the number of its windows."""


async def _unknown(key: RunnerKey, card: ModelCard) -> Mapping[int, int]:
    return {}


class Pool(Generic[R]):
    """All residents and all waiters.

    Args:
        make_runner: a runner for a key and card; called with a callback for when it ends by itself.
        max_residents: models at once. places: requests that one resident serves at once.
        max_waiting: requests that may wait. keep_alive_s: for loads whose request says nothing.
        load_timeout_s: the longest load. clock: monotonic seconds.
        measure: what a runner would take. capacity: the memory that all models may take together, in bytes.
    """

    def __init__(
        self,
        make_runner: MakeRunner[R],
        *,
        max_residents: int,
        places: int,
        max_waiting: int,
        keep_alive_s: float,
        load_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        measure: Measure = _unknown,
        capacity: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self._max_waiting = max_waiting
        self._load_timeout_s = load_timeout_s
        self._clock = clock
        self._measure = measure
        self._capacity = capacity
        self._assignment = Assignment(
            make_runner,
            on_end=self._ended,
            max_residents=max_residents,
            places=places,
            keep_alive_s=keep_alive_s,
        )
        self._corrections: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        residents = " ".join(f"{r.card.name}:{r.state}:{r.num_active}" for r in self.residents)
        return f"<Pool [{residents}] waiting={len(self.waiting)}>"

    @property
    def residents(self) -> list[Resident[R]]:
        """Every runner, whatever its state."""
        return self._assignment.residents

    @property
    def waiting(self) -> list[Waiter[R]]:
        """Every request that waits, in order of arrival."""
        return self._assignment.waiting

    def key_of(self, model: str) -> RunnerKey | None:
        """The key of a runner that has a model, or is about to, whatever for; a ready one's if there is one."""
        taking = [r for r in self.residents if r.key.model == model and r.takes_work]
        found = min(taking, key=lambda r: r.state is not State.READY, default=None)
        return found.key if found is not None else None

    async def acquire(self, key: RunnerKey, card: ModelCard, keep_alive_s: float | None = None) -> Lease[R]:
        """A place on a runner that serves `key`, loading the model if needed.

        Raises:
            ServerBusy: the queue is full, or the pool is closed. ModelLoadFailed: the model did not come up.
            OutOfMemory: it needs more memory than there is.
        """
        self._admit(key)
        since = self._clock()
        was_ready = any(r.serves(key) and r.takes_work and r.state is State.READY for r in self.residents)
        waiter = Waiter(key, card, keep_alive_s, since, asyncio.get_running_loop().create_future())
        if not self._assignment.open_to(key):
            waiter.sizes = await self._sizes(key, card)
            self._admit(key)
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

    def _admit(self, key: RunnerKey) -> None:
        """Refuse before anything is decided: who is turned away must not evict others."""
        if self._is_closed:
            raise ServerBusy(SHUTTING_DOWN)
        if len(self.waiting) >= self._max_waiting and not self._assignment.open_to(key):
            raise ServerBusy(QUEUE_FULL)

    async def _sizes(self, key: RunnerKey, card: ModelCard) -> dict[int, int]:
        """The estimate, corrected by what runners of this model were seen to take."""
        correction = self._corrections.get(key.model, 1.0)
        return {windows: int(size * correction) for windows, size in (await self._measure(key, card)).items()}

    def release(self, resident: Resident[R]) -> None:
        """Give a place back."""
        resident.num_active -= 1
        resident.num_served += 1
        resident.last_used = self._clock()
        if resident.state is State.READY and resident in self.residents:  # a request ended, and it still lives
            self._assignment.failures.pop(resident.key.model, None)
        self._settle()

    def unload(self, model: str) -> None:
        """Stop every runner of a model once its running requests are done."""
        for resident in self.residents:
            if resident.key.model == model:
                resident.keep_alive_s = 0
        self._settle()

    def _settle(self) -> None:
        """Decide, then set in motion what was decided."""
        is_tight = any(waiter.sizes for waiter in self.waiting)
        plan = self._assignment.assign(self._clock(), self._capacity() if is_tight else math.inf)
        for resident in plan.start:
            log.info("loading %s", resident.card.name)
            self._spawn(self._load(resident))
        for resident in plan.stop:
            log.info("unloading %s", resident.card.name)
            self._spawn(self._unload(resident))
        self._arm_timer()

    async def _load(self, resident: Resident[R]) -> None:
        started = self._clock()
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
            log.info("loaded %s in %.2f s", resident.card.name, resident.last_used - started)
        self._settle()

    async def _unload(self, resident: Resident[R]) -> None:
        self._learn(resident)
        try:
            await resident.runner.stop()
        finally:
            self._remove(resident)
            self._settle()

    def _learn(self, resident: Resident[R]) -> None:
        """Remember how the estimate compares with what a runner took when it had worked."""
        if resident.num_served and resident.need_bytes and resident.runner.size_bytes:
            least, most = _TRUSTED_CORRECTION
            estimate = resident.need_bytes / self._corrections.get(resident.key.model, 1.0)
            self._corrections[resident.key.model] = min(max(resident.runner.size_bytes / estimate, least), most)

    def _ended(self, resident: Resident[R], error: HeadwaterError) -> None:
        """A runner did not come up, or ended by itself."""
        if resident not in self.residents or resident.state is State.STOPPING:
            return
        was_starting = resident.state is State.STARTING
        self._remove(resident)
        affected = [waiter for waiter in self.waiting if was_starting and resident.serves(waiter.key)]
        if self._can_retry(resident, error) and affected:
            log.warning("%s ran out of memory while loading: idle models go, and it is tried again", resident.card.name)
            for waiter in affected:
                waiter.wants_all = True
        else:
            self._note_failure(resident.key, error)
            for waiter in affected:
                self._assignment.refuse(waiter, error)
        self._spawn(resident.runner.stop())
        self._settle()

    def _can_retry(self, resident: Resident[R], error: HeadwaterError) -> bool:
        """Whether another try is of any use: memory ran out, once, and there is something to evict."""
        ran_out = isinstance(error, OutOfMemory | WorkerKilled)
        return ran_out and not resident.is_last_try and any(other.is_idle for other in self.residents)

    def _note_failure(self, key: RunnerKey, error: HeadwaterError) -> None:
        failures = self._assignment.failures.get(key.model)
        if failures is None or failures.key != key:  # one entry a model: keys are the clients' to vary
            failures = self._assignment.failures[key.model] = Failures(key)
        failures.count += 1
        failures.retry_at = self._clock() + min(2.0 ** min(failures.count - 1, 5), MAX_BACK_OFF_S)
        failures.error = error

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
        return [self.status(resident) for resident in self.residents]

    def now(self) -> float:
        """The time by the clock that residents and waiters are dated with, in seconds."""
        return self._clock()

    def status(self, resident: Resident[R]) -> RunnerStatus:
        """One resident, for people."""
        expires_s = resident.expires_at - self._clock() if resident.is_idle else resident.keep_alive_s
        return RunnerStatus(
            model=resident.card,
            backend=resident.key.backend,
            mode=resident.key.mode,
            state=resident.state.value,
            num_active=resident.num_active,
            size_bytes=resident.runner.size_bytes,
            size_vram_bytes=0,
            num_ctx=resident.runner.num_ctx or resident.key.num_ctx,
            expires_at=FOREVER if expires_s == FOREVER else time.time() + expires_s,
            load_progress=1.0 if resident.state is not State.STARTING else resident.runner.load_progress,
        )

    async def close(self) -> None:
        """Refuse who waits, stop every runner, and return when nothing is left."""
        self._is_closed = True
        for waiter in list(self.waiting):
            self._assignment.refuse(waiter, ServerBusy(SHUTTING_DOWN))
        if self._timer is not None:
            self._timer.cancel()
        for resident in self.residents:
            if resident.state is not State.STOPPING:
                resident.state = State.STOPPING
                self._spawn(self._unload(resident))
        while self._tasks:
            await asyncio.wait(set(self._tasks))
