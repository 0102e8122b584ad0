from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cli_server import CLIServer, server_fixture, serving  # noqa: F401 - a fixture
from starlette.applications import Starlette
from typer.testing import CliRunner

from engines.events import Timings, Usage
from engines.request import Origin, Trust
from gateway.admin import routes
from gateway.cli.main import app
from gateway.usage.ledger import Ledger
from gateway.usage.record import UsageRecord


def record(
    request_id: str, origin: Origin, model: str, prompt: int, completion: int, finish: str = "stop"
) -> UsageRecord:
    """A request of ten seconds ago."""
    usage = Usage(prompt_tokens=prompt, cached_tokens=prompt // 2, completion_tokens=completion)
    timings = Timings(decode_s=completion / 50, ttft_s=0.25)
    return UsageRecord(
        request_id, time.time() - 10, origin, "/api/chat", model, 200, finish, usage=usage, timings=timings
    )


ALICE = Origin("ollama/completion", "alice", trust=Trust.VERIFIED)
CURL = Origin("openai/chat", "curl@127.0.0.1", "curl")
RECORDS = [
    record("1", ALICE, "llama3.2:latest", 20_000, 700),
    record("2", ALICE, "llama3.2:latest", 10_000, 300, finish="error"),
    record("3", CURL, "qwen3:latest", 100, 900),
]


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real admin routes over a real ledger that holds RECORDS."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        ledger = await Ledger.open(f"sqlite+aiosqlite:///{tmp_path}/usage.db")
        for each in RECORDS:
            await ledger.record(each)
        app.router.routes.extend(routes(ledger))
        yield
        await ledger.close()

    with serving(Starlette(lifespan=lifespan)) as address:
        monkeypatch.setenv("OLLAMA_HOST", address)
        yield


@pytest.mark.usefixtures("gateway")
def test_usage_tells_who_used_what() -> None:
    """One row for each caller and model, the largest first, and all of them added up."""
    lines = [line.split() for line in CliRunner().invoke(app, ["usage"]).output.splitlines()]
    assert lines == [
        ["CALLER", "MODEL", "REQ", "ERR", "PROMPT", "CACHED", "OUTPUT", "TOTAL", "TOK/S", "TTFT", "SHARE"],
        [
            "alice",
            "(verified)",
            "llama3.2:latest",
            "2",
            "1",
            "30.0K",
            "15.0K",
            "1000",
            "31.0K",
            "50.0",
            "0.25s",
            "97%",
        ],
        ["curl@127.0.0.1", "qwen3:latest", "1", "0", "100", "50", "900", "1000", "50.0", "0.25s", "3%"],
        ["TOTAL", "3", "1", "30.1K", "15.1K", "1900", "32.0K", "50.0", "0.25s", "100%"],
    ]


@pytest.mark.usefixtures("gateway")
def test_usage_in_a_narrow_terminal_leaves_numbers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eighty columns hold the names and the more important numbers."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    lines = CliRunner().invoke(app, ["usage"]).output.splitlines()
    assert lines[0].split() == ["CALLER", "MODEL", "REQ", "ERR", "PROMPT", "OUTPUT", "TOTAL", "TOK/S"]
    assert max(map(len, lines)) <= 80


@pytest.mark.usefixtures("gateway")
def test_usage_by_hour_names_the_hour_and_goes_forward_in_time() -> None:
    """Hours are in the reader's own time."""
    rows = CliRunner().invoke(app, ["usage", "--by", "hour"]).output.splitlines()[1:]
    assert time.strftime("%Y-%m-%d %H:", time.localtime(RECORDS[0].started_at)) in rows[0]
    assert rows == [*sorted(rows[:-1]), rows[-1]]


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize("by", ["client", "user", "surface", "model", "surface,caller,model"])
def test_usage_groups_by_every_dimension(by: str) -> None:
    """Each name that the server knows is a column here."""
    result = CliRunner().invoke(app, ["usage", "--by", by])
    assert result.exit_code == 0
    assert result.output.split()[: by.count(",") + 1] == by.upper().split(",")


@pytest.mark.usefixtures("gateway")
def test_usage_without_requests_is_a_row_of_zeros() -> None:
    """A span in which nothing happened is no error."""
    result = CliRunner().invoke(app, ["usage", "--since", "2d", "--until", "1d"])
    assert result.output.splitlines()[1].split() == ["TOTAL", *["0"] * 6, "-", "-", "-"]


@pytest.mark.usefixtures("gateway")
def test_usage_as_json_is_what_the_server_said() -> None:
    """Programs get exact numbers."""
    report = json.loads(CliRunner().invoke(app, ["usage", "--json"]).output)
    assert report["by"] == ["caller", "model"]
    assert report["totals"]["prompt_tokens"] == 30_100


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize(
    ("arguments", "message"), [(["--by", "colour"], "cannot group by colour"), (["--since", "x"], "'x' is no time")]
)
def test_bad_question_is_told_in_the_servers_words(arguments: list[str], message: str) -> None:
    """What can be asked for is the server's to say."""
    result = CliRunner().invoke(app, ["usage", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr


def test_usage_of_a_server_without_a_ledger_is_told(server: CLIServer) -> None:
    """Ollama, for one, keeps no such books."""
    result = CliRunner().invoke(app, ["usage"])
    assert result.exit_code == 1
    assert "answered 404 Not Found" in result.stderr
