"""Scenario `clients`: from one to many clients with prompts of all lengths, as real clients have.

Each asks two to six times in a row, prompts of 32 to 512 tokens and answers of 32 to 96; half of them use one of two
system prompts, as clients of the same software do. Every target gets the same requests in the same round.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.load import Ask, ask
from benchmarks.prompts import Writer
from benchmarks.scenario import Bench, Goal, Sample, Scenario, plural
from benchmarks.targets import LLAMA_SERVER, Running, Spec

SLOT = 768
"""Cells that the longest request needs, with its answer and the template."""


def measure(bench: Bench) -> Iterator[Sample]:
    """Each number of clients on freshly started servers."""
    for clients in bench.size((1, 4, 8, 16, 32), (1, 3)):
        cells = max(16384, clients * SLOT)
        with bench.servers(Spec(bench.model(), clients, cells)) as servers:
            yield from bench.each(servers, plural(clients, "client"), partial(_ask, bench, clients))


def _ask(bench: Bench, clients: int, server: Running, turn: int) -> dict[str, float]:
    requests = bench.size(6 if clients == 1 else 3 if clients <= 8 else 2, 2)
    return server.load(mixed_requests(clients, requests, turn)).numbers()


def mixed_requests(clients: int, requests: int, seed: int) -> list[list[Ask]]:
    """What each client asks; nothing is alike between seeds."""
    writer = Writer(seed)
    systems = [writer.text(160), writer.text(96), "", ""]
    return [
        [
            ask(writer.text(_length(writer, systems[client % 4])), writer.between(32, 96), system=systems[client % 4])
            for _ in range(requests)
        ]
        for client in range(clients)
    ]


def _length(writer: Writer, system: str) -> int:
    """Words of a prompt, so that the whole is 32 to 512 tokens, short ones more often than long ones."""
    whole = min(writer.between(32, 512), writer.between(32, 512))
    return max(whole - system.count(" "), 16)


CLIENTS = Scenario(
    "clients",
    "prompts of 32 to 512 tokens, answers of 32 to 96, 2 to 6 requests a client, half with a shared system prompt",
    measure,
    ("wall_tps", "ttft_p50_s"),
    tuple(
        Goal(plural(clients, "client"), "wall_tps", LLAMA_SERVER, share)
        for clients, share in ((1, 1.0), (4, 1.15), (8, 1.15))
    ),
)
