"""Scenario `decode`: tokens per second through the whole gateway, beside llama.cpp alone.

The two alternate, so that both see the same machine, and a ratio is the median of the rounds' own ratios: a machine
that slows down for a minute slows both halves of a round. The limit gets the worker's own context parameters and
prompts as long as the worker's, template included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks.bare import BareRates, run_bare
from benchmarks.hop import Hop
from benchmarks.load import OLLAMA, OPENAI, LoadRates
from benchmarks.server import run_server
from engines.inference import LoadConfig

MODEL = "bench"
DEMO = "demo"
DEMO_WEIGHTS = Path(__file__).parent.parent / "engines" / "store" / "demo" / "demo.gguf"
DIALECTS = (OLLAMA, OPENAI)


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


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """Everything that was measured. `config` is what the worker was started with."""

    config: LoadConfig
    rounds: list[Round]
    hop: Hop | None


def measure_decode(weights: Path, options: DecodeOptions, report: Callable[[str], None]) -> DecodeResult:
    """Run the scenario; `report` is told of each round. Raises ServerFailed or RequestFailed."""
    seeds = count(1)
    with run_server({MODEL: weights, DEMO: DEMO_WEIGHTS}) as server:
        warm = _load(server, 0, MODEL, DecodeOptions((1,), 8, options.prompt, 1, 0), 1)
        config = server.worker_of(weights).config
        rounds = []
        for clients in options.clients:
            for turn in range(options.repeat):
                bare = run_bare(_bare_options(weights, config, clients, warm.prompt_tokens, options.tokens))
                gateway = {}
    return DecodeResult(config, rounds, None)
