"""`headwater serve`: the server itself, in the foreground."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from gateway.cli.client import load_settings


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on, in place of OLLAMA_HOST: HOST, HOST:PORT, :PORT.")
    ] = "",
) -> None:
    """Start the server; Ctrl-C stops it."""
    settings = load_settings({**os.environ, "OLLAMA_HOST": host} if host else os.environ)
    from gateway.app import serve as serve_forever  # noqa: PLC0415 - the whole house, which no other command needs

    raise typer.Exit(serve_forever(settings))
