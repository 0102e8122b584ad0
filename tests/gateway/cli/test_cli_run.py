from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path

import pytest
from cli_server import SHOW, STATISTICS, CLIServer, chat_line, server_fixture  # noqa: F401 - a fixture
from typer.testing import CliRunner

from gateway.cli.main import app


def test_prompt_is_answered_once(server: CLIServer) -> None:
    """Words are joined to one question, and the answer ends its line."""
    result = CliRunner().invoke(app, ["run", "m", "Say", "hello"])
    assert (result.exit_code, result.stdout) == (0, "Hello there.\n")
    assert server.bodies("/api/chat") == [
        {"model": "m", "messages": [{"role": "user", "content": "Say hello"}], "stream": True}
    ]


def test_piped_input_comes_before_the_prompt(server: CLIServer) -> None:
    """A document and what to do with it become one question."""
    CliRunner().invoke(app, ["run", "m", "Summarise."], input="A long text.")
    assert server.bodies("/api/chat")[0]["messages"][0]["content"] == "A long text.\nSummarise."


def test_piped_bytes_that_are_no_text_are_replaced(server: CLIServer) -> None:
    """Any file can be piped in."""
    result = CliRunner().invoke(app, ["run", "m"], input=b"a\xff\xfeb")
    assert result.exit_code == 0
    assert server.bodies("/api/chat")[0]["messages"][0]["content"] == "a\ufffd\ufffdb"


def test_prompt_with_bytes_that_are_no_text_is_sent(server: CLIServer) -> None:
    """An argument that is not UTF-8 arrives from the shell with lone surrogates, which JSON cannot carry."""
    assert CliRunner().invoke(app, ["run", "m", "a\udcff"]).exit_code == 0
    assert server.bodies("/api/chat")[0]["messages"][0]["content"] == "a?"


def test_nothing_to_ask_is_an_error(server: CLIServer) -> None:
    """An empty pipe does not become an empty question."""
    result = CliRunner().invoke(app, ["run", "m"], input="\n")
    assert result.exit_code == 2
    assert "nothing to ask" in result.stderr


def test_settings_of_the_command_line_are_sent(server: CLIServer) -> None:
    """System message, options, thinking and keep-alive reach the server in the API's types."""
    arguments = ["--system", "Be brief.", "--option", "temperature=0", "--no-think", "--keepalive", "-1"]
    CliRunner().invoke(app, ["run", "m", "Hi", *arguments])
    [body] = server.bodies("/api/chat")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["options"], body["think"], body["keep_alive"]) == ({"temperature": 0}, False, -1)


def test_keep_alive_with_a_unit_stays_a_duration(server: CLIServer) -> None:
    """Ollama's API takes `5m` as a string."""
    CliRunner().invoke(app, ["run", "m", "Hi", "--keepalive", "5m"])
    assert server.bodies("/api/chat")[0]["keep_alive"] == "5m"


def test_bad_option_is_told_before_asking(server: CLIServer) -> None:
    """A typing mistake costs no request."""
    result = CliRunner().invoke(app, ["run", "m", "Hi", "--option", "temprature=0"])
    assert result.exit_code == 2
    assert "temprature" in result.stderr
    assert server.requests == []


def test_thinking_stays_out_of_a_pipe(server: CLIServer) -> None:
    """What is piped on is the answer alone."""
    server.chat = [chat_line(thinking="Hmm."), chat_line("42"), chat_line(**STATISTICS)]
    assert CliRunner().invoke(app, ["run", "m", "Hi"]).stdout == "42\n"


def test_verbose_prints_ollamas_statistics(server: CLIServer) -> None:
    """Durations and rates are told on stderr, out of the answer's way."""
    result = CliRunner().invoke(app, ["run", "m", "Hi", "--verbose"])
    assert result.stdout == "Hello there.\n"
    assert result.stderr.strip().splitlines() == [
        "total duration:       4.30s",
        "load duration:        85.2ms",
        "prompt eval count:    26 token(s)",
        "prompt eval duration: 130.0ms",
        "prompt eval rate:     200.00 tokens/s",
        "eval count:           298 token(s)",
        "eval duration:        4.00s",
        "eval rate:            74.50 tokens/s",
    ]


def test_error_after_the_first_words_fails_the_command(server: CLIServer) -> None:
    """What was said is printed, then the error, and the exit code is 1."""
    server.chat = [chat_line("Hel"), {"error": "an error was encountered"}]
    result = CliRunner().invoke(app, ["run", "m", "Hi"])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "Hel\n", "Error: an error was encountered\n")


@pytest.mark.parametrize("lines", [[], [chat_line("Hel")]])
def test_answer_without_an_end_fails_the_command(server: CLIServer, lines: list[dict[str, object]]) -> None:
    """Half an answer is never taken for a whole one."""
    server.chat = lines
    result = CliRunner().invoke(app, ["run", "m", "Hi"])
    assert result.exit_code == 1
    assert "ended before it was complete" in result.stderr


def test_unknown_model_fails_the_command(server: CLIServer) -> None:
    """The server's words are the message."""
    server.answers["/api/chat"] = ({"error": "model 'm' not found"}, 404)
    result = CliRunner().invoke(app, ["run", "m", "Hi"])
    assert (result.exit_code, result.stderr) == (1, "Error: model 'm' not found\n")


def test_line_separators_inside_an_answer_do_not_cut_it(server: CLIServer) -> None:
    """U+0085 and U+2028 may stand in a JSON string; a line of the stream ends at newlines only."""
    server.chat = [chat_line("a\u2028b\u0085c"), chat_line(**STATISTICS)]
    assert CliRunner().invoke(app, ["run", "m", "Hi"]).stdout == "a\u2028b\ufffdc\n"


@pytest.mark.parametrize(
    ("argument", "think"),
    [("--think", True), ("--think=true", True), ("--think=false", False), ("--think=high", "high")],
)
def test_how_much_to_think_is_said_as_in_ollama(server: CLIServer, argument: str, think: bool | str) -> None:
    """The level may be left out, and never swallows the prompt."""
    assert CliRunner().invoke(app, ["run", argument, "m", "Hi"]).exit_code == 0
    (body,) = server.bodies("/api/chat")
    assert (body["think"], body["messages"][0]["content"]) == (think, "Hi")


def test_a_prompt_behind_two_dashes_is_left_alone(server: CLIServer) -> None:
    """Whatever it looks like."""
    CliRunner().invoke(app, ["run", "m", "--", "--think=high"])
    assert server.bodies("/api/chat")[0]["messages"][0]["content"] == "--think=high"


@pytest.mark.parametrize(("text", "wanted"), [("json", "json"), ('{"type": "object"}', {"type": "object"})])
def test_a_format_is_sent(server: CLIServer, text: str, wanted: object) -> None:
    """The word, or a schema as the API takes it."""
    CliRunner().invoke(app, ["run", "m", "Hi", "--format", text])
    assert server.bodies("/api/chat")[0]["format"] == wanted


@pytest.mark.parametrize("text", ["xml", "[1]", "{"])
def test_a_format_that_is_none_costs_no_request(server: CLIServer, text: str) -> None:
    """It is told before anything is asked."""
    result = CliRunner().invoke(app, ["run", "m", "Hi", "--format", text])
    assert (result.exit_code, server.bodies("/api/chat")) == (2, [])
    assert "--format: expected json" in result.stderr


def test_json_is_what_the_server_said(server: CLIServer) -> None:
    """An object a line, for programs."""
    result = CliRunner().invoke(app, ["run", "m", "Hi", "--json"])
    assert [json.loads(line) for line in result.stdout.splitlines()] == server.chat


def test_json_is_for_one_answer(server: CLIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation is for people."""
    monkeypatch.setattr("gateway.cli.run._question", lambda words: None)
    result = CliRunner().invoke(app, ["run", "m", "--json"])
    assert (result.exit_code, server.requests) == (2, [])


def test_num_keep_is_an_option(server: CLIServer) -> None:
    """It is no sampler and fixed by no load, and an option all the same."""
    CliRunner().invoke(app, ["run", "m", "Hi", "--option", "num_keep=8"])
    assert server.bodies("/api/chat")[0]["options"] == {"num_keep": 8}


def test_a_picture_in_the_prompt_is_sent_along(server: CLIServer, tmp_path: Path) -> None:
    """As in a conversation."""
    picture = tmp_path / "cat.webp"
    picture.write_bytes(b"RIFF0000WEBP")
    server.answers["/api/show"] = (SHOW | {"capabilities": ["vision"]}, 200)
    result = CliRunner().invoke(app, ["run", "m", f"What is '{picture}'?"])
    assert result.stdout == "Hello there.\n"
    assert f"Added image '{picture}'" in result.stderr
    (message,) = server.bodies("/api/chat")[0]["messages"]
    assert message == {"role": "user", "content": "What is ?", "images": [b64encode(b"RIFF0000WEBP").decode()]}
