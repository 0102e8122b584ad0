"""`create`, `cp` and `rm`: models made from Modelfiles, named again and deleted."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from engines.errors import HeadwaterError
from engines.request import JSON
from engines.store.modelfile import Instruction, parse_modelfile
from gateway.cli.client import Client, CommandFailed, connect
from gateway.cli.models import ModelName
from gateway.cli.output import make_console, print_json
from gateway.cli.progress import Step, print_steps, show_steps
from gateway.cli.sources import Sources, digest_of, gather

_INTERRUPTED = 130  # what a shell reports for SIGINT
_DEFAULT_FILE = "Modelfile"

AsJSON = Annotated[bool, typer.Option("--json", help="Print the server's JSON, one object a line.")]


def create(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model to make.")],
    file: Annotated[Path | None, typer.Option("--file", "-f", help='Modelfile; "Modelfile" without it.')] = None,
    quantize: Annotated[str, typer.Option("--quantize", "-q", help="Type of the weights, such as q4_K_M.")] = "",
    draft_quantize: Annotated[str, typer.Option(help="Type of the draft model's weights.")] = "",
    as_json: AsJSON = False,
) -> None:
    """Make a model from a Modelfile; files that it names are sent to the server."""
    sources = _read(file)
    for warning in sources.warnings:
        make_console(stderr=True).print(warning)
    options = {"model": model, "quantize": quantize, "draft_quantize": draft_quantize}
    body = {name: value for name, value in options.items() if value}
    with connect() as client:
        steps = _steps(client, sources, body)
        try:
            (print_steps if as_json else show_steps)(steps)
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None
        finally:
            steps.close()


def copy(
    source: ModelName, destination: Annotated[str, typer.Argument(metavar="NAME")], as_json: AsJSON = False
) -> None:
    """Give a model a second name."""
    with connect() as client:
        client.send("POST", "/api/copy", {"source": source, "destination": destination})
    _tell(f"copied '{source}' to '{destination}'", {"source": source, "destination": destination}, as_json)


def remove(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Names of the models.")],
    as_json: AsJSON = False,
) -> None:
    """Unload models and delete them."""
    with connect() as client:
        for model in models:
            with suppress(CommandFailed):  # one that cannot be unloaded can be deleted all the same
                client.post("/api/generate", {"model": model, "prompt": "", "keep_alive": 0, "stream": False}, dict)
            client.send("DELETE", "/api/delete", {"model": model})
            _tell(f"deleted '{model}'", {"deleted": model}, as_json)


def _read(file: Path | None) -> Sources:
    """What the Modelfile says; without any, the folder itself is what to make a model of, as in Ollama."""
    path = file or Path(_DEFAULT_FILE)
    try:
        instructions = parse_modelfile(path.read_bytes())
    except FileNotFoundError:
        if file is not None:
            raise CommandFailed(f"{path}: there is no such file") from None
        instructions = (Instruction("from", "."),)
    except OSError as error:
        raise CommandFailed(f"cannot read {path}: {error.strerror}") from None
    except HeadwaterError as error:
        raise CommandFailed(error.message) from None
    try:
        return gather(instructions, path.parent)
    except HeadwaterError as error:
        raise CommandFailed(error.message) from None


def _steps(client: Client, sources: Sources, body: dict[str, JSON]) -> Generator[Step, None, None]:
    """Everything that is done, first here and then by the server."""
    yield Step("gathering model components")
    digests = {path: digest_of(path) for path in sources.paths}
    for path, digest in digests.items():
        total = path.stat().st_size
        for sent in client.upload(f"/api/blobs/{digest}", path):
            yield Step(f"copying file {digest}", digest, total, sent)
    yield from client.stream("/api/create", {**sources.request(digests), **body}, Step)


def _tell(text: str, said: JSON, as_json: bool) -> None:
    if as_json:
        print_json(said)
    else:
        typer.echo(text)
