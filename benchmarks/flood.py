"""Scenario `flood`: one person chats while a batch job of another client asks as fast as it can."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count

from benchmarks.load import Ask, Load, ask
from benchmarks.prompts import Writer
from benchmarks.scenario import Bench, Sample, Scenario
from benchmarks.targets import Running, Spec

BATCH_CLIENTS = 16


def measure(bench: Bench) -> Iterator[Sample]:
    """The chat alone, and beside the flood."""
    with bench.servers(Spec(bench.model(), BATCH_CLIENTS + 1, 16384)) as servers:
        for case, clients in (("chat alone", 0), (f"beside {BATCH_CLIENTS} batch clients", BATCH_CLIENTS)):
            yield from bench.each(servers, case, partial(_chat, bench, clients))


def _chat(bench: Bench, clients: int, server: Running, turn: int) -> dict[str, float]:
    """The chat's own numbers, but the throughput of all."""
    writer = Writer(2 * turn + bool(clients))
    at_s, tokens = bench.size(2.0, 0.1), bench.size(48, 8)
    chat = [ask(writer.text(48), tokens, client="OpenWebUI/1", at_s=at_s) for _ in range(bench.size(6, 2))]
    load = server.load([chat], [_batch(writer) for _ in range(clients)])
    own = Load(load.clients[:1], load.client_share)
    return own.numbers() | {"wall_tps": load.completion_tokens / load.wall_s}


def _batch(writer: Writer) -> Iterator[Ask]:
    for _ in count():
        yield ask(writer.text(200), 32, client="python-requests/2")


FLOOD = Scenario(
    "flood",
    "one chat of 6 turns, alone and while 16 batch clients ask without a pause; TTFT and gaps are the chat's",
    measure,
    ("ttft_p50_s", "gap_p95_s"),
)
