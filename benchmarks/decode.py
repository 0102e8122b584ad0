"""Scenario `decode`: tokens per second through the whole gateway, beside llama.cpp alone.

The two alternate, so that both see the same machine, and a ratio is the median of the rounds' own ratios: a machine
that slows down for a minute slows both halves of a round. The limit gets the worker's own context parameters and
prompts as long as the worker's, template included.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks.bare import BareOptions, BareRates, run_bare
from benchmarks.hop import Hop, measure_hop
from benchmarks.load import OLLAMA, OPENAI, Dialect, LoadRates, make_prompts, run_load, summarize
from benchmarks.server import Server, run_server
from engines.inference import LoadConfig

MODEL = "bench"
DEMO = "demo"
DEMO_WEIGHTS = Path(__file__).parent.parent / "engines" / "store" / "demo" / "demo.gguf"
DIALECTS = (OLLAMA, OPENAI)
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """Numbers of clients to measure with, tokens of each prompt (about) and answer, rounds, requests of the hop."""

    clients: tuple[int, ...]
    tokens: int
    prompt: int
    repeat: int
    hops: int


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of the limit and of each dialect, by its name, with the same number of clients."""

    clients: int
    bare: BareRates
    gateway: dict[str, LoadRates]

    def ratio(self, dialect: str) -> float:
        """Decode throughput through the gateway, as a share of the limit's."""
        return self.gateway[dialect].decode_tps / self.bare.decode_tps


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """Everything that was measured. `config` is what the worker was started with."""

    config: LoadConfig
    rounds: list[Round]
    hop: Hop | None

    def of(self, clients: int) -> list[Round]:
        """The rounds with that many clients."""
        return [each for each in self.rounds if each.clients == clients]

    def ratio(self, clients: int, dialect: str) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(each.ratio(dialect) for each in self.of(clients))

    @property
    def noise(self) -> float:
        """By which share of the fastest the slowest of rounds that should be equal fell behind, at worst."""
        groups = [self.of(clients) for clients in {each.clients for each in self.rounds}]
        series = [[each.bare.decode_tps for each in group] for group in groups]
        series += [
            [each.gateway[dialect.name].decode_tps for each in group] for group in groups for dialect in DIALECTS
        ]
        return max(1 - min(rates) / max(rates) for rates in series)


def measure_decode(weights: Path, options: DecodeOptions, report: Callable[[str], None]) -> DecodeResult:
    """Run the scenario; `report` is told of each step.

    Raises:
        ServerFailed, RequestFailed, CalledProcessError: the server, a request or the bare loop failed.
    """
    seeds = count()
    with run_server({MODEL: weights, DEMO: DEMO_WEIGHTS}) as server:
        report("loading the model")
        warm = _load(server, OLLAMA, make_prompts(1, options.prompt, next(seeds)), WARM_UP_TOKENS)
        config = server.worker_of(weights).config
        rounds = []
        for clients in options.clients:
            limit = _bare_options(weights, config, clients, warm.prompt_tokens, options.tokens)
            for turn in range(options.repeat):
                report(f"clients {clients}, round {turn + 1} of {options.repeat}")
                bare = run_bare(limit)
                prompts = (make_prompts(clients, options.prompt, seed) for seed in seeds)
                rounds.append(Round(clients, bare, _gateway_turn(server, prompts, options.tokens)))
        return DecodeResult(config, rounds, _hop(server, options.hops, report))


def _gateway_turn(server: Server, prompts: Iterator[list[str]], tokens: int) -> dict[str, LoadRates]:
    """Each dialect once, with prompts that the server has never seen."""
    return {dialect.name: _load(server, dialect, next(prompts), tokens) for dialect in DIALECTS}


def _load(server: Server, dialect: Dialect, prompts: Sequence[str], tokens: int) -> LoadRates:
    return summarize(asyncio.run(run_load(server.base_url, dialect, MODEL, prompts, tokens)))


def _bare_options(weights: Path, config: LoadConfig, clients: int, prompt: int, tokens: int) -> BareOptions:
    assert config.context_size is not None
    return BareOptions(
        model=str(weights),
        sequences=clients,
        prompt=prompt,
        tokens=tokens,
        num_cells=config.context_size * config.num_parallel,
        num_sequences=max(config.num_sequences, clients),
        num_batch=config.num_batch,
        num_threads=config.num_threads,
    )


def _hop(server: Server, requests: int, report: Callable[[str], None]) -> Hop | None:
    if not requests:
        return None
    report("the gateway hop")
    asyncio.run(run_load(server.base_url, OPENAI, DEMO, make_prompts(1, 8, 0), WARM_UP_TOKENS))
    return measure_hop(server.base_url, DEMO, server.worker_of(DEMO_WEIGHTS), requests)
