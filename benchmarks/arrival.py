"""Scenario `arrival`: a long prompt arrives while four chats are being answered. Who waits for whom?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.load import ask, percentile
from benchmarks.prompts import Writer
from benchmarks.scenario import Bench, Sample, Scenario
from benchmarks.targets import Running, Spec

CHATS = 4
ALONE = 64


def measure(bench: Bench) -> Iterator[Sample]:
    """The chats alone, and with the long prompt among them; gaps while that is being read beside those alone."""
    words = bench.size(4000, 300)
    with bench.servers(Spec(bench.model(), CHATS + 1, (CHATS + 1) * bench.size(4608, 512))) as servers:
        chats = partial(_arrive, words, bench.size(400, 60), bench.size(4.0, 0.05))
        yield from bench.each(servers, f"{words} tokens among {CHATS} chats", chats)


def _arrive(words: int, tokens: int, at_s: float, server: Running, turn: int) -> dict[str, float]:
    """The chats alone for a while, and again with the long prompt coming at `at_s`."""
    writer = Writer(turn)
    alone = server.load([[ask(writer.text(32), ALONE)] for _ in range(CHATS)])
    chats = [[ask(writer.text(32), tokens)] for _ in range(CHATS)]
    load = server.load([*chats, [ask(writer.text(words), 8, at_s=at_s)]])
    *answers, late = load.answers
    gaps = [gap for answer in answers for gap in answer.gaps(late.sent, late.chunks[0])] or [0.0]
    calm = [gap for answer in alone.answers for gap in answer.gaps()]
    return {
        "ttft_p50_s": late.ttft_s,
        "gap_p50_s": percentile(gaps, 0.5),
        "gap_p95_s": percentile(gaps, 0.95),
        "gap_max_s": max(gaps),
        "slowdown": percentile(gaps, 0.95) / percentile(calm, 0.95),
        "client_share": load.client_share,
    }


ARRIVAL = Scenario(
    "arrival",
    "4 chats decode when a 4,000-token prompt comes: TTFT of that, gaps between the chats' tokens while it is read",
    measure,
    ("ttft_p50_s", "gap_p95_s", "slowdown"),
)
