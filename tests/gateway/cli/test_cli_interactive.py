from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Self

import pytest
from cli_server import STATISTICS, CLIServer, chat_line, server_fixture  # noqa: F401 - a fixture

_PATIENCE_S = 20.0


class Terminal:
    """`headwater run m` in a pseudo-terminal; `shown` is everything it has printed, without terminal sequences."""

    def __init__(self, *arguments: str) -> None:
        self._screen, inside = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        command = [sys.executable, "-m", "gateway", "run", "m", *arguments]
        self.process = subprocess.Popen(
            command, stdin=inside, stdout=inside, stderr=inside, env=environment, start_new_session=True
        )
        os.close(inside)
        self.shown = ""
        self._read_to = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)

    def expect(self, text: str) -> str:
        """Wait until `text` is shown after what was last expected, and return everything up to it."""
        while (at := self.shown.find(text, self._read_to)) < 0:
            assert select.select([self._screen], [], [], _PATIENCE_S)[0], f"no {text!r} in {self.shown!r}"
            self._take()
        before, self._read_to = self.shown[self._read_to : at], at + len(text)
        return before

    def interrupt_prompt(self, text: str) -> None:
        """Interrupt until `text` is shown: readline misses a signal between its prompt and its wait for keys."""
        self.process.send_signal(signal.SIGINT)
        while text not in self.shown[self._read_to :]:
            if select.select([self._screen], [], [], 1.0)[0]:
                self._take()
            else:
                self.process.send_signal(signal.SIGINT)
        self.expect(text)

    def type(self, text: str) -> None:
        """Type text, and Enter unless it is a control character."""
        os.write(self._screen, text.encode() + (b"" if text < " " else b"\r"))

    def _take(self) -> None:
        data = os.read(self._screen, 65536).decode("utf-8", "replace")
        self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", data)


@pytest.fixture
def terminal(server: CLIServer) -> Iterator[Terminal]:
    """A conversation at its first prompt."""
    with Terminal() as running:
        running.expect(">>> ")
        yield running


def test_conversation_remembers_what_was_said(server: CLIServer, terminal: Terminal) -> None:
    """The model is loaded first, and the second question carries the first and its answer."""
    terminal.type("Hi")
    terminal.expect("Hello there.")
    terminal.expect(">>> ")
    terminal.type("Again")
    terminal.expect("Hello there.")
    load, first, second = server.bodies("/api/chat")
    assert load["messages"] == []
    assert [message["content"] for message in first["messages"]] == ["Hi"]
    assert [message["content"] for message in second["messages"]] == ["Hi", "Hello there.", "Again"]


@pytest.mark.parametrize("leave", ["/bye", "/exit", "\x04"])
def test_conversation_is_left(terminal: Terminal, leave: str) -> None:
    """Two commands and Ctrl-D leave, and that is no failure."""
    terminal.type(leave)
    assert terminal.process.wait(_PATIENCE_S) == 0


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(server: CLIServer, terminal: Terminal) -> None:
    """The server is told at once, and the conversation goes on with the words that were seen."""
    server.chat, server.holds = [chat_line("Once upon")], True
    terminal.type("Tell a story")
    terminal.expect("Once upon")
    terminal.process.send_signal(signal.SIGINT)
    assert server.left.wait(_PATIENCE_S)
    terminal.expect(">>> ")
    server.chat, server.holds = [chat_line("ok"), chat_line(**STATISTICS)], False
    terminal.type("Go on")
    terminal.expect("ok")
    assert [m["content"] for m in server.bodies("/api/chat")[-1]["messages"]] == ["Tell a story", "Once upon", "Go on"]


def test_ctrl_c_at_the_prompt_tells_how_to_leave(terminal: Terminal) -> None:
    """An empty prompt is not left by accident."""
    terminal.interrupt_prompt("Use Ctrl-D or /bye to exit.")
    terminal.expect(">>> ")


def test_message_of_several_lines(server: CLIServer, terminal: Terminal) -> None:
    """Three quotes begin and end it."""
    terminal.type('"""first')
    terminal.expect("... ")
    terminal.type("second")
    terminal.expect("... ")
    terminal.type('third"""')
    terminal.expect("Hello there.")
    assert server.bodies("/api/chat")[-1]["messages"][0]["content"] == "first\nsecond\nthird"


def test_slash_in_a_message_of_several_lines_is_no_command(server: CLIServer, terminal: Terminal) -> None:
    """Quoted text is always a message."""
    terminal.type('"""/bye"""')
    terminal.expect("Hello there.")
    assert server.bodies("/api/chat")[-1]["messages"][0]["content"] == "/bye"


def test_commands_change_what_is_sent(server: CLIServer, terminal: Terminal) -> None:
    """System message, options and thinking are part of the next request."""
    for command, told in [
        ("/set system Be brief.", "Set the system message."),
        ("/set parameter temperature 0.5", "Set parameter 'temperature' to '0.5'."),
        ('/set parameter stop A "B C"', "Set parameter 'stop' to 'A, B C'."),
        ("/set nothink", "Set 'nothink' mode."),
        ("/set verbose", "Set 'verbose' mode."),
    ]:
        terminal.type(command)
        terminal.expect(told)
        terminal.expect(">>> ")
    terminal.type("Hi")
    terminal.expect("eval rate:            74.50 tokens/s")
    body = server.bodies("/api/chat")[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["options"] == {"temperature": 0.5, "stop": ["A", "B C"]}
    assert body["think"] is False


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("/set parameter temprature 1", "Could not set the parameter"),
        ("/set parameter stop 'x", "with balanced quotes"),
        ("/set parameter", "Write /set parameter NAME VALUE"),
        ("/set parameter seed", "What value should seed have?"),
        ("/set colour", "Unknown command '/set colour'"),
        ("/set", "Unknown command '/set'"),
        ("/dance now", "Unknown command '/dance now'"),
        ("/?", "/set system TEXT"),
        ("/help", "/set system TEXT"),
        ("/show info", "context length      131072"),
        ("/clear", "Cleared the conversation."),
    ],
)
def test_command_is_answered(terminal: Terminal, command: str, told: str) -> None:
    """Every command, right or wrong, gets an answer and a new prompt."""
    terminal.type(command)
    terminal.expect(told)
    terminal.expect(">>> ")


def test_cleared_conversation_is_forgotten(server: CLIServer, terminal: Terminal) -> None:
    """After /clear the next question stands alone."""
    for typed, told in [("Hi", "Hello there."), ("/clear", "Cleared"), ("New", "Hello there.")]:
        terminal.type(typed)
        terminal.expect(told)
        terminal.expect(">>> ")
    assert [m["content"] for m in server.bodies("/api/chat")[-1]["messages"]] == ["New"]


def test_failed_question_is_told_and_forgotten(server: CLIServer, terminal: Terminal) -> None:
    """An error does not end the conversation, and what had no answer is not sent again."""
    server.answers["/api/chat"] = ({"error": "server busy"}, 503)
    terminal.type("Hi")
    terminal.expect("Error: server busy")
    terminal.expect(">>> ")
    del server.answers["/api/chat"]
    terminal.type("Once more")
    terminal.expect("Hello there.")
    assert [m["content"] for m in server.bodies("/api/chat")[-1]["messages"]] == ["Once more"]


def test_thinking_is_shown_before_the_answer(server: CLIServer, terminal: Terminal) -> None:
    """It is set apart by its own first and last line."""
    server.chat = [chat_line(thinking="Let me "), chat_line(thinking="see."), chat_line("42"), chat_line(**STATISTICS)]
    terminal.type("Hi")
    terminal.expect("Thinking...\nLet me see.\n...done thinking.\n\n42\n")


def test_bytes_that_are_no_text_do_not_end_the_conversation(server: CLIServer, terminal: Terminal) -> None:
    """A stray byte is replaced."""
    os.write(terminal._screen, b"a\xffb\r")
    terminal.expect("Hello there.")
    assert terminal.process.poll() is None


def test_unknown_model_ends_before_the_first_prompt(server: CLIServer) -> None:
    """A wrong name is told at once, not after the first question."""
    server.answers["/api/chat"] = ({"error": "model 'm' not found"}, 404)
    with Terminal() as terminal:
        terminal.expect("Error: model 'm' not found")
        assert terminal.process.wait(_PATIENCE_S) == 1
        assert ">>>" not in terminal.shown


def test_ctrl_c_in_a_single_answer_ends_the_command(server: CLIServer) -> None:
    """A shell sees the exit code of an interrupt, although standard input is a terminal."""
    server.chat, server.holds = [chat_line("Once upon")], True
    with Terminal("Tell", "a", "story") as terminal:
        terminal.expect("Once upon")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(_PATIENCE_S) == 130
        assert server.left.wait(_PATIENCE_S)
