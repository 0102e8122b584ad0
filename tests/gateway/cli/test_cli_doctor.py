from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_server import CLIServer, nobody_fixture, server_fixture  # noqa: F401 - fixtures
from typer.testing import CliRunner

from engines.store.seed import seed_demo
from gateway.cli import checks
from gateway.cli.checks import Level
from gateway.cli.main import app
from gateway.usage.database import open_database

as_root = os.geteuid() == 0  # whom no permission keeps out


@pytest.fixture
def tidy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nobody: str) -> Path:
    """A setup without faults: an empty place of its own, a free port, and a library that loads."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HEADWATER_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("HEADWATER_DATABASE_URL", raising=False)
    return tmp_path


def test_doctor_finds_no_problem_and_changes_nothing(tidy: Path) -> None:
    """A first look before the first start: every check answers, and no directory appears."""
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    found = [line.split()[1] for line in result.output.splitlines() if not line.startswith(" ")]
    assert found == [
        *("settings", "python", "llama.cpp", "kernels", "models", "data", "database", "port", "memory", "disk"),
    ]
    assert list(tidy.iterdir()) == []


def test_doctor_as_json_has_every_finding(tidy: Path) -> None:
    """Programs get level, detail and advice of each."""
    report = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert report["ok"] is True
    assert {"check", "level", "detail", "advice"} == set(report["findings"][0])


def test_problem_fails_the_command(tidy: Path, server: CLIServer) -> None:
    """Somebody else on the port is a problem, with what to do about it."""
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "-> stop it, or let Headwater listen elsewhere" in result.output


def test_bad_setting_is_the_only_finding(tidy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without settings there is nothing else to look at."""
    monkeypatch.setenv("OLLAMA_MAX_QUEUE", "many")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "OLLAMA_MAX_QUEUE" in result.output


def test_command_line_imports_nothing_heavy() -> None:
    """Commands start quickly, and a broken llama.cpp cannot crash them."""
    code = "import sys, gateway.cli.main, gateway.cli.checks; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"llama_cpp", "sqlalchemy", "starlette", "uvicorn"} & set(done.stdout.split())


def test_llama_cpp_is_described() -> None:
    """The version of the binding and what it was built with."""
    finding = checks.check_llama_cpp()
    assert finding.level is Level.OK
    assert finding.detail.startswith("llama-cpp-python ")


def test_kernels_say_what_keeps_them_from_being_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow is not broken, but whoever wonders finds the reason."""
    monkeypatch.setenv("HEADWATER_KERNELS", "0")
    finding = checks.check_kernels()
    assert (finding.level, finding.detail) == (Level.OK, "llama.cpp's own: HEADWATER_KERNELS turns them off")


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("raise ImportError('libllama.so: cannot open')", "cannot be loaded: ImportError: libllama.so: cannot open"),
        ("import os; os.abort()", "cannot be loaded: exit status -6"),
        ("print('hello')", "says nothing sensible"),
        ("print(7)", "says nothing sensible"),
    ],
)
def test_broken_llama_cpp_is_a_problem(monkeypatch: pytest.MonkeyPatch, program: str, detail: str) -> None:
    """A library that fails or crashes is told in its last words."""
    monkeypatch.setattr(checks, "_ASK_LLAMA_CPP", program)
    finding = checks.check_llama_cpp()
    assert finding.level is Level.PROBLEM
    assert detail in finding.detail


def test_models_are_counted(tmp_path: Path) -> None:
    """A store with a model that can be used is as it should be."""
    models = tmp_path / "models"
    seed_demo(models, tmp_path / "seeded")
    finding = checks.check_models(models)
    assert (finding.level, finding.detail) == (Level.OK, f"1 model in {models}")


def test_models_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    """A manifest without its files is no model, and `headwater list` would not say why."""
    manifest = tmp_path / "manifests/registry.ollama.ai/library/llama3.2/latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    finding = checks.check_models(tmp_path)
    assert (finding.level, finding.detail) == (Level.WARNING, f"0 models in {tmp_path}, and 1 that cannot be used")


def test_store_that_is_a_file_is_a_problem(tmp_path: Path) -> None:
    """Neither models nor data can be kept in a file, nor below one."""
    file = tmp_path / "file"
    file.touch()
    assert checks.check_models(file).level is Level.PROBLEM
    assert checks.check_data(file).level is Level.PROBLEM
    assert checks.check_data(file / "below").level is Level.PROBLEM
    assert checks.check_disk(file / "below").level is not Level.PROBLEM


@pytest.mark.skipif(as_root, reason="root may write everywhere")
def test_directories_without_access_are_told(tmp_path: Path) -> None:
    """A store without read access and a data directory without write access are problems."""
    tmp_path.chmod(0o555)
    assert checks.check_models(tmp_path).level is Level.WARNING
    assert checks.check_data(tmp_path / "data").level is Level.PROBLEM
    tmp_path.chmod(0o000)
    assert checks.check_models(tmp_path).level is Level.PROBLEM
    tmp_path.chmod(0o755)


def test_migrated_database_is_ok(tmp_path: Path) -> None:
    """A ledger as the server leaves it is read without leaving anything behind."""
    url = f"sqlite+aiosqlite:///{tmp_path}/usage.db"

    async def create() -> None:
        await (await open_database(url)).dispose()

    asyncio.run(create())
    before = sorted(tmp_path.iterdir())
    finding = checks.check_database(url)
    assert finding.level is Level.OK, finding
    assert "schema" in finding.detail
    assert sorted(tmp_path.iterdir()) == before


def test_database_in_use_is_ok(tmp_path: Path) -> None:
    """The ledger of a running server can be looked at."""
    url = f"sqlite+aiosqlite:///{tmp_path}/usage.db"

    async def look() -> checks.Finding:
        database = await open_database(url)
        try:
            return checks.check_database(url)
        finally:
            await database.dispose()

    assert asyncio.run(look()).level is Level.OK


def test_damaged_database_is_a_problem(tmp_path: Path) -> None:
    """A file that is no database is told, and left as it is."""
    path = tmp_path / "usage.db"
    path.write_bytes(b"not a database" * 100)
    assert checks.check_database(f"sqlite+aiosqlite:///{path}").level is Level.PROBLEM
    assert path.read_bytes() == b"not a database" * 100


def test_unreachable_database_server_is_a_problem(nobody: str) -> None:
    """PostgreSQL that does not answer is told without the password."""
    finding = checks.check_database(f"postgresql+asyncpg://user:secret@{nobody}/headwater")
    assert finding.level is Level.PROBLEM
    assert "secret" not in finding.detail


def test_answering_database_server_is_ok(server: CLIServer) -> None:
    """Whether its schema is right is for the server's start to see."""
    assert checks.check_database(f"postgresql+asyncpg://u:p@{server.address}/headwater").level is Level.OK


def test_free_port_is_ok(nobody: str) -> None:
    """Nobody there is what a first start needs."""
    finding = checks.check_port(f"http://{nobody}")
    assert finding.level is Level.OK
    assert "free" in finding.detail


def test_port_held_by_headwater_is_ok(server: CLIServer) -> None:
    """It is running."""
    server.answers["/health"] = ({"server": "headwater", "status": "ok"}, 200)
    finding = checks.check_port(f"http://{server.address}")
    assert (finding.level, finding.detail) == (Level.OK, f"Headwater is running at {server.address}")


@pytest.mark.parametrize("health", [("404 page not found", 404), ([], 200), ({"server": 5}, 200), (None, 200)])
def test_port_held_by_ollama_is_named(server: CLIServer, health: tuple[object, int]) -> None:
    """Ollama says who it is at its root, whatever it answers to /health."""
    server.answers |= {"/health": health, "/": ("Ollama is running", 200)}
    finding = checks.check_port(f"http://{server.address}")
    assert finding.level is Level.PROBLEM
    assert "held by Ollama" in finding.detail


def test_port_held_by_another_web_server_is_a_problem(server: CLIServer) -> None:
    """A stranger is called one."""
    assert "another program" in checks.check_port(f"http://{server.address}").detail


@pytest.fixture
def babbler() -> Iterator[str]:
    """A program on a port that does not speak HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def babble() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=babble)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_port_held_by_what_is_no_web_server_is_a_problem(babbler: str) -> None:
    """Anything that listens and is not HTTP is a stranger, too."""
    finding = checks.check_port(f"http://{babbler}")
    assert finding.level is Level.PROBLEM
    assert "another program" in finding.detail


def test_memory_and_disk_are_told(tmp_path: Path) -> None:
    """Both are measured, for a directory that need not exist yet."""
    assert "available" in checks.check_memory().detail
    assert "free for models" in checks.check_disk(tmp_path / "not/yet").detail
