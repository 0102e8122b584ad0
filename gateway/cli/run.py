"""`headwater run`: ask a model once, or talk with it."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from engines.request import JSON
from gateway.cli.chat import Chat
from gateway.cli.client import CommandFailed, connect
from gateway.cli.interactive import converse
from gateway.cli.models import ModelName
from gateway.cli.parameters import BadParameter, parse_assignments
from gateway.cli.transfer import Insecure, pull_missing

_INTERRUPTED = 130  # what a shell reports for SIGINT


def run(
    model: ModelName,
    prompt: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Asked once.")] = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Such as temperature=0.2.")] = None,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="Let the model think first; --think=high says how much.")
    ] = None,
    think_level: Annotated[str, typer.Option(hidden=True)] = "",
    hidethinking: Annotated[bool, typer.Option("--hidethinking", help="Do not show what the model thinks.")] = False,
    output_format: Annotated[str, typer.Option("--format", help="json, or a JSON schema that answers follow.")] = "",
    keepalive: Annotated[str | None, typer.Option(help="How long the model stays loaded: 5m, 0, -1.")] = None,
    verbose: Annotated[bool, typer.Option(help="Print statistics after each answer.")] = False,
    nowordwrap: Annotated[bool, typer.Option("--nowordwrap", help="Leave long lines to the terminal.")] = False,
    insecure: Insecure = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's JSON, one object a line.")] = False,
) -> None:
    """Talk with a model, which is pulled first if it is not there; with PROMPT or piped input, answer once.

    Piped input comes before PROMPT: `headwater run llama3.2 "Summarise this:" < report.txt`.
    """
    try:
        options = parse_assignments(option or [])
    except BadParameter as error:
        raise CommandFailed(f"--option: {error}", exit_code=2) from None
    question = _question(prompt or [])
    if as_json and question is None:
        raise CommandFailed("--json needs a PROMPT or piped input", exit_code=2)
    with connect() as client:
        pull_missing(client, model, insecure=insecure)
        chat = Chat(
            client,
            model,
            system,
            options,
            think=think_level or think,
            format=_format(output_format),
            keep_alive=_keep_alive(keepalive),
            verbose=verbose,
            hides_thinking=hidethinking,
            wraps=not nowordwrap,
            as_json=as_json,
        )
        if question is None:
            converse(chat)
            return
        try:
            chat.ask(question)
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None


class RunCommand(TyperCommand):
    """`run` with a value for `--think` that may be left out, which only stands behind an equals sign."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Say the value in options that typer knows."""
        end = args.index("--") if "--" in args else len(args)
        said = [word for arg in args[:end] for word in _think_words(arg)]
        return super().parse_args(ctx, [*said, *args[end:]])


def _think_words(argument: str) -> list[str]:
    if not argument.startswith("--think="):
        return [argument]
    value = argument.removeprefix("--think=")
    return {"true": ["--think"], "false": ["--no-think"]}.get(value, ["--think-level", value])


def _format(text: str) -> JSON:
    """The API's `format`: the word `json`, or a schema."""
    if text in ("", "json"):
        return text or None
    try:
        schema = json.loads(text)
    except ValueError:
        schema = None
    if not isinstance(schema, dict):
        raise CommandFailed("--format: expected json or a JSON schema, which is an object", exit_code=2)
    return schema


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
