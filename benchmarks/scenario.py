"""What a scenario is: it asks every target the same, in turns, and yields samples of numbers.

Targets take turns within a round, in opposite order every other round, so that all see the same machine; what counts
is the median of the rounds' own ratios. `NUMBERS` says how each number reads.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx

from benchmarks.load import RequestFailed
from benchmarks.models import OUT, SHAPES, ensure_model
from benchmarks.process import ServerFailed
from benchmarks.targets import Running, Spec, Target

T = TypeVar("T")

BARE = "bare loop"
BARE_AS_SHIPPED = "bare, no kernels"

MAX_FAILURE = 600
"""Characters of what a failed server said last."""


@dataclass(frozen=True, slots=True)
class Number:
    """How a number reads: its label, what to multiply it by, decimals, and whether more of it is better."""

    label: str
    scale: float = 1.0
    digits: int = 1
    more_is_better: bool | None = None


def _more(label: str, digits: int = 1) -> Number:
    return Number(label, digits=digits, more_is_better=True)


def _less(label: str, scale: float = 1.0, digits: int = 1) -> Number:
    return Number(label, scale, digits, more_is_better=False)


NUMBERS = {
    "decode_tps": _more("decode tok/s"),
    "wall_tps": _more("tok/s"),
    "prefill_tps": _more("prefill tok/s"),
    "requests_per_s": _more("requests/s"),
    "texts_per_s": _more("texts/s"),
    "wall_s": _less("wall s", digits=2),
    "ttft_p50_s": _less("TTFT p50 ms", 1e3, 0),
    "ttft_p95_s": _less("TTFT p95 ms", 1e3, 0),
    "gap_p50_s": _less("gap p50 ms", 1e3),
    "gap_p95_s": _less("gap p95 ms", 1e3),
    "gap_max_s": _less("longest gap ms", 1e3, 0),
    "latency_p50_s": _less("latency p50 ms", 1e3, 2),
    "latency_p95_s": _less("latency p95 ms", 1e3, 2),
    "slowdown": _less("gap p95 beside undisturbed", digits=2),
    "computed_share": _less("prefill tokens / distinct", digits=3),
    "prefill_per_turn": _less("prefill tokens a turn"),
    "turn_first_s": _less("turn ms, first tenth", 1e3),
    "turn_last_s": _less("turn ms, last tenth", 1e3),
    "growth": _less("last beside first", digits=2),
    "start_s": _less("start to healthy s", digits=2),
    "first_token_s": _less("start to first token s", digits=2),
    "ttft_again_s": _less("TTFT after restart ms", 1e3, 0),
    "ttft_share": _less("TTFT after restart beside before", digits=3),
    "cpu_s": _less("processor s", digits=2),
    "gateway_cpu_s": _less("processor s of the gateway", digits=2),
    "memory_mib": _less("memory MiB", digits=0),
    "client_share": Number("clients' share of a core", 100, 1),
}
"""In the order of the table."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one target did in one turn. `via` is its name, `case` what varies within the scenario."""

    case: str
    via: str
    turn: int
    numbers: dict[str, float]


@dataclass(frozen=True, slots=True)
class Goal:
    """Headwater's number, as a share of another's, that must be reached."""

    case: str
    number: str
    beside: str
    at_least: float


@dataclass(slots=True)
class Bench:
    """What a scenario works with.

    Attributes:
        shapes: the decoders to measure; scenarios that take one model take the first.
        quick: everything small, on miniature models. tell: is told of each step.
        flags: of each server that was started, by its name. failures: what the targets of a scenario failed at.
    """

    targets: Sequence[Target]
    shapes: Sequence[str] = ("qwen2.5-0.5b", "smollm-135m", "llama-3.2-1b")
    rounds: int = 3
    quick: bool = False
    tell: Callable[[str], None] = lambda step: None
    directory: Path = OUT
    flags: dict[str, set[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def size(self, full: T, quick: T) -> T:
        """How much of something."""
        return quick if self.quick else full

    def model(self, name: str = "") -> Path:
        """The file of that shape, or of the first that is measured."""
        shape = SHAPES[name or self.shapes[0]]
        return ensure_model(shape.miniature if self.quick else shape, self.directory)

    @contextlib.contextmanager
    def servers(self, spec: Spec) -> Iterator[list[Running]]:
        """One of each target, with the model loaded, until the context ends; without those that fail to start."""
        with contextlib.ExitStack() as stack:
            servers = []
            for target in self.targets:
                self.tell(f"starting {target.name}")
                with self.forgiving(target.name):
                    server = stack.enter_context(target.start(spec))
                    self.flags.setdefault(server.name, set()).add(server.flags)
                    if not spec.embeddings:
                        server.warm_up()
                    servers.append(server)
            yield servers

    def each(
        self, servers: Sequence[Running], case: str, measure: Callable[[Running, int], dict[str, float]]
    ) -> Iterator[Sample]:
        """A sample of each server in each round, in opposite order every other round.

        `measure` takes a server and the round's number and gives numbers; the server's memory and processor time are
        added.
        """
        for turn in range(self.rounds):
            for server in servers if turn % 2 == 0 else reversed(servers):
                yield from self.attempt(server.name, case, turn, lambda: _with_costs(server, turn, measure))  # noqa: B023  # called at once

    def attempt(self, via: str, case: str, turn: int, measure: Callable[[], dict[str, float]]) -> Iterator[Sample]:
        """One sample, or none when the target fails, which is noted."""
        self.tell(f"{case}, round {turn + 1} of {self.rounds}: {via}")
        with self.forgiving(f"{via}, {case}"):
            yield Sample(case, via, turn, measure())

    @contextlib.contextmanager
    def forgiving(self, what: str) -> Iterator[None]:
        """One target's failure is noted and does not stop the others."""
        try:
            yield
        except (RequestFailed, ServerFailed, subprocess.CalledProcessError, httpx.HTTPError) as error:
            self.failures.append(f"{what}: {str(error)[-MAX_FAILURE:]}")


@dataclass(frozen=True, slots=True)
class Scenario:
    """A name, what it asks, how it measures, the numbers to draw, and what must be reached."""

    name: str
    about: str
    measure: Callable[[Bench], Iterator[Sample]]
    drawn: tuple[str, ...]
    goals: tuple[Goal, ...] = ()


def _with_costs(server: Running, turn: int, measure: Callable[[Running, int], dict[str, float]]) -> dict[str, float]:
    before = server.cpu_s()
    numbers = measure(server, turn)
    used = {name: after - before.get(name, 0.0) for name, after in server.cpu_s().items()}
    return numbers | used | memory(server)


def memory(server: Running) -> dict[str, float]:
    """Its memory, if it can be known."""
    size = server.memory_bytes()
    return {} if size is None else {"memory_mib": size / 2**20}


def plural(count: int, noun: str) -> str:
    """`1 client`, `8 clients`."""
    return f"{count} {noun}{'s' * (count != 1)}"
