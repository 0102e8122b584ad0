"""A real `headwater serve` for a test: its own port, models and data, and always stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_S = 20.0


@dataclass
class Server:
    """One running server."""

    url: str
    root: Path
    process: subprocess.Popen[bytes]

    @property
    def database(self) -> Path:
        """The usage ledger's file."""
        return self.root / "data" / "usage.db"

    @property
    def log(self) -> str:
        """What it has said so far."""
        return (self.root / "log").read_text()

    def kill(self) -> None:
        """End it as a power cut would end the process."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it politely; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(root: Path, *, host: str = "127.0.0.1", **env: str) -> Server:
    """Start a server on `root`, which may hold the state of an earlier one, and wait until it answers."""
    port = free_port()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("OLLAMA_", "HEADWATER_"))},
        "OLLAMA_HOST": f"{host}:{port}",
        "OLLAMA_MODELS": str(root / "models"),
        "HEADWATER_DATA": str(root / "data"),
        **env,
    }
    with (root / "log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "gateway", "serve"], env=environment, stdout=log, stderr=log)
    server = Server(f"http://127.0.0.1:{port}", root, process)
    deadline = time.monotonic() + START_S
    while True:
        try:
            httpx.get(f"{server.url}/health").raise_for_status()
            return server
        except httpx.TransportError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"the server did not start:\n{server.log}") from None
            time.sleep(0.02)


@contextmanager
def serving(root: Path, *, host: str = "127.0.0.1", **env: str) -> Iterator[Server]:
    """A server for the length of a test."""
    server = start(root, host=host, **env)
    try:
        yield server
    finally:
        server.stop()


def workers_of(server: Server) -> list[int]:
    """Process ids of the workers whose parent the server is."""
    found = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]
