"""`headwater run`: ask a model once, or talk with it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gateway.cli.chat import Chat
from gateway.cli.client import CommandFailed, connect
from gateway.cli.interactive import converse
from gateway.cli.models import ModelName
from gateway.cli.parameters import BadParameter, parse_assignments
from gateway.cli.transfer import pull_missing

_INTERRUPTED = 130  # what a shell reports for SIGINT


def run(
    model: ModelName,
    prompt: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Asked once.")] = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Such as temperature=0.2.")] = None,
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="Let the model think first.")] = None,
    keepalive: Annotated[str | None, typer.Option(help="How long the model stays loaded: 5m, 0, -1.")] = None,
    verbose: Annotated[bool, typer.Option(help="Print statistics after each answer.")] = False,
) -> None:
    """Talk with a model, which is pulled first if it is not there; with PROMPT or piped input, answer once.

    Piped input comes before PROMPT: `headwater run llama3.2 "Summarise this:" < report.txt`.
    """
    try:
        options = parse_assignments(option or [])
    except BadParameter as error:
        raise CommandFailed(f"--option: {error}", exit_code=2) from None
    question = _question(prompt or [])
    with connect() as client:
        pull_missing(client, model)
        chat = Chat(client, model, system, options, think, _keep_alive(keepalive), verbose)
        if question is None:
            converse(chat)
            return
        try:
            chat.ask(question)
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None


def _question(words: list[str]) -> str | None:
    """What to ask once, or None to converse. Bytes that are no text become replacement characters."""
    parts = [" ".join(words).encode(errors="replace").decode()] if words else []
    if not sys.stdin.isatty():
        parts.insert(0, sys.stdin.buffer.read().decode(errors="replace"))
    elif not parts:
        return None
    question = "\n".join(part for part in parts if part.strip())
    if not question:
        raise CommandFailed("there is nothing to ask: PROMPT and the piped input are empty", exit_code=2)
    return question


def _keep_alive(text: str | None) -> str | int | None:
    """Ollama's API takes seconds as a number and durations with a unit as a string (spec/ollama.md section 2)."""
    if text is not None and text.lstrip("-").isdecimal():
        return int(text)
    return text
