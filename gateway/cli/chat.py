"""One conversation: what has been said, how the next answer is asked for, and how it looks as it streams in.

It knows nothing of prompts and commands (`interactive.py`). What leads to no answer is not remembered; what was said
before the reader interrupted is. In a pipe only the answer itself is written, without the thinking before it.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain

import msgspec
import typer
from rich.console import Console

from engines.request import JSON
from gateway.cli import format as human
from gateway.cli.client import Client, CommandFailed
from gateway.cli.images import find_images, read_image, without_images
from gateway.cli.models import Description
from gateway.cli.output import make_console
from gateway.cli.wrap import WordWrap


class _Message(msgspec.Struct):
    content: str = ""
    thinking: str | None = None


class _Piece(msgspec.Struct):
    """One line of the stream (spec/ollama.md section 5.2); durations are nanoseconds, on the last line only."""

    message: _Message = msgspec.field(default_factory=_Message)
    done: bool = False
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


@dataclass
class Chat:
    """A conversation with one model.

    Attributes:
        options: Ollama option names. think: a level, or whether to; None leaves it to the server.
        format: `json` or a JSON schema that answers must follow; None for any text. keep_alive: as the API takes it.
        verbose: print statistics after each answer, on stderr. hides_thinking: show the answer alone.
        wraps: break lines between words where the answer goes to a terminal.
        as_json: print what the server sends, an object a line, and nothing else.
    """

    client: Client
    model: str
    system: str = ""
    options: dict[str, JSON] = field(default_factory=dict)
    think: bool | str | None = None
    format: JSON = None
    keep_alive: str | int | None = None
    verbose: bool = False
    hides_thinking: bool = False
    wraps: bool = True
    as_json: bool = False
    messages: list[dict[str, JSON]] = field(default_factory=list)

    def load(self) -> None:
        """Bring the model in, so that a wrong name is told before the first question. Raises CommandFailed."""
        body = {"model": self.model, "options": self.options, "messages": []} | self._keep_alive()
        with make_console(stderr=True).status(f"loading {self.model}"):
            self.client.post("/api/chat", body, dict)

    def ask(self, text: str) -> None:
        """Ask, and print the answer as it comes.

        Raises:
            CommandFailed: no answer, or half of one.
            KeyboardInterrupt: the reader had enough; the server has been told.
        """
        question = self._question(text)
        if self.as_json:
            self._pass_on(question)
            return
        screen = _Screen(make_console(), hides_thinking=self.hides_thinking, wraps=self.wraps)
        try:
            with closing(self.client.stream("/api/chat", self._body(question), _Piece)) as pieces:
                with make_console(stderr=True).status(""):
                    first = next(pieces, _Piece())
                for piece in chain([first], pieces):
                    screen.show(piece.message)
        finally:
            screen.end()
            if screen.said:
                self.messages += [question, {"role": "assistant", "content": "".join(screen.said)}]
        if not piece.done:
            raise CommandFailed("the answer ended before it was complete")
        if self.verbose:
            make_console(stderr=True).out("\n" + "\n".join(_statistics(piece)))

    def _question(self, text: str) -> dict[str, JSON]:
        """What was typed, with the pictures that it names if the model can see."""
        images = find_images(text)
        if not images or not self.can_see():
            return {"role": "user", "content": text}
        for path in images.values():
            make_console(stderr=True).out(f"Added image '{human.printable(str(path))}'")
        pictures = [read_image(path) for path in images.values()]
        return {"role": "user", "content": without_images(text, images), "images": pictures}

    def can_see(self) -> bool:
        """Whether the model takes pictures. Raises CommandFailed."""
        return "vision" in (self.describe().capabilities or ())

    def describe(self) -> Description:
        """What the server says of the model, as this conversation uses it. Raises CommandFailed."""
        body = {"model": self.model, "system": self.system, "options": self.options}
        return self.client.post("/api/show", body, Description)

    def _pass_on(self, question: dict[str, JSON]) -> None:
        with closing(self.client.stream("/api/chat", self._body(question), dict)) as lines:
            for line in lines:
                typer.echo(json.dumps(line))

    def _keep_alive(self) -> dict[str, JSON]:
        return {"keep_alive": self.keep_alive} if self.keep_alive is not None else {}

    def _body(self, question: dict[str, JSON]) -> JSON:
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, JSON] = {"model": self.model, "messages": [*system, *self.messages, question], "stream": True}
        if self.options:
            body["options"] = self.options
        if self.think is not None:
            body["think"] = self.think
        if self.format is not None:
            body["format"] = self.format
        return body | self._keep_alive()


class _Screen:
    """Prints one answer piece by piece; `said` is its text so far."""

    def __init__(self, console: Console, *, hides_thinking: bool = False, wraps: bool = False) -> None:
        self._console = console
        self._shows_thinking = console.is_terminal and not hides_thinking
        self._width = console.width if console.is_terminal and wraps else 0
        self._lines = WordWrap(self._width)
        self._thinking = False
        self.said: list[str] = []

    def show(self, message: _Message) -> None:
        if message.thinking and self._shows_thinking:
            if not self._thinking:
                self._console.out("Thinking...", style="dim")
                self._thinking = True
            self._console.out(self._lines.wrap(human.printable(message.thinking)), style="dim", end="")
        if message.content:
            self._end_thinking()
            self.said.append(message.content)  # first: an interrupt must not forget what the reader has seen
            self._console.out(self._lines.wrap(human.printable(message.content)), end="")

    def end(self) -> None:
        """Leave the cursor at the beginning of a line."""
        self._end_thinking()
        if self.said and not self.said[-1].endswith("\n"):
            self._console.out("")

    def _end_thinking(self) -> None:
        if self._thinking:
            self._console.out("\n...done thinking.\n", style="dim")
            self._thinking = False
            self._lines = WordWrap(self._width)


def _statistics(last: _Piece) -> list[str]:
    """Ollama's summary, line for line."""
    return [
        f"total duration:       {human.duration(last.total_duration / 1e9)}",
        f"load duration:        {human.duration(last.load_duration / 1e9)}",
        f"prompt eval count:    {last.prompt_eval_count} token(s)",
        f"prompt eval duration: {human.duration(last.prompt_eval_duration / 1e9)}",
        f"prompt eval rate:     {_rate(last.prompt_eval_count, last.prompt_eval_duration)}",
        f"eval count:           {last.eval_count} token(s)",
        f"eval duration:        {human.duration(last.eval_duration / 1e9)}",
        f"eval rate:            {_rate(last.eval_count, last.eval_duration)}",
    ]


def _rate(tokens: int, nanoseconds: int) -> str:
    return f"{tokens / nanoseconds * 1e9:.2f} tokens/s" if nanoseconds > 0 else "-"
