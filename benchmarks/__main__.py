"""`python -m benchmarks SCENARIO`: one command for each scenario."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.decode import DecodeOptions, measure_decode
from benchmarks.models import OUT, SHAPES, ensure_model
from benchmarks.report import print_decode, print_soak, save_decode
from benchmarks.server import run_server
from benchmarks.soak import soak

DEMO = Path(__file__).parent.parent / "engines" / "store" / "demo" / "demo.gguf"

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure Headwater beside llama.cpp alone.")


@app.command()
def decode(
    clients: Annotated[str, typer.Option(help="Numbers of concurrent clients, separated by commas.")] = "1,8",
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of each answer.")] = 128,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, the template's not counted.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 3,
    hops: Annotated[int, typer.Option(min=0, help="Requests each way for the gateway hop; 0 leaves it out.")] = 200,
    shape: Annotated[str, typer.Option(help=f"The model's shape: {', '.join(SHAPES)}.")] = "qwen2.5-0.5b",
) -> None:
    """Decode throughput through the gateway and without it, and what the gateway's hop adds."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"expected one of {', '.join(SHAPES)}", param_hint="--shape")
    options = DecodeOptions(_parse_clients(clients), tokens, prompt, repeat, hops)
    console = Console()
    with console.status("writing the model") as status:
        weights = ensure_model(SHAPES[shape])
        result = measure_decode(weights, options, status.update)
    print_decode(result, options, console)
    for path in save_decode(result, options, weights, OUT):
        console.print(f"written: {path}")


@app.command("soak")
def run_soak(
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 10_000,
    clients: Annotated[int, typer.Option(min=1, help="Concurrent clients.")] = 16,
    leaving: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that hang up early.")] = 0.2,
) -> None:
    """Mixed load on the demo model: exits with 1 when a request, a token or a KV cell is unaccounted for."""
    console = Console()
    with run_server({"soak": DEMO}) as server:
        result = asyncio.run(soak(server, "soak", num_requests=requests, num_clients=clients, leaving=leaving))
    print_soak(result, console)
    if result.problems:
        raise typer.Exit(1)


def _parse_clients(text: str) -> tuple[int, ...]:
    try:
        clients = tuple(int(part) for part in text.split(","))
    except ValueError:
        clients = ()
    if not clients or min(clients) < 1:
        raise typer.BadParameter("expected numbers such as 1,8", param_hint="--clients")
    return clients


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
