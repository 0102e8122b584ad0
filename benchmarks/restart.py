"""Scenario `restart`: a long prompt asked again after the server was stopped and started on the same data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.load import ask
from benchmarks.prompts import Writer
from benchmarks.scenario import Bench, Sample, Scenario
from benchmarks.targets import Spec, Target


def measure(bench: Bench) -> Iterator[Sample]:
    """Ask, stop, start, load the model with another request, ask the same."""
    weights, words = bench.model(), bench.size(2000, 200)
    for turn in range(bench.rounds):
        for target in bench.targets:
            again = partial(_ask_again, target, weights, Writer(turn).text(words))
            yield from bench.attempt(target.name, f"{words} tokens", turn, again)


def _ask_again(target: Target, weights: Path, text: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as data:
        first, again = (_ttft(target, Spec(weights, data=Path(data)), text) for _ in range(2))
    return {"ttft_p50_s": first, "ttft_again_s": again, "ttft_share": again / first}


def _ttft(target: Target, spec: Spec, text: str) -> float:
    with target.start(spec) as server:
        server.warm_up()
        [answer] = server.load([[ask(text, 8)]]).answers
        return answer.ttft_s


RESTART = Scenario(
    "restart",
    "a prompt of 2,000 tokens: TTFT the first time, and after the server was stopped and started again",
    measure,
    ("ttft_again_s", "ttft_share"),
)
