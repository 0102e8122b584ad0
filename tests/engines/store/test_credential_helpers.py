"""Programs that keep passwords for Docker."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import eventually, is_alive, pid_in
from registries import docker_login

from engines.store.credential_helpers import Secret, ask_helper
from engines.store.credentials import Credentials, find_credentials

KEEPER = """
import json, sys
kept = {kept!r}
server = sys.stdin.read().strip()
open({asked!r}, "a").write(f"{{sys.argv[1:]}} {{server}}\\n")
if server not in kept:
    print("credentials not found in native keychain")
    sys.exit(1)
print(json.dumps({{"ServerURL": server, "Username": kept[server][0], "Secret": kept[server][1]}}))
"""


@pytest.fixture(name="bin_")
def bin_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs that are found first."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return directory


def install(bin_: Path, name: str, program: str) -> None:
    """Put a helper there."""
    path = bin_ / f"docker-credential-{name}"
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(0o755)


def keep(bin_: Path, name: str, **kept: tuple[str, str]) -> Path:
    """A helper that has passwords by server; the file lists what it was asked."""
    asked = bin_ / f"{name}.asked"
    servers = {server.replace("__", "."): secret for server, secret in kept.items()}
    install(bin_, name, KEEPER.format(kept=servers, asked=str(asked)))
    return asked


def config(tmp_path: Path, **fields: Any) -> Path:
    """Docker's config."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    return path


def test_a_store_is_asked_for_every_registry(tmp_path: Path, bin_: Path) -> None:
    """By the address that `docker login` has for it."""
    asked = keep(bin_, "desktop", a__lan=("ann", "s3cret"))
    path = config(tmp_path, credsStore="desktop", auths={"a.lan": {}, "https://b.lan": {}})
    assert find_credentials(path, "a.lan") == Credentials("ann", "s3cret")
    assert find_credentials(path, "b.lan") is None
    assert find_credentials(path, "registry-1.docker.io") is None
    assert asked.read_text().splitlines() == [
        "['get'] a.lan",
        "['get'] https://b.lan",
        "['get'] https://index.docker.io/v1/",
    ]


def test_a_helper_of_one_registry_goes_before_the_store(tmp_path: Path, bin_: Path) -> None:
    """And is asked for no other."""
    keep(bin_, "one", a__lan=("ann", "one"))
    keep(bin_, "all", a__lan=("bob", "all"), b__lan=("bob", "all"))
    path = config(tmp_path, credsStore="all", credHelpers={"a.lan": "one"})
    assert find_credentials(path, "a.lan") == Credentials("ann", "one")
    assert find_credentials(path, "b.lan") == Credentials("bob", "all")


def test_what_no_helper_has_may_be_in_the_file(tmp_path: Path, bin_: Path) -> None:
    """Docker leaves older logins there."""
    keep(bin_, "empty")
    path = docker_login(tmp_path, "a.lan", "ann", "filed")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"credsStore": "empty"}))
    assert find_credentials(path, "a.lan") == Credentials("ann", "filed")


@pytest.mark.parametrize(
    "program",
    [
        "",
        "print('no JSON')",
        "print('[]')",
        "print('{}')",
        "import sys; sys.stdout.buffer.write(bytes([255, 254]))",
        'print(\'{"Username": "<token>", "Secret": "x"}\')',
        'print(\'{"Username": "ann", "Secret": ""}\')',
        "import sys; sys.exit(3)",
        "import os; os.kill(os.getpid(), 9)",
        "while True: print('x' * 10_000)",
    ],
)
def test_a_helper_that_makes_no_sense_has_no_passwords(bin_: Path, program: str) -> None:
    """It is no reason for a pull to fail."""
    install(bin_, "odd", program)
    assert ask_helper("odd", "a.lan") is None


@pytest.mark.parametrize("name", ["nobody", "", "../odd", "a/b", "x" * 200, "-h"])
def test_a_helper_that_is_not_there_has_no_passwords(bin_: Path, name: str) -> None:
    """Whatever the config calls it, nothing outside the path is run."""
    install(bin_, "odd", 'print(\'{"Username": "ann", "Secret": "x"}\')')
    assert ask_helper(name, "a.lan") is None
    assert ask_helper("odd", "a.lan") == Secret("ann", "x")


def test_a_helper_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, bin_: Path) -> None:
    """One that waits for a password that nobody types must not hold up a pull for ever."""
    pids = tmp_path / "pid"
    program = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pids)!r}, "w").write(f"{{child.pid}}\\n")
time.sleep(60)
"""
    install(bin_, "slow", program)
    started = time.monotonic()
    assert ask_helper("slow", "a.lan", timeout_s=2.0) is None
    assert time.monotonic() - started < 20
    child = pid_in(pids)
    eventually(lambda: not is_alive(child))
