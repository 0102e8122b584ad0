from __future__ import annotations

import base64
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from cli_server import SHOW, STATISTICS, CLIServer, chat_line, server_fixture  # noqa: F401 - a fixture

_PATIENCE_S = 20.0
PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 20


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
        ("/set", "/set system TEXT"),
        ("/dance now", "Unknown command '/dance now'"),
        ("/?", "/load MODEL"),
        ("/help", "/load MODEL"),
        ("/? set", "/set system TEXT"),
        ("/? /show", "/show modelfile"),
        ("/? shortcuts", "Ctrl-W"),
        ("/show info", "context length      131072"),
        ("/show license", "Release Date: September 25, 2024"),
        ("/show system", "Be brief."),
        ("/show template", "No prompt template was specified"),
        ("/show parameters", "temperature                    0.7"),
        ("/show", "/show modelfile"),
        ("/show colours", "Unknown command '/show colours'"),
        ("/clear", "Cleared the conversation."),
        ("/set history", "Set 'history' mode."),
        ("/set nohistory", "Set 'nohistory' mode."),
        ("/set wordwrap", "Set 'wordwrap' mode."),
        ("/set nowordwrap", "Set 'nowordwrap' mode."),
        ("/set quiet", "Set 'quiet' mode."),
        ("/set format json", "Set format to 'json' mode."),
        ("/set format xml", "Invalid or missing format."),
        ("/set noformat", "Disabled format."),
        ("/set think high", "Set 'think' mode to 'high'."),
        ("/list", "llama3.2:latest"),
        ("/load", "Usage: /load MODEL"),
        ("/save a b", "Usage: /save MODEL"),
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


def test_another_model_is_loaded_and_the_conversation_begins_anew(server: CLIServer, terminal: Terminal) -> None:
    """What was said to the first is not said to the second."""
    for typed, told in [("Hi", "Hello there."), ("/load other", "Loaded model 'other'."), ("New", "Hello there.")]:
        terminal.type(typed)
        terminal.expect(told)
        terminal.expect(">>> ")
    assert [(body["model"], len(body["messages"])) for body in server.bodies("/api/chat")] == [
        ("m", 0),
        ("m", 1),
        ("other", 0),
        ("other", 1),
    ]


def test_a_model_that_is_not_there_leaves_the_one_that_is(server: CLIServer, terminal: Terminal) -> None:
    """And what was said to it."""
    terminal.type("Hi")
    terminal.expect(">>> ")
    server.answers["/api/chat"] = ({"error": "model 'other' not found"}, 404)
    terminal.type("/load other")
    terminal.expect("Couldn't find model 'other'.")
    del server.answers["/api/chat"]
    terminal.type("Go on")
    terminal.expect("Hello there.")
    assert (server.bodies("/api/chat")[-1]["model"], len(server.bodies("/api/chat")[-1]["messages"])) == ("m", 3)


def test_a_conversation_is_saved_as_a_model(server: CLIServer, terminal: Terminal) -> None:
    """With its system message, its options and what was said, as Ollama's create takes them."""
    server.answers["/api/create"] = ({"status": "success"}, 200)
    for typed in ["/set system Be brief.", "/set parameter num_keep 8", "Hi", "/save mine"]:
        terminal.type(typed)
        terminal.expect(">>> ")
    assert "Created new model 'mine'." in terminal.shown
    assert server.bodies("/api/create") == [
        {
            "model": "mine",
            "from": "m",
            "stream": False,
            "system": "Be brief.",
            "parameters": {"num_keep": 8},
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}],
        }
    ]
    server.answers["/api/create"] = ({"error": "invalid model name"}, 400)
    terminal.type("/save a/b/c/d/e")
    terminal.expect("The model name 'a/b/c/d/e' is invalid.")
    terminal.expect(">>> ")


def test_json_mode_reaches_the_server(server: CLIServer, terminal: Terminal) -> None:
    """Until it is taken back."""
    for typed in ["/set format json", "Hi", "/set noformat", "Again"]:
        terminal.type(typed)
        terminal.expect(">>> ")
    assert [body.get("format") for body in server.bodies("/api/chat")[1:]] == ["json", None]


def test_a_picture_that_is_named_is_sent_along(server: CLIServer, terminal: Terminal, tmp_path: Path) -> None:
    """Without its path in the text; a line that begins with a path is no command."""
    picture = tmp_path / "my cat.png"
    picture.write_bytes(PNG)
    server.answers["/api/show"] = (SHOW | {"capabilities": ["completion", "vision"]}, 200)
    written = str(picture).replace(" ", "\\ ")
    terminal.type(f"{written} What is this?")
    terminal.expect(f"Added image '{picture}'")
    terminal.expect("Hello there.")
    (message,) = server.bodies("/api/chat")[-1]["messages"]
    assert (message["content"], base64.b64decode(message["images"][0])) == ("What is this?", PNG)


def test_a_model_that_cannot_see_gets_the_path_as_text(server: CLIServer, terminal: Terminal, tmp_path: Path) -> None:
    """It may be what the question is about."""
    picture = tmp_path / "cat.png"
    picture.write_bytes(PNG)
    terminal.type(f"What is {picture} for?")
    terminal.expect("Hello there.")
    assert server.bodies("/api/chat")[-1]["messages"] == [{"role": "user", "content": f"What is {picture} for?"}]


def test_a_refused_picture_is_told_and_forgotten(server: CLIServer, terminal: Terminal, tmp_path: Path) -> None:
    """The conversation goes on without it."""
    picture = tmp_path / "cat.jpg"
    picture.write_bytes(b"no picture")
    server.answers["/api/show"] = (SHOW | {"capabilities": ["completion", "vision"]}, 200)
    terminal.type(f"Look: {picture}")
    terminal.expect("is no JPEG, PNG or WebP picture")
    terminal.expect(">>> ")
    picture.write_bytes(PNG)
    server.answers["/api/chat"] = ({"error": "this model is missing data required for image input"}, 400)
    terminal.type(f"Look: {picture}")
    terminal.expect("Error: this model is missing data required for image input")
    terminal.expect(">>> ")
    del server.answers["/api/chat"]
    terminal.type("Never mind")
    terminal.expect("Hello there.")
    assert server.bodies("/api/chat")[-1]["messages"] == [{"role": "user", "content": "Never mind"}]


def test_long_lines_are_broken_between_words(server: CLIServer, terminal: Terminal) -> None:
    """In a terminal of 80 columns, unless somebody wants them whole."""
    server.chat = [chat_line("0123456 " * 10 + "to"), chat_line("gether"), chat_line("", **STATISTICS)]
    terminal.type("Hi")
    shown = terminal.expect("together")
    assert shown.endswith("0123456 \n")
    terminal.expect(">>> ")
    terminal.type("/set nowordwrap")
    terminal.expect(">>> ")
    terminal.type("Hi")
    assert terminal.expect("together").endswith("0123456 ")
