"""Servers as processes: started, waited for, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx

START_S = 120.0
STOP_S = 60.0
POLL_S = 0.02


class ServerFailed(Exception):
    """The server did not start; the message ends with what it said."""


@contextlib.contextmanager
def run_process(command: list[str], health_url: str, environment: Mapping[str, str] | None = None) -> Iterator[int]:
    """A server until the context ends, from when it is healthy; gives its process id.

    Raises:
        ServerFailed: it did not come up.
    """
    with tempfile.NamedTemporaryFile(prefix="headwater-bench-", suffix=".log") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            if not _becomes_healthy(process, health_url):
                raise ServerFailed(f"{command[0]} did not start:\n{Path(log.name).read_text(errors='replace')[-4000:]}")
            yield process.pid
        finally:
            _stop(process)


def _becomes_healthy(process: subprocess.Popen[bytes], health_url: str) -> bool:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(health_url, timeout=2, trust_env=False).status_code == 200:
                return True
        time.sleep(POLL_S)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
