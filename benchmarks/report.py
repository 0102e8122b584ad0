"""What scenarios found, as a table for people, JSON for programs and a plot for documents."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from textwrap import fill

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table

from benchmarks.constrained import Constrained
from benchmarks.scenario import NUMBERS, Goal, Number, Sample, Scenario
from benchmarks.soak import Soak
from benchmarks.targets import HEADWATER
from engines.request import JSON

MAX_NOISE = 0.1
"""Rounds of a quiet machine differ by 1 to 4 %."""

CAPTION = (
    "median of the rounds; x: Headwater beside that server, median of the rounds' own ratios, "
    "green where Headwater is better"
)


@dataclass(slots=True)
class Found:
    """The samples of one scenario, and why there are not more of them."""

    scenario: Scenario
    samples: list[Sample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def cases(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(sample.case for sample in self.samples))

    @property
    def vias(self) -> list[str]:
        """Everything that was measured, Headwater first."""
        vias = dict.fromkeys(sample.via for sample in self.samples)
        return sorted(vias, key=lambda via: not via.startswith(HEADWATER))

    def rounds(self, case: str, number: str, via: str) -> dict[int, float]:
        """The values of each round."""
        return {
            sample.turn: sample.numbers[number]
            for sample in self.samples
            if sample.case == case and sample.via == via and number in sample.numbers
        }

    def value(self, case: str, number: str, via: str = HEADWATER) -> float | None:
        """The median of the rounds; None where it was not measured."""
        values = self.rounds(case, number, via).values()
        return median(values) if values else None

    def ratio(self, case: str, number: str, beside: str, via: str = HEADWATER) -> float | None:
        """What one has of the other's: the median of the rounds' own ratios; None where there is none."""
        ours, theirs = self.rounds(case, number, via), self.rounds(case, number, beside)
        ratios = [ours[turn] / theirs[turn] for turn in ours.keys() & theirs.keys() if theirs[turn]]
        return median(ratios) if ratios else None

    def noise(self, case: str, number: str, via: str = HEADWATER) -> float:
        """By which share of the largest the smallest of rounds that should be equal fell behind."""
        values = self.rounds(case, number, via).values()
        return 1 - min(values) / max(values) if values and max(values) else 0.0


def print_found(found: Sequence[Found], flags: Mapping[str, set[str]], rounds: int, console: Console) -> None:
    """One table of every number and ratio, then what else a reader must know."""
    vias = sorted(
        dict.fromkeys(via for one in found for via in one.vias), key=lambda via: not via.startswith(HEADWATER)
    )
    table = Table(title=f"Headwater beside others, {rounds} rounds", caption=CAPTION)
    for heading in ("scenario", "case", "number"):
        table.add_column(heading)
    for via in vias:
        table.add_column(via, justify="right")
    table.add_column("goal", justify="right")
    for one in found:
        for row in _rows(one, vias):
            table.add_row(*row)
        table.add_section()
    console.print(table)
    for one in found:
        console.print(f"[bold]{one.scenario.name}[/bold]: {one.scenario.about}")
        for failure in one.failures:
            console.print(f"failed: {failure}", style="red", highlight=False, markup=False)
    for name, each in flags.items():
        console.print(f"{name} was started with {', or '.join(sorted(each))}", highlight=False)
    for line in _noisy(found):
        console.print(line)


def print_soak(result: Soak, console: Console) -> None:
    """What was sent, what the books say, how memory went, and every problem."""
    mib = [round(size / 2**20) for size in result.memory]
    console.print(f"{result.num_sent} requests in {result.seconds:.0f} s, {result.num_left} hung up early")
    prompt, cached, generated, wasted = (
        result.ledger[f"{name}_tokens"] for name in ("prompt", "cached", "completion", "wasted")
    )
    console.print(f"tokens: {prompt} of prompts, {cached} of them cached; {generated} generated, {wasted} for nobody")
    console.print(f"memory, MiB, in equal steps: {' '.join(map(str, mib))}")
    console.print("\n".join(result.problems) or "everything is accounted for", markup=False)


def print_constrained(result: Constrained, console: Console) -> None:
    """How many answers matched their schemas, how fast they came, and what was wrong with the others."""
    console.print(
        f"{result.num_whole} whole answers: {result.num_valid} valid, {result.num_invalid} invalid; "
        f"{result.num_refused} schemas refused, {result.num_cut} answers cut off by their token limit"
    )
    rate, tokens = result.num_whole / result.seconds, result.completion_tokens / result.seconds
    console.print(f"{result.seconds:.0f} s, {rate:.1f} answers/s, {tokens:.0f} tokens/s")
    console.print("\n".join(result.problems) or "every answer matches its schema", markup=False)


def _rows(found: Found, vias: Sequence[str]) -> list[list[str]]:
    rows = []
    for case in found.cases:
        for number, reads in NUMBERS.items():
            if found.value(case, number) is None and not any(found.rounds(case, number, via) for via in vias):
                continue
            cells = [_cell(found, case, number, reads, via) for via in vias]
            rows.append([found.scenario.name, case, reads.label, *cells, _goal(found, case, number)])
    return [["" if i < 2 and n and row[i] == rows[n - 1][i] else row[i] for i in range(len(row))]
            for n, row in enumerate(rows)]  # fmt: skip


def _cell(found: Found, case: str, number: str, reads: Number, via: str) -> str:
    value = found.value(case, number, via)
    if value is None:
        return ""
    text = f"{value * reads.scale:.{reads.digits}f}"
    ratio = None if via == HEADWATER else found.ratio(case, number, via)
    if ratio is None or reads.more_is_better is None:
        return text
    colour = "green" if (ratio >= 1) == reads.more_is_better else "red"
    return f"{text} [{colour}]x {ratio:.2f}[/{colour}]"


def _goal(found: Found, case: str, number: str) -> str:
    texts = []
    for goal in found.scenario.goals:
        if (goal.case, goal.number) == (case, number) and (ratio := found.ratio(case, number, goal.beside)) is not None:
            colour = "green" if ratio >= goal.at_least else "red"
            texts.append(f"[{colour}]{ratio:.3f}[/{colour}] of {goal.at_least:g}")
    return " ".join(texts)


def missed(found: Sequence[Found]) -> list[Goal]:
    """Goals that were measured and not reached."""
    return [
        goal
        for one in found
        for goal in one.scenario.goals
        if (ratio := one.ratio(goal.case, goal.number, goal.beside)) is not None and ratio < goal.at_least
    ]


def _noisy(found: Sequence[Found]) -> list[str]:
    """Throughputs that cannot be relied on."""
    worst = [
        (one.noise(case, number, via), f"{one.scenario.name}, {case}, {NUMBERS[number].label} of {via}")
        for one in found
        for case in one.cases
        for number in one.scenario.drawn
        for via in one.vias
        if NUMBERS[number].more_is_better
    ]
    return [f"NOT TO BE TRUSTED: rounds of {what} differ by {noise:.0%}" for noise, what in worst if noise > MAX_NOISE]


def save_found(
    found: Sequence[Found], flags: Mapping[str, set[str]], options: Mapping[str, JSON], directory: Path
) -> list[Path]:
    """Write `bench.json` and `bench.png`; returns where they are."""
    directory.mkdir(parents=True, exist_ok=True)
    record, plot = directory / "bench.json", directory / "bench.png"
    body = {
        "machine": _machine(),
        "options": dict(options),
        "flags": {name: sorted(each) for name, each in flags.items()},
        "scenarios": {one.scenario.name: _record(one) for one in found},
    }
    record.write_text(json.dumps(body, indent=2) + "\n")
    _plot(found).savefig(plot, dpi=110)
    return [record, plot]


def _record(found: Found) -> JSON:
    ratios = {
        case: {via: {number: found.ratio(case, number, via) for number in NUMBERS if found.rounds(case, number, via)}
               for via in found.vias if via != HEADWATER}
        for case in found.cases
    }  # fmt: skip
    return {
        "about": found.scenario.about,
        "failures": found.failures,
        "ratios": ratios,
        "samples": [asdict(sample) for sample in found.samples],
    }


def _machine() -> JSON:
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
    }


COLUMNS = 3
LABEL_WIDTH = 72  # characters below a panel


def _plot(found: Sequence[Found]) -> Figure:
    """Bars for each case, a panel for each drawn number; every round a dot, so that noise is seen."""
    panels = [
        (one, number)
        for one in found
        for number in one.scenario.drawn
        if any(one.rounds(case, number, via) for case in one.cases for via in one.vias)
    ]
    num_rows = max(math.ceil(len(panels) / COLUMNS), 1)
    figure = Figure(figsize=(6 * COLUMNS, 3.6 * num_rows + 0.6), layout="constrained")
    axes = figure.subplots(num_rows, COLUMNS, squeeze=False).flatten()
    vias = sorted(
        dict.fromkeys(via for one in found for via in one.vias), key=lambda via: not via.startswith(HEADWATER)
    )
    colours = {via: f"C{index}" for index, via in enumerate(vias)}
    for place, (one, number) in zip(axes, panels, strict=False):
        drawn = [via for via in vias if any(one.rounds(case, number, via) for case in one.cases)]
        width = 0.8 / len(drawn)
        reads = NUMBERS[number]
        for index, via in enumerate(drawn):
            for group, case in enumerate(one.cases):
                values = [value * reads.scale for value in one.rounds(case, number, via).values()]
                if values:
                    x = group + (index - (len(drawn) - 1) / 2) * width
                    place.bar(x, median(values), width * 0.92, color=colours[via])
                    place.plot([x] * len(values), values, "k.", markersize=3)
        place.set_xticks(
            range(len(one.cases)), [fill(case, LABEL_WIDTH // len(one.cases)) for case in one.cases], fontsize=7
        )
        better = {True: ", more is better", False: ", less is better", None: ""}[reads.more_is_better]
        place.set_title(f"{one.scenario.name}: {reads.label}{better}", fontsize=10)
        place.grid(axis="y", alpha=0.3)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    swatches = [Patch(color=colour, label=via) for via, colour in colours.items()]
    figure.legend(handles=swatches, loc="outside upper center", ncols=max(len(swatches), 1))
    return figure
