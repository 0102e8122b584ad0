"""Scenario `growth`: a conversation of a thousand turns. Does a turn cost more because of the turns before it?

On a model that costs next to nothing, so that the server's own work with a long history shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

from benchmarks.load import Ask
from benchmarks.prompts import Writer
from benchmarks.scenario import Bench, Sample, Scenario, plural
from benchmarks.targets import Running, Spec

WORDS = 4
TOKENS = 4
TURN_TOKENS = 36
"""Of a question, its answer and the template around them, at most."""


def measure(bench: Bench) -> Iterator[Sample]:
    """One conversation each round and target."""
    turns = bench.size(1000, 20)
    window = turns * TURN_TOKENS + 1024
    with bench.servers(Spec(bench.model("long-4m"), 1, 4 * window)) as servers:
        yield from bench.each(servers, plural(turns, "turn"), partial(_converse, turns))


def _converse(turns: int, server: Running, seed: int) -> dict[str, float]:
    writer = Writer(seed)
    messages: tuple[tuple[str, str], ...] = ()
    seconds = []
    tenth = max(turns // 10, 1)
    computed = None
    for turn in range(turns):
        if turn == turns - tenth:
            computed = server.prefill_tokens()
        messages += (("user", writer.text(WORDS)),)
        [answer] = server.load([[Ask(messages, TOKENS)]]).answers
        seconds.append(answer.ended - answer.sent)
        messages += (("assistant", answer.text),)
    first, last = statistics.median(seconds[:tenth]), statistics.median(seconds[-tenth:])
    numbers = {"turn_first_s": first, "turn_last_s": last, "growth": last / first}
    if computed is not None:
        numbers["prefill_per_turn"] = ((server.prefill_tokens() or 0.0) - computed) / tenth
    return numbers


GROWTH = Scenario(
    "growth",
    "1,000 turns of 4 words and 4 tokens back, each sent with the whole conversation before it",
    measure,
    ("turn_last_s", "growth"),
)
