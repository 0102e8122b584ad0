"""Scenario `loading`: from nothing running to the first token, with the model's file in the page cache and without."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.scenario import Bench, Sample, Scenario, memory
from benchmarks.targets import Spec, Target


def measure(bench: Bench) -> Iterator[Sample]:
    """Every target is started and stopped by itself, cold and then warm."""
    weights = bench.model()
    for turn in range(bench.rounds):
        for target in bench.targets:
            for case in ("cold", "warm"):
                if case == "cold":
                    drop_from_page_cache(weights)
                yield from bench.attempt(target.name, case, turn, partial(_start, target, Spec(weights)))


def _start(target: Target, spec: Spec) -> dict[str, float]:
    began = time.perf_counter()
    with target.start(spec) as server:
        healthy = time.perf_counter()
        server.warm_up()
        ready = time.perf_counter()
        return {"start_s": healthy - began, "first_token_s": ready - began} | memory(server)


def drop_from_page_cache(path: Path) -> None:
    """Make the next reader go to the disk. What another process has mapped stays."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


LOADING = Scenario(
    "loading",
    "start of the process until its first answer of 4 tokens; cold: the model's file is not in memory",
    measure,
    ("first_token_s",),
)
