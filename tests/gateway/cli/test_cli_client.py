from __future__ import annotations

import json

import pytest
from cli_server import CLIServer, nobody_fixture, server_fixture  # noqa: F401 - fixtures
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from gateway.cli.client import Client, CommandFailed, _lines
from gateway.cli.main import app
from gateway.origin import client_family


def test_missing_server_is_told_with_what_to_do(nobody: str) -> None:
    """Nobody listening is the commonest failure, and its cure is named."""
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 1
    assert result.stderr == f"Error: cannot reach Headwater at http://{nobody}; start it with `headwater serve`\n"


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        ("404 page not found", 404, "/api/tags answered 404 Not Found: 404 page not found"),
        ("", 403, "/api/tags answered 403 Forbidden"),
        ({"error": {"message": "no such thing"}}, 400, "no such thing"),
        ({"error": ""}, 500, "answered 500"),
        ([1], 500, "answered 500"),
        ("<html>", 200, "did not answer as Headwater does"),
        ([], 200, "did not answer as Headwater does"),
        ({"models": [{"name": 5}]}, 200, "did not answer as Headwater does"),
        ({"models": [{"name": "m", "modified_at": "yesterday"}]}, 200, "did not answer as Headwater does"),
        ({"models": [{"name": "m", "modified_at": "2026-01-02T03:04:05"}]}, 200, "did not answer as Headwater does"),
        ({"error": "\x1b[31mred"}, 400, "\N{REPLACEMENT CHARACTER}[31mred"),
    ],
)
def test_strange_answer_is_an_error_and_no_traceback(
    server: CLIServer, answer: object, status: int, message: str
) -> None:
    """Whatever listens at the address, the reader gets one line that says what came."""
    server.answers["/api/tags"] = (answer, status)
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_bad_setting_stops_with_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad value is named, whichever command meets it."""
    monkeypatch.setenv("OLLAMA_MAX_QUEUE", "many")
    result = CliRunner().invoke(app, ["serve"])
    assert result.exit_code == 2
    assert "OLLAMA_MAX_QUEUE" in result.stderr
    assert "many" in result.stderr


def test_proxy_of_the_environment_is_not_used(server: CLIServer, monkeypatch: pytest.MonkeyPatch, nobody: str) -> None:
    """A proxy for the outside world does not come between the reader and this machine."""
    monkeypatch.setenv("HTTP_PROXY", f"http://{nobody}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("OLLAMA_HOST", server.address)
    assert CliRunner().invoke(app, ["list"]).exit_code == 0


def test_server_knows_the_command_line_for_what_it_is(server: CLIServer) -> None:
    """What is asked from here is booked under its own name, not that of the HTTP library."""
    CliRunner().invoke(app, ["list"])
    assert client_family(server.headers[0]) == "headwater"


def test_closing_a_stream_hangs_up(server: CLIServer) -> None:
    """The server learns at once that nobody reads any more."""
    server.holds = True
    with Client(f"http://{server.address}") as client:
        stream = client.stream("/api/chat", {"messages": [{}]}, dict)
        next(stream)
        stream.close()
        assert server.left.wait(10)


def test_error_inside_a_stream_is_raised(server: CLIServer) -> None:
    """The status was 200 long ago; the last line tells."""
    server.chat = [{"done": False}, {"error": "the worker ended"}]
    with Client(f"http://{server.address}") as client, pytest.raises(CommandFailed, match="the worker ended"):
        list(client.stream("/api/chat", {"messages": [{}]}, dict))


@given(st.lists(st.dictionaries(st.text(), st.text())), st.integers(min_value=1, max_value=7))
def test_lines_survive_any_cut(objects: list[dict[str, str]], chunk_size: int) -> None:
    """Only a newline ends a line, wherever the network cuts and whatever the strings hold."""
    data = b"".join(json.dumps(o, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for o in objects)
    chunks = [data[at : at + chunk_size] for at in range(0, len(data), chunk_size)]
    assert b"".join(line + b"\n" for line in _lines(chunks)) == data
    assert len(list(_lines(chunks))) == len(objects)
