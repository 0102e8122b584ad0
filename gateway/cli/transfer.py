"""`pull` and `push`: models from and to registries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from engines.request import JSON
from gateway.cli.client import Client, CommandFailed, connect
from gateway.cli.models import ModelName
from gateway.cli.progress import Step, print_steps, show_steps

_INTERRUPTED = 130  # what a shell reports for SIGINT

Show = Callable[[Iterable[Step]], None]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow registries without https or with any certificate.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print the server's JSON, one object a line.")]


def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name in a registry.")],
    insecure: Insecure = False,
    as_json: AsJSON = False,
) -> None:
    """Fetch a model from a registry; interrupted, the next pull goes on.

    MODEL is a name of Ollama's library (llama3.2:1b), of Hugging Face (hf.co/USER/REPOSITORY:Q4_K_M), of Docker Hub
    (docker.io/ai/smollm2) or of any other registry (registry.example.com:5000/team/model:tag).
    """
    _transfer("/api/pull", model, insecure, print_steps if as_json else show_steps)


def push(model: ModelName, insecure: Insecure = False, as_json: AsJSON = False) -> None:
    """Send a model to the registry that its name says."""
    try:
        _transfer("/api/push", model, insecure, print_steps if as_json else show_steps)
    except CommandFailed as failure:
        if not any(word in str(failure).lower() for word in ("access denied", "unauthorized")):
            raise
        raise CommandFailed(
            "you are not authorized to push to this namespace, create the model under a namespace you own or sign in "
            "with `docker login`"
        ) from None


def pull_missing(client: Client, model: str, *, insecure: bool = False) -> None:
    """Pull a model that the server does not know. Raises CommandFailed."""
    try:
        client.post("/api/show", {"model": model}, dict)
    except CommandFailed as failure:
        if failure.status != 404:
            raise
        _follow(client, "/api/pull", {"model": model, "insecure": insecure}, show_steps)


def _transfer(path: str, model: str, insecure: bool, show: Show) -> None:
    with connect() as client:
        _follow(client, path, {"model": model, "insecure": insecure}, show)


def _follow(client: Client, path: str, body: JSON, show: Show) -> None:
    steps = client.stream(path, body, Step)
    try:
        show(steps)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    finally:
        steps.close()
