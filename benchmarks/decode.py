"""Scenario `decode`: tokens per second through a whole server, beside llama.cpp alone.

The limit gets Headwater's own context parameters and prompts as long as Headwater's, template included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.bare import BareOptions, run_bare
from benchmarks.load import Dialect, ask
from benchmarks.prompts import Writer
from benchmarks.scenario import BARE, BARE_AS_SHIPPED, Bench, Goal, Sample, Scenario, memory, plural
from benchmarks.targets import THREADS, Running, Spec

PROMPT = 64
CELLS = 16384
SEQUENCES = 32
TEMPLATE_TOKENS = 19  # of one user message in ChatML, in a vocabulary that has none of its words


def measure(bench: Bench) -> Iterator[Sample]:
    """One wave of clients at a time, each server in each of its dialects."""
    tokens = bench.size(128, 24)
    for shape in bench.shapes:
        weights = bench.model(shape)
        for clients in bench.size((1, 8), (1, 2)):
            case = f"{shape}, {plural(clients, 'client')}"
            limit = _limit(weights, clients, tokens)
            with bench.servers(Spec(weights, clients, CELLS)) as servers:
                waves = {
                    server.via(dialect): partial(_wave, server, dialect, clients, tokens)
                    for server in servers
                    for dialect in server.dialects
                }
                loops = {BARE: partial(_bare, limit, True), BARE_AS_SHIPPED: partial(_bare, limit, False)}
                for turn in range(bench.rounds):
                    for via, measure_it in (loops | waves).items():
                        yield from bench.attempt(via, case, turn, measure_it)


def _wave(server: Running, dialect: Dialect, clients: int, tokens: int) -> dict[str, float]:
    """Every client asks once, something that no server has seen."""
    writer = Writer(time.time_ns())
    load = server.load([[ask(writer.text(PROMPT), tokens)] for _ in range(clients)], dialect=dialect)
    return {"decode_tps": load.decode_tps} | load.numbers() | memory(server)


def _bare(limit: BareOptions, kernels: bool) -> dict[str, float]:
    rates = run_bare(limit, kernels=kernels)
    return {"decode_tps": rates.decode_tps, "prefill_tps": rates.prefill_tps}


def _limit(weights: Path, clients: int, tokens: int) -> BareOptions:
    return BareOptions(
        model=str(weights),
        sequences=clients,
        prompt=PROMPT + TEMPLATE_TOKENS,
        tokens=tokens,
        num_cells=CELLS,
        num_sequences=max(SEQUENCES, clients),
        num_threads=THREADS,
    )


DECODE = Scenario(
    "decode",
    "one wave of clients, 64 words each, 128 tokens back; the bare loop is llama_decode with our kernels and argmax",
    measure,
    ("decode_tps",),
    tuple(Goal(f"qwen2.5-0.5b, {plural(clients, 'client')}", "decode_tps", BARE, 0.95) for clients in (1, 8)),
)
