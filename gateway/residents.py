"""What the pool deals with: runners that are there, requests that wait for one, and the places in between.

Only data and what follows from it; who gets what is decided in `assignment`, and done in `pool`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from engines.errors import HeadwaterError
from engines.model import ModelCard
from engines.request import FOREVER, LoadOptions, Mode


class State(StrEnum):
    """Where a resident is in its life."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


class Startable(Protocol):
    """What the pool needs of a runner."""

    @property
    def num_ctx(self) -> int:
        """The window that it serves; 0 while unknown."""

    @property
    def size_bytes(self) -> int:
        """The memory that it was last seen to take; 0 while unknown."""

    @property
    def load_progress(self) -> float:
        """How much of its model is loaded, from 0 to 1."""

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
        need_bytes: the memory it was expected to take; 0 when nobody could tell. num_served: requests that ended.
        is_last_try: an earlier try ran out of memory, and what could be evicted has been.
    """

    key: RunnerKey
    card: ModelCard
    keep_alive_s: float
    last_used: float
    runner: R
    need_bytes: int = 0
    is_last_try: bool = False
    state: State = State.STARTING
    num_active: int = 0
    num_served: int = 0
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

    @property
    def size_bytes(self) -> int:
        """The memory it takes: what is measured counts once it has worked, for only then has it taken everything."""
        if self.num_served and self.runner.size_bytes:
            return self.runner.size_bytes
        return max(self.need_bytes, self.runner.size_bytes)

    @property
    def worth(self) -> tuple[bool, float]:
        """What is evicted first is worth least: pinned ones last, then the least recently used."""
        return self.keep_alive_s == FOREVER, self.last_used

    def serves(self, key: RunnerKey) -> bool:
        """Whether a request with `key` can run here: the same, or the same with a larger window.

        As in Ollama, who leaves open how many layers are offloaded takes any number (`spec/ollama.md` section 3).
        """
        options = key.options
        if options.num_gpu is None:
            options = replace(options, num_gpu=self.key.options.num_gpu)
        same = replace(self.key, num_ctx=key.num_ctx) == replace(key, options=options)
        return same and self.key.num_ctx >= key.num_ctx


@dataclass(eq=False, slots=True)
class Waiter(Generic[R]):
    """A request that waits for a place.

    Attributes:
        sizes: the memory that a runner would take, by how many windows it holds at once; empty when nobody can tell.
        wants_all: a runner for it ran out of memory: the next is started when nothing idle is left.
    """

    key: RunnerKey
    card: ModelCard
    keep_alive_s: float | None
    since: float
    granted: asyncio.Future[Resident[R]]
    sizes: Mapping[int, int] = field(default_factory=dict)
    wants_all: bool = False

    @property
    def least_bytes(self) -> int:
        """The memory without which there is no runner for it."""
        return min(self.sizes.values(), default=0)

    def windows_within(self, room_bytes: float) -> int | None:
        """The most windows that fit, the fewest if none does; None leaves the choice to others."""
        fitting = [windows for windows, size in self.sizes.items() if size <= room_bytes]
        return max(fitting) if fitting else min(self.sizes, default=None)


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
    """What `assign` wants done, and what it holds on to.

    Attributes:
        awaited: residents that earlier waiters wait for. room_bytes: memory that nobody has taken.
    """

    room_bytes: float
    start: list[Resident[R]] = field(default_factory=list)
    stop: list[Resident[R]] = field(default_factory=list)
    awaited: set[Resident[R]] = field(default_factory=set)
