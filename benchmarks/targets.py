"""What can be measured: Headwater and the servers beside it, each started with the same model and the same room.

A target knows how to start a server, how to ask it, and how to read its memory and what it has computed. The others get
the flags that they recommend for that many clients, and everything else at their defaults; `Running.flags` says which.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httpx
import psutil

from benchmarks.load import OLLAMA, OPENAI, Ask, Dialect, Load, ask, run_load
from benchmarks.process import free_port, run_process
from benchmarks.prompts import Writer
from benchmarks.server import WINDOWS, run_server

HEADWATER = "Headwater"
LLAMA_SERVER = "llama-server"

THREADS = len(os.sched_getaffinity(0))
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Spec:
    """What a server must be able to do.

    Attributes:
        clients: requests at once. cells: tokens of context in all. embeddings: whether the model only makes those.
        data: where Headwater keeps what outlives it; None throws it away with the server.
    """

    weights: Path
    clients: int = 1
    cells: int = 16384
    embeddings: bool = False
    data: Path | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """A server that runs and has loaded the model.

    Attributes:
        prefill_metric: name of the counter of computed prompt tokens at `/metrics`, where there is one.
        pid: the server's first process; None when it runs elsewhere.
    """

    name: str
    base_url: str
    model: str
    flags: str
    dialects: tuple[Dialect, ...] = (OPENAI,)
    pid: int | None = None
    prefill_metric: str = ""

    def via(self, dialect: Dialect) -> str:
        """The name under which numbers stand: the server's, and the dialect's if it is not the first."""
        return self.name if dialect is self.dialects[0] else f"{self.name} {dialect.name}"

    def warm_up(self) -> None:
        """Have the model loaded and every page of it read. Raises RequestFailed."""
        self.load([[ask(Writer(time.time_ns()).text(8), WARM_UP_TOKENS)]])

    def load(
        self,
        clients: Sequence[Sequence[Ask]],
        background: Sequence[Iterator[Ask]] = (),
        dialect: Dialect | None = None,
    ) -> Load:
        """Load on it, in its first dialect unless another is given. Raises RequestFailed; see `run_load`."""
        return run_load(self.base_url, dialect or self.dialects[0], self.model, clients, background)

    def memory_bytes(self) -> float | None:
        """Resident, of all its processes together."""
        if self.pid is None:
            return None
        process = psutil.Process(self.pid)
        return float(sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]))

    def cpu_s(self) -> dict[str, float]:
        """Processor seconds so far, of its first process and of all together."""
        if self.pid is None:
            return {}
        process = psutil.Process(self.pid)
        first, *others = (sum(one.cpu_times()[:2]) for one in [process, *process.children(recursive=True)])
        return {"cpu_s": first + sum(others)} | ({"gateway_cpu_s": first} if others else {})

    def prefill_tokens(self) -> float | None:
        """Prompt tokens that it has computed since it started, if it says so."""
        if not self.prefill_metric:
            return None
        text = httpx.get(f"{self.base_url}/metrics", timeout=10, trust_env=False).text
        found = re.findall(rf"^{self.prefill_metric}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))


class Target(Protocol):
    """One kind of server."""

    @property
    def name(self) -> str:
        """What its numbers stand under."""

    def start(self, spec: Spec) -> AbstractContextManager[Running]:
        """A server of this kind until the context ends. Raises ServerFailed or RequestFailed."""


@dataclass(frozen=True, slots=True)
class Headwater:
    """This tree, with default settings but for the length of its context, asked in both dialects."""

    name: str = HEADWATER

    @contextlib.contextmanager
    def start(self, spec: Spec) -> Iterator[Running]:
        """Start it."""
        window = spec.cells // max(spec.clients, WINDOWS)  # as long as a slot of the others
        with run_server({"bench": spec.weights}, window=window, data=spec.data) as server:
            yield Running(
                self.name,
                server.base_url,
                "bench",
                f"OLLAMA_CONTEXT_LENGTH={window}",
                (OPENAI, OLLAMA),
                server.pid,
                "headwater_engine_prefill_tokens_total",
            )


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """llama.cpp's own server. `extra` are further flags."""

    binary: Path
    extra: str = ""
    name: str = LLAMA_SERVER

    @contextlib.contextmanager
    def start(self, spec: Spec) -> Iterator[Running]:
        """Start it with a slot for each client."""
        port = free_port()
        flags = f"-c {spec.cells} --parallel {spec.clients} -t {THREADS} --metrics --no-ui {self.extra}".split()
        flags += ["--embeddings"] if spec.embeddings else []
        command = [str(self.binary), "-m", str(spec.weights), "--host", "127.0.0.1", "--port", str(port), *flags]
        with run_process(command, f"http://127.0.0.1:{port}/health") as pid:
            yield Running(
                self.name,
                f"http://127.0.0.1:{port}",
                "bench",
                shlex.join(flags),
                pid=pid,
                prefill_metric="llamacpp:prompt_tokens_total",
            )


@dataclass(frozen=True, slots=True)
class PythonServer:
    """llama-cpp-python's server, run by a Python that has the extra `server`. It answers one request after another."""

    python: Path
    name: str = "llama-cpp-python"

    @contextlib.contextmanager
    def start(self, spec: Spec) -> Iterator[Running]:
        """Start it, told not to break off an answer when the next request comes."""
        port = free_port()
        flags = f"--n_ctx {spec.cells} --n_threads {THREADS} --interrupt_requests False".split()
        flags += ["--embedding", "True"] if spec.embeddings else []
        command = [str(self.python), "-m", "llama_cpp.server", "--model", str(spec.weights), "--port", str(port)]
        with run_process([*command, *flags], f"http://127.0.0.1:{port}/v1/models") as pid:
            yield Running(self.name, f"http://127.0.0.1:{port}", "bench", shlex.join(flags), pid=pid)


@dataclass(slots=True)
class Ollama:
    """An Ollama that runs already: the model is sent to it, and its settings are its own."""

    base_url: str
    name: str = "Ollama"
    _installed: set[str] = field(default_factory=set)

    @contextlib.contextmanager
    def start(self, spec: Spec) -> Iterator[Running]:
        """Install the model unless that was done before, and unload it in the end."""
        model = f"headwater-bench-{spec.weights.stem}-{spec.cells // spec.clients}".lower()
        with httpx.Client(base_url=self.base_url, timeout=600, trust_env=False) as http:
            if model not in self._installed:
                _install(http, model, spec)
                self._installed.add(model)
            try:
                yield Running(self.name, self.base_url, model, "as it runs", (OLLAMA, OPENAI))
            finally:
                http.post("/api/generate", json={"model": model, "keep_alive": 0})


def _install(http: httpx.Client, model: str, spec: Spec) -> None:
    with spec.weights.open("rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        file.seek(0)
        if http.head(f"/api/blobs/{digest}").status_code != 200:
            http.post(f"/api/blobs/{digest}", content=file).raise_for_status()
    body = {
        "model": model,
        "files": {spec.weights.name: digest},
        "parameters": {"num_ctx": spec.cells // spec.clients},
        "stream": False,
    }
    http.post("/api/create", json=body).raise_for_status()
