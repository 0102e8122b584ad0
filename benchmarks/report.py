"""What a scenario found, as a table for people, JSON for programs and a plot for documents."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.decode import DIALECTS, DecodeOptions, DecodeResult
from benchmarks.soak import Soak
from engines.request import JSON

MAX_NOISE = 0.1
"""Rounds of a quiet machine differ by 1 to 4 %."""

CAPTION = (
    "bare: llama_decode and argmax alone, in its own process. decode: tokens/s of all clients together while all "
    "of them decode; wall: the whole run, prefill included; ratio: decode beside bare, median of the rounds."
)


def print_decode(result: DecodeResult, options: DecodeOptions, console: Console) -> None:
    """One table, a block of rows for each number of clients, and a line for the hop."""
    title = f"{options.tokens} tokens a client, median of {options.repeat}"
    headings = ("clients", "via", "decode tok/s", "ratio", "wall tok/s", "TTFT ms", "gap p50 ms", "gap p95 ms")
    table = Table(title=title, caption=CAPTION)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 1 else "right")
    for clients in options.clients:
        for row in _rows(result, clients):
            table.add_row(*row)
        table.add_section()
    console.print(table)
    if result.noise > MAX_NOISE:
        console.print(f"NOT TO BE TRUSTED: equal rounds differ by {result.noise:.0%}, so the machine was not quiet")
    if result.hop is not None:
        first_ms, whole_ms = result.hop.first_s * 1e3, result.hop.whole_s * 1e3
        console.print(f"gateway hop: {first_ms:+.2f} ms to the first byte, {whole_ms:+.2f} ms to the last, which waits")
        console.print(f"for the ledger's commit; median of {options.hops} requests each way, demo model")


def print_soak(result: Soak, console: Console) -> None:
    """What was sent, what the books say, how memory went, and every problem."""
    mib = [round(size / 2**20) for size in result.memory]
    console.print(f"{result.num_sent} requests in {result.seconds:.0f} s, {result.num_left} hung up early")
    prompt, cached, generated, wasted = (
        result.ledger[f"{name}_tokens"] for name in ("prompt", "cached", "completion", "wasted")
    )
    console.print(f"tokens: {prompt} of prompts, {cached} of them cached; {generated} generated, {wasted} for nobody")
    console.print(f"memory, MiB, in equal steps: {' '.join(map(str, mib))}")
    console.print("\n".join(result.problems) or "everything is accounted for")


def _rows(result: DecodeResult, clients: int) -> list[tuple[str, ...]]:
    rounds = result.of(clients)
    bare = median(each.bare.decode_tps for each in rounds)
    rows: list[tuple[str, ...]] = [(str(clients), "bare", f"{bare:.1f}", "1", "", "", "", "")]
    for dialect in DIALECTS:
        loads = [each.gateway[dialect.name] for each in rounds]
        numbers = (
            f"{median(load.decode_tps for load in loads):.1f}",
            f"{result.ratio(clients, dialect.name):.3f}",
            f"{median(load.wall_tps for load in loads):.1f}",
            f"{median(load.ttft_s for load in loads) * 1e3:.0f}",
            f"{median(load.gap_p50_s for load in loads) * 1e3:.1f}",
            f"{median(load.gap_p95_s for load in loads) * 1e3:.1f}",
        )
        rows.append((str(clients), dialect.name, *numbers))
    return rows


def save_decode(result: DecodeResult, options: DecodeOptions, weights: Path, directory: Path) -> list[Path]:
    """Write `decode.json` and `decode.png`; returns where they are."""
    directory.mkdir(parents=True, exist_ok=True)
    record, plot = directory / "decode.json", directory / "decode.png"
    ratios = {
        str(clients): {dialect.name: result.ratio(clients, dialect.name) for dialect in DIALECTS}
        for clients in options.clients
    }
    body = {"machine": _machine(), "model": weights.name, "options": asdict(options), "ratios": ratios}
    record.write_text(json.dumps(body | asdict(result), indent=2) + "\n")
    _plot(result, options).savefig(plot, dpi=120)
    return [record, plot]


def _machine() -> JSON:
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
    }


def _plot(result: DecodeResult, options: DecodeOptions) -> Figure:
    """Bars of decode throughput for each number of clients; every round a dot, so that noise is seen."""
    figure = Figure(figsize=(2 + 2.5 * len(options.clients), 4), layout="constrained")
    axes = figure.subplots()
    series = {"bare llama.cpp": [[each.bare.decode_tps for each in result.of(n)] for n in options.clients]}
    for name in (dialect.name for dialect in DIALECTS):
        series[f"Headwater, {name}"] = [
            [each.gateway[name].decode_tps for each in result.of(n)] for n in options.clients
        ]
    width = 0.8 / len(series)
    for index, (label, groups) in enumerate(series.items()):
        places = [place + (index - (len(series) - 1) / 2) * width for place in range(len(groups))]
        axes.bar(places, [median(group) for group in groups], width * 0.92, label=label)
        for place, group in zip(places, groups, strict=True):
            axes.plot([place] * len(group), group, "k.", markersize=4)
    axes.set_xticks(range(len(options.clients)), [f"{n} client{'s' * (n > 1)}" for n in options.clients])
    axes.set_ylabel("decode, tokens/s")
    axes.set_title("Decode throughput through the gateway")
    axes.legend(loc="upper left")
    return figure
