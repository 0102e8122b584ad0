"""`list`, `ps`, `show` and `stop`: what is installed, what is loaded, what a model is, and unloading it.

The columns and sections are those of Ollama's command line; `--json` prints what the server said.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import typer

from engines.request import JSON
from gateway.cli import format as human
from gateway.cli.client import CommandFailed, connect
from gateway.cli.output import make_console, print_json, print_table

_COMPLETION_S = 0.5  # somebody waits with a finger on the tab key
_Time = Annotated[datetime, msgspec.Meta(tz=True)]

AsJSON = Annotated[bool, typer.Option("--json", help="Print the server's JSON.")]


class _Installed(msgspec.Struct):
    name: str
    modified_at: _Time
    size: int = 0
    digest: str = ""
    remote_model: str = ""


class _Tags(msgspec.Struct):
    models: list[_Installed]


class _Loaded(msgspec.Struct):
    name: str
    expires_at: _Time
    size: int = 0
    size_vram: int = 0
    digest: str = ""
    context_length: int = 0
    load_progress: float | None = None


class _Running(msgspec.Struct):
    models: list[_Loaded]


class _Details(msgspec.Struct):
    family: str = ""
    parameter_size: str = ""
    quantization_level: str = ""


class Description(msgspec.Struct):
    """What `/api/show` says, as far as people read it (spec/ollama.md section 4.3)."""

    details: _Details = msgspec.field(default_factory=_Details)
    model_info: dict[str, JSON] = {}
    projector_info: dict[str, JSON] | None = None
    capabilities: list[str] | None = None
    modelfile: str = ""
    parameters: str = ""
    template: str = ""
    system: str = ""
    license: str = ""
    requires: str = ""


def list_models(as_json: AsJSON = False) -> None:
    """List the installed models."""
    with connect() as client:
        if as_json:
            print_json(client.get("/api/tags", dict))
            return
        models = client.get("/api/tags", _Tags).models
    now = datetime.now(UTC)
    rows = [(m.name, m.digest[:12], _size(m), human.relative_time(m.modified_at, now)) for m in models]
    print_table(("NAME", "ID", "SIZE", "MODIFIED"), rows)


def _size(model: _Installed) -> str:
    """As Ollama's command line: what runs somewhere else takes nothing here."""
    return "-" if model.remote_model else human.size(model.size)


def list_loaded(as_json: AsJSON = False) -> None:
    """List the loaded models."""
    with connect() as client:
        if as_json:
            print_json(client.get("/api/ps", dict))
            return
        models = client.get("/api/ps", _Running).models
    now = datetime.now(UTC)
    rows = [
        (
            m.name,
            m.digest[:12],
            human.size(m.size),
            human.processor(m.size, m.size_vram),
            str(m.context_length),
            human.until(m.expires_at, now) if m.load_progress is None else f"loading {m.load_progress:.0%}",
        )
        for m in models
    ]
    print_table(("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"), rows)


def complete_model(incomplete: str) -> list[str]:
    """Names of installed models for the shell; none when the server cannot be asked quickly and quietly."""
    try:
        with connect(timeout_s=_COMPLETION_S) as client:
            models = client.get("/api/tags", _Tags).models
    except CommandFailed:
        return []
    return [model.name for model in models if model.name.startswith(incomplete)]


ModelName = Annotated[str, typer.Argument(metavar="MODEL", autocompletion=complete_model, help="Name of the model.")]


def show(
    model: ModelName,
    license_text: Annotated[bool, typer.Option("--license", help="Show the licence only.")] = False,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Show the Modelfile only.")] = False,
    parameters: Annotated[bool, typer.Option("--parameters", help="Show the parameters only.")] = False,
    template: Annotated[bool, typer.Option("--template", help="Show the template only.")] = False,
    system: Annotated[bool, typer.Option("--system", help="Show the system message only.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Show what a model is and can do."""
    said = {
        "license": license_text,
        "modelfile": modelfile,
        "parameters": parameters,
        "template": template,
        "system": system,
    }
    wanted = [part for part, is_wanted in said.items() if is_wanted]
    if len(wanted) > 1:
        raise CommandFailed(f"only one of {', '.join(f'--{part}' for part in said)} can be specified")
    with connect() as client:
        if as_json:
            print_json(client.post("/api/show", {"model": model}, dict))
            return
        description = client.post("/api/show", {"model": model}, Description)
    if wanted:
        typer.echo(human.printable(getattr(description, wanted[0])))
    else:
        print_description(description)


def stop(model: ModelName) -> None:
    """Unload a model, once its running requests are done."""
    with connect() as client:
        client.post("/api/generate", {"model": model, "prompt": "", "keep_alive": 0, "stream": False}, dict)


def print_description(description: Description) -> None:
    """Print the sections of `show`, each with its rows indented below it."""
    console = make_console()
    for title, rows in _sections(description):
        width = max(len(name) for name, _ in rows)
        console.out(f"  {title}", style="bold")
        for name, value in rows:
            console.out(human.printable(f"    {name:<{width}}    {value}".rstrip()))
        console.out("")


def _sections(description: Description) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    if rows := _model_rows(description):
        yield "Model", rows
    if description.capabilities:
        yield "Capabilities", [(capability, "") for capability in description.capabilities]
    if description.projector_info and (rows := _projector_rows(description.projector_info)):
        yield "Projector", rows
    if description.parameters.strip():
        yield "Parameters", [_parameter(line) for line in description.parameters.splitlines() if line.strip()]
    if description.system.strip():
        yield "System", _first_lines(description.system)
    if description.license.strip():
        yield "License", _first_lines(description.license)


def _model_rows(description: Description) -> list[tuple[str, str]]:
    info, details = description.model_info, description.details
    architecture = str(info.get("general.architecture") or details.family)
    counted = info.get("general.parameter_count")
    rows = {
        "architecture": architecture,
        "parameters": details.parameter_size or (human.parameters(counted) if isinstance(counted, int) else ""),
        "context length": info.get(f"{architecture}.context_length"),
        "embedding length": info.get(f"{architecture}.embedding_length"),
        "quantization": details.quantization_level,
        "requires": description.requires,
    }
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "")]


def _projector_rows(info: dict[str, JSON]) -> list[tuple[str, str]]:
    architecture = info.get("general.architecture", "")
    counted = info.get("general.parameter_count")
    rows = {
        "architecture": architecture,
        "parameters": human.parameters(counted) if isinstance(counted, int) else None,
        "embedding length": info.get(f"{architecture}.vision.embedding_length"),
        "dimensions": info.get(f"{architecture}.vision.projection_dim"),
    }
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "")]


def _parameter(line: str) -> tuple[str, str]:
    name, _, value = line.partition(" ")
    return name, value.strip()


def _first_lines(text: str, limit: int = 2) -> list[tuple[str, str]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(line, "") for line in lines[:limit] + ["..."] * (len(lines) > limit)]
