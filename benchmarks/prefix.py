"""Scenario `prefix`: eight clients whose prompts share their first 600 words. How often is that beginning computed?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.load import Load, ask
from benchmarks.prompts import Writer
from benchmarks.scenario import Bench, Sample, Scenario, plural
from benchmarks.targets import Running, Spec

CLIENTS = 8
REQUESTS = 2
QUESTION = 24
ENDING_TOKENS = 13  # of ChatML after a question: <|im_end|>, a line, and the opening of the answer byte by byte


def measure(bench: Bench) -> Iterator[Sample]:
    """A prefix that no server has seen, every round."""
    words = bench.size(600, 100)
    with bench.servers(Spec(bench.model(), CLIENTS, 16384)) as servers:
        case = f"{words} words, {plural(CLIENTS * REQUESTS, 'request')}"
        yield from bench.each(servers, case, partial(_ask, words, bench.size(32, 4)))


def _ask(words: int, tokens: int, server: Running, turn: int) -> dict[str, float]:
    writer = Writer(turn)
    prefix = writer.text(words)
    asked = [[ask(writer.text(QUESTION), tokens, system=prefix) for _ in range(REQUESTS)] for _ in range(CLIENTS)]
    before = server.prefill_tokens()
    load = server.load(asked)
    numbers = {"wall_s": load.wall_s} | load.numbers()
    if before is not None:
        numbers["computed_share"] = ((server.prefill_tokens() or 0.0) - before) / distinct_tokens(load)
    return numbers


def distinct_tokens(load: Load) -> int:
    """Prompt tokens of all requests with the shared beginning, up to each one's question, counted once."""
    lengths = [answer.prompt_tokens for answer in load.answers]
    shared = lengths[0] - QUESTION - ENDING_TOKENS
    return sum(lengths) - (len(lengths) - 1) * shared


PREFIX = Scenario(
    "prefix",
    "8 clients, 2 requests each, all with the same 600-word system prompt and another question; 32 tokens back",
    measure,
    ("wall_s", "computed_share"),
)
