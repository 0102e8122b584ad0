"""A pool on a bench: runners that come up and go when the test says so, and a clock turned by hand."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.errors import HeadwaterError, ModelLoadFailed, WorkerCrashed
from engines.model import ModelCard
from engines.request import LoadOptions, Mode
from gateway.pool import Pool
from gateway.residents import Lease, RunnerKey

Asking = asyncio.Task[Lease["FakeRunner"]]


def make_card(name: str) -> ModelCard:
    """A model whose name and digests are all `name`."""
    return ModelCard(
        name=name,
        full_name=name,
        digest=name,
        weights=Path(name),
        weights_digest=name,
        size_bytes=1,
        modified_at=0.0,
    )


def make_key(model: str = "a", num_ctx: int = 4096, **options: Any) -> RunnerKey:
    """What a request for `model` needs; `options` are load options."""
    return RunnerKey("fake", model, Mode.COMPLETION, LoadOptions(**options), num_ctx)


async def turn() -> None:
    """Let everything happen that can happen without the outside world."""
    for _ in range(12):
        await asyncio.sleep(0)


class FakeRunner:
    """A runner that is up, fails or is gone when told so."""

    def __init__(
        self,
        key: RunnerKey,
        on_exit: Callable[[HeadwaterError], None],
        num_windows: int | None,
        *,
        stops_slowly: bool,
    ) -> None:
        self.key = key
        self.num_windows = num_windows
        self.timeout_s = 0.0
        self.num_stops = 0
        self.num_ctx = 0
        self.size_bytes = 0
        self.load_progress = 0.0
        self.stopping = asyncio.Event()
        self._on_exit = on_exit
        self._up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not stops_slowly:
            self.go()

    async def start(self, timeout_s: float) -> None:
        """Wait until the test says that it is up."""
        self.timeout_s = timeout_s
        await self._up

    async def stop(self) -> None:
        """End a load that is under way, and wait until the test says that it is gone."""
        self.num_stops += 1
        self.stopping.set()
        self.fail(ModelLoadFailed("stopped"))
        await asyncio.shield(self._gone)

    def come_up(self) -> None:
        """The model is loaded."""
        if not self._up.done():
            self._up.set_result(None)

    def fail(self, error: Exception) -> None:
        """The model cannot be loaded."""
        if not self._up.done():
            self._up.set_exception(error)

    def crash(self, error: HeadwaterError | None = None) -> None:
        """The worker ends by itself."""
        self._on_exit(error or WorkerCrashed("crashed"))

    def go(self) -> None:
        """Nothing is left of it, once it is stopped."""
        if not self._gone.done():
            self._gone.set_result(None)


class Bench:
    """The pool under test, and every runner that it has made."""

    def __init__(self, *, stops_slowly: bool = False, **numbers: Any) -> None:
        self.now = 0.0
        self.stops_slowly = stops_slowly
        self.runners: list[FakeRunner] = []
        defaults = {"max_residents": 3, "places": 2, "max_waiting": 100, "keep_alive_s": 300.0, "load_timeout_s": 60.0}
        self.pool: Pool[FakeRunner] = Pool(self._make_runner, **{"clock": lambda: self.now, **defaults, **numbers})

    def _make_runner(
        self, key: RunnerKey, card: ModelCard, on_exit: Callable[[HeadwaterError], None], num_windows: int | None
    ) -> FakeRunner:
        self.runners.append(FakeRunner(key, on_exit, num_windows, stops_slowly=self.stops_slowly))
        return self.runners[-1]

    def ask(self, model: str = "a", keep_alive_s: float | None = None, num_ctx: int = 4096, **options: Any) -> Asking:
        """A request for a place, which goes on by itself."""
        key = make_key(model, num_ctx, **options)
        return asyncio.create_task(self.pool.acquire(key, make_card(model), keep_alive_s))

    async def lease(
        self, model: str = "a", keep_alive_s: float | None = None, num_ctx: int = 4096, **options: Any
    ) -> Lease[FakeRunner]:
        """A place, on a runner that comes up at once if one is needed."""
        asking = self.ask(model, keep_alive_s, num_ctx, **options)
        await turn()
        for runner in self.runners:
            runner.come_up()
        await turn()
        assert asking.done(), f"{model} was not granted: {self.pool}"
        return asking.result()

    def release(self, lease: Lease[FakeRunner]) -> None:
        """Give a place back."""
        self.pool.release(lease.resident)

    async def pass_time(self, seconds: float) -> None:
        """Turn the clock, and let the pool look at it."""
        await turn()
        self.now += seconds
        self.pool._settle()
        await turn()
