"""The `>>>` prompt of `headwater run`: reading what is typed, and the commands that begin with a slash.

Lines are remembered for the arrow keys while the session lasts, and nothing of what is said is written to disk.
"""

from __future__ import annotations

import io
import shlex
import sys
from contextlib import suppress

from gateway.cli.chat import Chat
from gateway.cli.client import CommandFailed
from gateway.cli.format import printable
from gateway.cli.models import Description, print_description
from gateway.cli.output import make_console
from gateway.cli.parameters import BadParameter, parse_parameter

with suppress(ImportError):  # Windows has none; there the terminal edits lines itself
    import readline  # noqa: F401 - importing it gives input() editing and history

_HELP = '''Available commands:
  /set system TEXT             Set the system message
  /set parameter NAME VALUE    Set an option of the model, such as temperature
  /set think, /set nothink     Let the model think first, or not
  /set verbose, /set quiet     Show statistics after each answer, or not
  /show info                   Show what the model is
  /clear                       Forget the conversation
  /bye, /exit                  Leave
  /?, /help                    This help

Use """ to begin and end a message of several lines.
Ctrl-C stops an answer, Ctrl-D leaves.
'''


def converse(chat: Chat) -> None:
    """Read and answer until the reader leaves.

    Raises:
        CommandFailed: the model cannot be loaded. Later failures are printed, and the conversation goes on.
    """
    chat.load()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte is no reason to end the conversation
    console = make_console()
    while True:
        try:
            command, text = _read()
        except KeyboardInterrupt:
            console.out("\nUse Ctrl-D or /bye to exit.")
            continue
        except EOFError:
            console.out("")
            return
        if command in ("/bye", "/exit"):
            return
        try:
            _answer(chat, command, text)
        except KeyboardInterrupt:
            console.out("")
        except CommandFailed as error:
            make_console(stderr=True).out(f"Error: {error}", style="red")


def _answer(chat: Chat, command: str, text: str) -> None:
    if command:
        make_console().out(printable(_obey(chat, command, text)))
    elif text.strip():
        chat.ask(text)
        make_console().out("")


def _read() -> tuple[str, str]:
    """What was typed: a command and its text, or an empty command and a message, perhaps of several lines."""
    line = input(">>> ")
    head, quotes, text = line.partition('"""')
    if quotes and head.split() in ([], ["/set", "system"]):
        while not text.rstrip().endswith('"""'):
            text += "\n" + input("... ")
        text = text.rstrip().removesuffix('"""').strip("\n")
        return ("/set", f"system {text}") if head.strip() else ("", text)
    if line.startswith("/"):
        command, _, text = line.partition(" ")
        return command, text.strip()
    return "", line


def _obey(chat: Chat, command: str, text: str) -> str:
    """Carry out a command; what to tell the reader."""
    match command, text.split(maxsplit=1):
        case (("/?" | "/help"), _):
            return _HELP
        case "/clear", _:
            chat.messages.clear()
            return "Cleared the conversation."
        case "/show", ["info"]:
            print_description(chat.client.post("/api/show", {"model": chat.model}, Description))
            return ""
        case "/set", [name, *rest]:
            return _set(chat, name, rest[0] if rest else "")
    return f"Unknown command '{f'{command} {text}'.strip()}'. Type /? for help."


def _set(chat: Chat, name: str, text: str) -> str:
    match name:
        case "system":
            chat.system = text
            return "Set the system message." if text else "Removed the system message."
        case "parameter":
            return _set_parameter(chat, text)
        case "think" | "nothink":
            chat.think = name == "think"
        case "verbose" | "quiet":
            chat.verbose = name == "verbose"
        case _:
            return f"Unknown command '/set {name}'. Type /? for help."
    return f"Set '{name}' mode."


def _set_parameter(chat: Chat, text: str) -> str:
    try:
        name, *words = shlex.split(text)
        if not words:
            return f"What value should {name} have? /set parameter NAME VALUE"
        chat.options[name] = parse_parameter(name, words)
    except BadParameter as error:
        return f"Could not set the parameter: {error}."
    except ValueError:
        return "Write /set parameter NAME VALUE, with balanced quotes."
    return f"Set parameter '{name}' to '{', '.join(words)}'."
