from __future__ import annotations

import json
from typing import Any

import pytest
from cli_server import CLIServer, server_fixture  # noqa: F401 - a fixture
from typer.testing import CliRunner

from gateway.cli.main import app

DIGEST = "sha256:" + "8" * 64
STEPS: list[dict[str, Any]] = [
    {"status": "pulling manifest"},
    {"status": "pulling 888888888888", "digest": DIGEST, "total": 4_700_000_000},
    {"status": "pulling 888888888888", "digest": DIGEST, "total": 4_700_000_000, "completed": 4_700_000_000},
    {"status": "success"},
]


def lines(*steps: dict[str, Any]) -> str:
    """A streamed answer."""
    return "".join(f"{json.dumps(step)}\n" for step in steps)


@pytest.mark.parametrize("command", ["pull", "push"])
def test_steps_are_told_once_each_in_a_pipe(server: CLIServer, command: str) -> None:
    """On stderr, a blob with its size."""
    server.answers[f"/api/{command}"] = (lines(*STEPS), 200)
    result = CliRunner().invoke(app, [command, "m", "--insecure"])
    assert result.exit_code == 0
    assert result.stderr.splitlines() == ["pulling manifest", "pulling 888888888888 (4.7 GB)", "success"]
    assert server.bodies(f"/api/{command}") == [{"model": "m", "insecure": True}]


def test_programs_get_every_step(server: CLIServer) -> None:
    """One JSON object a line, as the server said it."""
    server.answers["/api/pull"] = (lines(*STEPS), 200)
    result = CliRunner().invoke(app, ["pull", "m", "--json"])
    assert [json.loads(line) for line in result.stdout.splitlines()] == STEPS


def test_terminals_get_a_bar_for_each_blob(server: CLIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its name and size, and no control characters of the server's."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    server.answers["/api/pull"] = (lines({"status": "\x1b[2Jevil"}, *STEPS), 200)
    output = CliRunner().invoke(app, ["pull", "m"]).stderr
    assert "pulling 888888888888" in output
    assert "4.7/4.7 GB" in output
    assert "\x1b[2J" not in output


def test_a_failure_on_the_way_is_told(server: CLIServer) -> None:
    """The last line of the stream."""
    server.answers["/api/pull"] = (lines(STEPS[0], {"error": "pull model manifest: file does not exist"}), 200)
    result = CliRunner().invoke(app, ["pull", "m"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "Error: pull model manifest: file does not exist"


def test_who_may_not_push_is_told_what_to_do(server: CLIServer) -> None:
    """In Ollama's words, and with Docker's way in."""
    server.answers["/api/push"] = (lines({"error": "unauthorized: access denied"}), 200)
    result = CliRunner().invoke(app, ["push", "m"])
    assert "you are not authorized to push to this namespace" in result.stderr
    assert "docker login" in result.stderr


def test_run_pulls_what_is_missing(server: CLIServer) -> None:
    """A model that the server does not know is fetched, and then asked."""
    server.answers["/api/show"] = ({"error": "model 'm' not found"}, 404)
    server.answers["/api/pull"] = (lines(*STEPS), 200)
    result = CliRunner().invoke(app, ["run", "m", "Hi"])
    assert (result.exit_code, result.stdout) == (0, "Hello there.\n")
    assert [path for path, _ in server.requests] == ["/api/show", "/api/pull", "/api/chat"]


def test_run_pulls_nothing_when_the_server_refuses(server: CLIServer) -> None:
    """Only a model that is missing is fetched."""
    server.answers["/api/show"] = ({"error": "no"}, 403)
    assert CliRunner().invoke(app, ["run", "m", "Hi"]).exit_code == 1
    assert [path for path, _ in server.requests] == ["/api/show"]
