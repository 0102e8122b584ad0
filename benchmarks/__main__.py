"""`python -m benchmarks SCENARIO`: one command for each scenario."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from benchmarks.decode import DecodeOptions, measure_decode
from benchmarks.models import OUT, SHAPES, ensure_model
from benchmarks.report import print_decode, save_decode

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure Headwater beside llama.cpp alone.")


@app.callback()
def benchmarks() -> None:
    """Keeps `decode` a command of its own while it is the only one."""


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
