"""Scenario `short`: many small requests, where what a server does around decoding is most of the cost."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.load import ask, percentile
from benchmarks.prompts import Writer
from benchmarks.scenario import Bench, Sample, Scenario, plural
from benchmarks.targets import Running, Spec

WORDS = 12
TOKENS = 4


def measure(bench: Bench) -> Iterator[Sample]:
    """One client, and many, on a small model."""
    for clients in (1, 16):
        with bench.servers(Spec(bench.model("smollm-135m"), clients, 16384)) as servers:
            requests = max(bench.size(240, 12) // clients, 1)
            yield from bench.each(servers, plural(clients, "client"), partial(_ask, clients, requests))


def _ask(clients: int, requests: int, server: Running, turn: int) -> dict[str, float]:
    writer = Writer(turn)
    load = server.load([[ask(writer.text(WORDS), TOKENS) for _ in range(requests)] for _ in range(clients)])
    latencies = [answer.ended - answer.sent for answer in load.answers]
    return {
        "requests_per_s": len(latencies) / load.wall_s,
        "latency_p50_s": percentile(latencies, 0.5),
        "latency_p95_s": percentile(latencies, 0.95),
        "client_share": load.client_share,
    }


SHORT = Scenario(
    "short", "requests of 12 words and 4 tokens back, on the 135 M model", measure, ("requests_per_s", "latency_p95_s")
)
