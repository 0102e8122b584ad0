"""A Headwater of our own to measure: started on a free port, with a store and a ledger of its own, and stopped.

Nothing of the user's settings reaches it, so what is measured is what Headwater does by default.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.process import free_port, run_process
from engines.inference import LoadConfig
from engines.store.blobs import blob_path, write_blob
from engines.store.gguf import read_header
from engines.store.gojson import encode_json
from engines.store.manifests import CONFIG_TYPE, LAYER_TYPE, Layer, Manifest, ModelConfig, write_manifest
from engines.store.names import parse_name

DEMO = Path(__file__).parent.parent / "engines" / "store" / "demo" / "demo.gguf"
WINDOWS = 4
"""Full windows that a model's KV cache has room for at least unless it is told otherwise (engines.llamacpp.backend)."""


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
def run_server(
    models: Mapping[str, Path], *, window: int = 0, data: Path | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start a server that has these models, by name, and stop it in the end.

    Args:
        models: their GGUF files.
        window: tokens of context of one request; 0 leaves it to the server.
        data: where it keeps what outlives it; None throws that away.
        settings: further variables.

    Raises:
        ServerFailed: it did not come up.
    """
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as directory:
        root = Path(directory)
        for name, weights in models.items():
            install(root / "models", name, weights)
        base_url = f"http://127.0.0.1:{free_port()}"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OLLAMA_", "HEADWATER_"))} | {
            "OLLAMA_HOST": base_url,
            "OLLAMA_MODELS": str(root / "models"),
            "OLLAMA_KEEP_ALIVE": "-1",
            "OLLAMA_CONTEXT_LENGTH": str(window),
            "HEADWATER_DATA": str(data or root / "data"),
            **(settings or {}),
        }
        with run_process([sys.executable, "-m", "gateway", "serve"], f"{base_url}/health", environment) as pid:
            yield Server(base_url, pid)


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
