"""A Headwater of our own to measure: started on a free port, with a store and a ledger of its own, and stopped.

Nothing of the user's settings reaches it, so what is measured is what Headwater does by default.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from engines.inference import LoadConfig
from engines.store.blobs import blob_path, write_blob
from engines.store.gguf import read_header
from engines.store.gojson import encode_json
from engines.store.manifests import CONFIG_TYPE, LAYER_TYPE, Layer, Manifest, ModelConfig, write_manifest
from engines.store.names import parse_name

START_S = 60.0
STOP_S = 30.0
POLL_S = 0.05


class ServerFailed(Exception):
    """The server did not start; the message ends with what it said."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One of the server's workers, as its command line describes it. `model` is the id that it answers to."""

    socket: Path
    model: str
    config: LoadConfig


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    base_url: str
    pid: int

    def worker_of(self, weights: Path) -> Worker:
        """The worker that has loaded those weights. Raises LookupError when none has."""
        for child in psutil.Process(self.pid).children(recursive=True):
            argv = child.cmdline()
            if "engines.worker" not in argv:
                continue
            said = {name: argv[argv.index(name) + 1] for name in ("--socket", "--model", "--name", "--config")}
            if Path(said["--model"]).resolve() == weights.resolve():
                return Worker(Path(said["--socket"]), said["--name"], LoadConfig(**json.loads(said["--config"])))
        raise LookupError(f"no worker has loaded {weights.name}")


@contextlib.contextmanager
def run_server(models: Mapping[str, Path]) -> Iterator[Server]:
    """Start a server that has these models, by name, and stop it in the end.

    Raises:
        ServerFailed: it did not come up.
    """
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as directory:
        root = Path(directory)
        for name, weights in models.items():
            install(root / "models", name, weights)
        port = _free_port()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OLLAMA_", "HEADWATER_"))} | {
            "OLLAMA_HOST": f"127.0.0.1:{port}",
            "OLLAMA_MODELS": str(root / "models"),
            "OLLAMA_KEEP_ALIVE": "-1",
            "HEADWATER_DATA": str(root / "data"),
        }
        log = root / "server.log"
        with log.open("wb") as output:
            command = [sys.executable, "-m", "gateway", "serve"]
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            base_url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(process, base_url, log)
            yield Server(base_url, process.pid)
        finally:
            _stop(process)


def install(models: Path, name: str, weights: Path) -> None:
    """Register a GGUF in a store without copying it: its blob is a symbolic link."""
    with weights.open("rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    blob = blob_path(models, digest)
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.symlink_to(weights.resolve())
    header = read_header(weights, arrays=False)
    config = encode_json(
        ModelConfig(
            model_format="gguf",
            model_family=header.architecture,
            model_families=(header.architecture,),
            model_type=header.parameter_size,
            file_type=header.file_type,
            architecture="amd64",
            os="linux",
        )
    )
    manifest = Manifest(
        config=Layer(CONFIG_TYPE, write_blob(models, config), len(config)),
        layers=(Layer(f"{LAYER_TYPE}model", digest, weights.stat().st_size),),
    )
    write_manifest(models, parse_name(name), manifest)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_healthy(process: subprocess.Popen[bytes], base_url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{base_url}/health", timeout=2, trust_env=False).status_code == 200:
                return
        time.sleep(POLL_S)
    raise ServerFailed(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
