"""`python -m benchmarks all`, or one scenario: Headwater beside whatever else is given, in one run and one table."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.arrival import ARRIVAL
from benchmarks.clients import CLIENTS
from benchmarks.constrained import run_constrained
from benchmarks.decode import DECODE
from benchmarks.embeddings import EMBEDDINGS
from benchmarks.flood import FLOOD
from benchmarks.growth import GROWTH
from benchmarks.hop import HOP
from benchmarks.loading import LOADING
from benchmarks.models import OUT, SHAPES, ensure_model
from benchmarks.prefix import PREFIX
from benchmarks.report import Found, missed, print_constrained, print_found, print_soak, save_found
from benchmarks.restart import RESTART
from benchmarks.scenario import NUMBERS, Bench, Sample, Scenario
from benchmarks.server import DEMO, run_server
from benchmarks.short import SHORT
from benchmarks.soak import CHAT, EMBED, SETTINGS, soak
from benchmarks.targets import Headwater, LlamaServer, Ollama, PythonServer, Target

SCENARIOS = (DECODE, CLIENTS, PREFIX, ARRIVAL, FLOOD, SHORT, EMBEDDINGS, LOADING, GROWTH, RESTART, HOP)

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure Headwater beside llama.cpp and others.")

LlamaServerPath = Annotated[
    Path | None, typer.Option(envvar="LLAMA_SERVER", exists=True, dir_okay=False, help="llama-server's binary.")
]
LlamaServerFlags = Annotated[str, typer.Option(help="Further flags of llama-server.")]
PythonPath = Annotated[
    Path | None,
    typer.Option(envvar="LLAMA_CPP_PYTHON", exists=True, help="A Python that has llama-cpp-python[server]."),
]
OllamaUrl = Annotated[str, typer.Option(envvar="OLLAMA_URL", help="Address of an Ollama that runs.")]
Shapes = Annotated[list[str] | None, typer.Option("--shape", help=f"Models: {', '.join(SHAPES)}; repeatable.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds; the median of their ratios counts.")]
Quick = Annotated[bool, typer.Option("--quick", help="Miniature models and small numbers: does it run?")]
Out = Annotated[Path, typer.Option(help="Where models and results are kept.")]


def _command(scenarios: Sequence[Scenario]) -> Callable[..., None]:
    """The command that runs these."""

    def run(
        llama_server: LlamaServerPath = None,
        llama_server_flags: LlamaServerFlags = "",
        llama_cpp_python: PythonPath = None,
        ollama: OllamaUrl = "",
        shape: Shapes = None,
        rounds: Rounds = 3,
        quick: Quick = False,
        out: Out = OUT,
    ) -> None:
        targets: list[Target] = [Headwater()]
        targets += [LlamaServer(llama_server, llama_server_flags)] if llama_server else []
        targets += [PythonServer(llama_cpp_python)] if llama_cpp_python else []
        targets += [Ollama(ollama)] if ollama else []
        bench = Bench(targets, rounds=1 if quick else rounds, quick=quick, directory=out)
        if shape:
            bench.shapes = _known(shape)
        console = Console()
        found = run_scenarios(scenarios, bench, console)
        print_found(found, bench.flags, bench.rounds, console)
        options = {"rounds": bench.rounds, "quick": quick, "shapes": list(bench.shapes)}
        for path in save_found(found, bench.flags, options, out):
            console.print(f"written: {path}", highlight=False)
        if any(one.failures for one in found) or missed(found):
            raise typer.Exit(1)

    return run


def run_scenarios(scenarios: Sequence[Scenario], bench: Bench, console: Console) -> list[Found]:
    """Every scenario in turn; an interrupt ends the run and keeps what there is."""
    results = [Found(scenario) for scenario in scenarios]
    try:
        for found in results:
            _run_scenario(found, bench, console)
    except KeyboardInterrupt:
        console.print("interrupted")
    return [found for found in results if found.samples or found.failures]


def _run_scenario(found: Found, bench: Bench, console: Console) -> None:
    name = found.scenario.name
    bench.failures = found.failures
    with console.status(name) as status:
        bench.tell = lambda step: status.update(f"{name}: {step}")
        for sample in found.scenario.measure(bench):
            found.samples.append(sample)
            console.print(_brief(found.scenario, sample), style="dim", highlight=False)


def _brief(scenario: Scenario, sample: Sample) -> str:
    numbers = [(NUMBERS[name], sample.numbers[name]) for name in scenario.drawn if name in sample.numbers]
    texts = [f"{number.label} {value * number.scale:.{number.digits}f}" for number, value in numbers]
    return f"{scenario.name}: {sample.case}, {sample.via}: {', '.join(texts)}"


def _known(shapes: Sequence[str]) -> Sequence[str]:
    if unknown := set(shapes) - SHAPES.keys():
        raise typer.BadParameter(f"{unknown.pop()} is none of {', '.join(SHAPES)}", param_hint="--shape")
    return shapes


@app.command("models")
def write_models(out: Out = OUT) -> None:
    """Write every model that a scenario uses."""
    for shape in SHAPES.values():
        typer.echo(ensure_model(shape, out))


@app.command("soak")
def run_soak(
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 10_000,
    minutes: Annotated[float, typer.Option(min=0, help="Longest time; 0 is without limit.")] = 0,
    clients: Annotated[int, typer.Option(min=1, help="Concurrent clients.")] = 16,
    leaving: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that hang up early.")] = 0.2,
    out: Out = OUT,
) -> None:
    """Mixed load on small models: exits with 1 when a request, a token or a KV cell is unaccounted for."""
    console = Console()
    models = {CHAT: DEMO, EMBED: ensure_model(SHAPES["nomic-137m"].miniature, out)}
    with run_server(models, settings=SETTINGS) as server, Progress(console=console) as progress:
        task = progress.add_task("soak", total=requests)
        result = asyncio.run(
            soak(
                server,
                num_requests=requests,
                num_clients=clients,
                leaving=leaving,
                limit_s=60 * minutes or math.inf,
                tell=lambda num_sent: progress.update(task, completed=num_sent),
            )
        )
    print_soak(result, console)
    if result.problems:
        raise typer.Exit(1)


@app.command("schemas")
def run_schemas(
    count: Annotated[int, typer.Option(min=1, help="Whole answers wanted.")] = 10_000,
    clients: Annotated[int, typer.Option(min=1, help="Concurrent clients.")] = 16,
) -> None:
    """Answers of the demo model to random JSON schemas: exits with 1 when one does not match by `jsonschema`."""
    console = Console()
    with run_server({"demo": DEMO}) as server, Progress(console=console) as progress:
        task = progress.add_task("schemas", total=count)
        result = run_constrained(
            server.base_url,
            "demo",
            count=count,
            clients=clients,
            tell=lambda now: progress.update(task, completed=now.num_whole),
        )
    print_constrained(result, console)
    if result.problems:
        raise typer.Exit(1)


app.command("all", help="Every scenario.")(_command(SCENARIOS))
for scenario in SCENARIOS:
    app.command(scenario.name, help=scenario.about)(_command([scenario]))


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
