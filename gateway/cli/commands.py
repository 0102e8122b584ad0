"""The commands of a conversation, which begin with a slash: those of Ollama's command line.

Each is answered with a text to show. None of them is sent to the model.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import suppress

from engines.request import JSON
from gateway.cli.chat import Chat
from gateway.cli.client import CommandFailed
from gateway.cli.models import list_models, print_description
from gateway.cli.parameters import BadParameter, parse_parameter

with suppress(ImportError):  # Windows has none; there the terminal edits and remembers lines itself
    import readline  # importing it gives input() both

HELP = '''Available commands:
  /set            Set session variables
  /show           Show model information
  /load MODEL     Talk with another model, from the beginning
  /save MODEL     Make a model of this conversation
  /list           List the installed models
  /clear          Forget the conversation
  /bye, /exit     Leave
  /?, /help       Help for a command
  /? shortcuts    Help for keyboard shortcuts

Use """ to begin and end a message of several lines.
Use /path/to/file to include .jpg, .png or .webp images, where the model can see.
'''
HELP_SET = """Available commands:
  /set parameter NAME VALUE    Set an option of the model, such as temperature
  /set system TEXT             Set the system message
  /set history, nohistory      Remember lines for the arrow keys, or not
  /set wordwrap, nowordwrap    Break long lines between words, or not
  /set format json, noformat   Answer in JSON, or in any text
  /set verbose, quiet          Show statistics after each answer, or not
  /set think, nothink          Let the model think first, or not; /set think high says how much
"""
HELP_SHOW = """Available commands:
  /show info         Show what the model is
  /show license      Show its licence
  /show modelfile    Show its Modelfile
  /show parameters   Show its parameters, and those of this conversation
  /show system       Show the system message
  /show template     Show the prompt template
"""
HELP_SHORTCUTS = """Available keyboard shortcuts:
  Ctrl-A, Ctrl-E    Move to the beginning, to the end of the line
  Alt-B, Alt-F      Move back, forward one word
  Ctrl-K, Ctrl-U    Delete everything after, before the cursor
  Ctrl-W            Delete the word before the cursor
  Ctrl-L            Clear the screen
  Ctrl-C            Stop the model from answering
  Ctrl-D            Leave
"""
_TOPICS = {"set": HELP_SET, "show": HELP_SHOW, "shortcuts": HELP_SHORTCUTS, "shortcut": HELP_SHORTCUTS}
_NAMES = {"/?", "/help", "/set", "/show", "/load", "/save", "/list", "/clear", "/bye", "/exit"}


def is_command(line: str) -> bool:
    """Whether a line is a command, perhaps a wrong one. A path is none: it has a second slash in its first word."""
    head = line.split(maxsplit=1)[0] if line.strip() else ""
    return head.startswith("/") and (head in _NAMES or "/" not in head[1:])


def obey(chat: Chat, command: str, text: str) -> str:
    """Carry out a command; what to tell the reader. Raises CommandFailed."""
    words = text.split()
    match command:
        case "/?" | "/help":
            return _TOPICS.get(words[0].lstrip("/"), HELP) if words else HELP
        case "/clear":
            chat.messages.clear()
            return "Cleared the conversation."
        case "/list":
            list_models()
            return ""
        case "/load" | "/save":
            exchange = _load if command == "/load" else _save
            return exchange(chat, words[0]) if len(words) == 1 else f"Usage: {command} MODEL"
        case "/show":
            return _show(chat, words[0]) if words else HELP_SHOW
        case "/set":
            return _set(chat, words[0], text.removeprefix(words[0]).strip()) if words else HELP_SET
    return _unknown(f"{command} {text}")


def _unknown(command: str) -> str:
    return f"Unknown command '{command.strip()}'. Type /? for help."


def _load(chat: Chat, name: str) -> str:
    before, chat.model = chat.model, name
    try:
        chat.load()
    except CommandFailed as failure:
        chat.model = before
        if failure.status != 404:
            raise
        return f"Couldn't find model '{name}'."
    chat.messages.clear()
    return f"Loaded model '{name}'."


def _save(chat: Chat, name: str) -> str:
    said: dict[str, JSON] = {"system": chat.system, "parameters": chat.options, "messages": chat.messages}
    said = {field: value for field, value in said.items() if value}
    body = {"model": name, "from": chat.model, "stream": False, **said}
    try:
        chat.client.post("/api/create", body, dict)
    except CommandFailed as failure:
        if "invalid model name" not in str(failure):
            raise
        return f"The model name '{name}' is invalid."
    return f"Created new model '{name}'."


def _show(chat: Chat, part: str) -> str:
    if part not in ("info", "license", "modelfile", "parameters", "system", "template"):
        return _unknown(f"/show {part}")
    description = chat.describe()
    match part:
        case "info":
            print_description(description)
            return ""
        case "license":
            return description.license or "No license was specified for this model."
        case "modelfile":
            return description.modelfile
        case "system":
            return description.system or "No system message was specified for this model."
        case "template":
            return description.template or "No prompt template was specified for this model."
    return _parameters(description.parameters, chat.options)


def _parameters(own: str, options: dict[str, JSON]) -> str:
    lines = ["Model defined parameters:"]
    lines += [f"  {line}" for line in own.splitlines()] or ["  No additional parameters were specified for this model."]
    if options:
        lines += ["", "User defined parameters:", *(f"  {name:<30} {value}" for name, value in options.items())]
    return "\n".join([*lines, ""])


def _set(chat: Chat, name: str, text: str) -> str:
    match name:
        case "system":
            chat.system = text
            return "Set the system message." if text else "Removed the system message."
        case "parameter":
            return _set_parameter(chat, text)
        case "format":
            return _set_format(chat, text)
        case "noformat":
            chat.format = None
            return "Disabled format."
        case "think" if text:
            chat.think = text
            return f"Set 'think' mode to '{text}'."
    if name not in _MODES:
        return _unknown(f"/set {name}")
    _MODES[name](chat)
    return f"Set '{name}' mode."


def _remember_lines(wanted: bool) -> None:
    with suppress(NameError):  # without readline
        readline.set_auto_history(wanted)


def _switch(attribute: str, value: bool) -> Callable[[Chat], None]:
    return lambda chat: setattr(chat, attribute, value)


_MODES: dict[str, Callable[[Chat], None]] = {
    "history": lambda chat: _remember_lines(True),
    "nohistory": lambda chat: _remember_lines(False),
    "wordwrap": _switch("wraps", True),
    "nowordwrap": _switch("wraps", False),
    "verbose": _switch("verbose", True),
    "quiet": _switch("verbose", False),
    "think": _switch("think", True),
    "nothink": _switch("think", False),
}


def _set_format(chat: Chat, text: str) -> str:
    if text != "json":
        return "Invalid or missing format. For 'json' mode use '/set format json'."
    chat.format = text
    return f"Set format to '{text}' mode."


def _set_parameter(chat: Chat, text: str) -> str:
    with suppress(ValueError):
        name, *words = shlex.split(text)
        if not words:
            return f"What value should {name} have? /set parameter NAME VALUE"
        try:
            chat.options[name] = parse_parameter(name, words)
        except BadParameter as error:
            return f"Could not set the parameter: {error}."
        return f"Set parameter '{name}' to '{', '.join(words)}'."
    return "Write /set parameter NAME VALUE, with balanced quotes."
