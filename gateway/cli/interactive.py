"""The `>>>` prompt of `headwater run`: reading what is typed, and answering it.

Lines are remembered for the arrow keys while the session lasts, and nothing of what is said is written to disk.
"""

from __future__ import annotations

import io
import sys

from gateway.cli.chat import Chat
from gateway.cli.client import CommandFailed
from gateway.cli.commands import is_command, obey
from gateway.cli.format import printable
from gateway.cli.output import make_console


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
        make_console().out(printable(obey(chat, command, text)))
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
    if is_command(line):
        command, _, text = line.partition(" ")
        return command, text.strip()
    return "", line
