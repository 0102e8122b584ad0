"""One conversation: what has been said, how the next answer is asked for, and how it looks as it streams in.

It knows nothing of prompts and commands (`interactive.py`). What leads to no answer is not remembered; what was said
before the reader interrupted is. In a pipe only the answer itself is written, without the thinking before it.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain

import msgspec
from rich.console import Console

from engines.request import JSON
from gateway.cli import format as human
from gateway.cli.client import Client, CommandFailed
from gateway.cli.output import make_console


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
        options: Ollama option names. think: None leaves it to the server. keep_alive: as the API takes it.
        verbose: print statistics after each answer, on stderr.
    """

    client: Client
    model: str
    system: str = ""
    options: dict[str, JSON] = field(default_factory=dict)
    think: bool | None = None
    keep_alive: str | int | None = None
    verbose: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def load(self) -> None:
        """Bring the model in, so that a wrong name is told before the first question. Raises CommandFailed."""
        with make_console(stderr=True).status(f"loading {self.model}"):
            self.client.post("/api/chat", {"model": self.model, "options": self.options, "messages": []}, dict)

    def ask(self, text: str) -> None:
        """Ask, and print the answer as it comes.

        Raises:
            CommandFailed: no answer, or half of one.
            KeyboardInterrupt: the reader had enough; the server has been told.
        """
        question = {"role": "user", "content": text}
        screen = _Screen(make_console())
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

    def _body(self, question: dict[str, str]) -> JSON:
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, JSON] = {"model": self.model, "messages": [*system, *self.messages, question], "stream": True}
        if self.options:
            body["options"] = self.options
        if self.think is not None:
            body["think"] = self.think
        if self.keep_alive is not None:
            body["keep_alive"] = self.keep_alive
        return body


class _Screen:
    """Prints one answer piece by piece; `said` is its text so far."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._thinking = False
        self.said: list[str] = []

    def show(self, message: _Message) -> None:
        if message.thinking and self._console.is_terminal:
            if not self._thinking:
                self._console.out("Thinking...", style="dim")
                self._thinking = True
            self._console.out(human.printable(message.thinking), style="dim", end="")
        if message.content:
            self._end_thinking()
            self.said.append(message.content)  # first: an interrupt must not forget what the reader has seen
            self._console.out(human.printable(message.content), end="")

    def end(self) -> None:
        """Leave the cursor at the beginning of a line."""
        self._end_thinking()
        if self.said and not self.said[-1].endswith("\n"):
            self._console.out("")

    def _end_thinking(self) -> None:
        if self._thinking:
            self._console.out("\n...done thinking.\n", style="dim")
            self._thinking = False


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
