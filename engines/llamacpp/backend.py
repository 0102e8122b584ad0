"""The llama.cpp backend: runs `python -m engines.worker`, one process a model.

It imports neither llama.cpp nor the worker, so the gateway can hold it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from engines.backend import Backend, BackendConfiguration, RequiredMemory
from engines.errors import ModelLoadFailed, WorkerCrashed
from engines.inference import LoadConfig
from engines.process import ProcessExited, run_process
from engines.request import Mode

_EXIT_LOAD_FAILED = 3  # engines.worker
_LOAD_ERROR_PREFIX = "load failed: "


class LlamaCppBackend(Backend):
    """Serves GGUF models.

    Args:
        locate: the GGUF of a model id. engine: the worker's engine; tests run the fake one in real processes.
        grace_s: how long a worker may take to stop before it is killed.
    """

    def __init__(self, locate: Callable[[str], Path], *, engine: str = "llamacpp", grace_s: float = 5.0) -> None:
        self._locate = locate
        self._engine = engine
        self._grace_s = grace_s

    @property
    def name(self) -> str:
        """`llama.cpp`."""
        return "llama.cpp"

    async def run(
        self, socket: Path, model: str, model_ref: str, mode: Mode, config: BackendConfiguration | None = None
    ) -> None:
        """Run a worker process until cancelled."""
        argv = [sys.executable, "-m", "engines.worker", "--engine", self._engine, "--mode", mode]
        argv += ["--socket", str(socket), "--model", str(self._locate(model)), "--name", model, "--name", model_ref]
        argv += ["--config", json.dumps(asdict(_load_config(config or BackendConfiguration())))]
        try:
            await run_process(argv, name=f"worker {model_ref}", grace_s=self._grace_s)
        except ProcessExited as end:
            raise _explain(end) from end
        finally:
            socket.unlink(missing_ok=True)  # noqa: ASYNC240  # one unlink, and it must not be cut off

    def status(self) -> str:
        """Whether the binding is installed; it is not imported to find out."""
        if importlib.util.find_spec("llama_cpp") is None:
            return "Not Installed: package not installed"
        return f"Running: llama.cpp (llama-cpp-python {importlib.metadata.version('llama-cpp-python')})"

    async def required_memory(self, model: str, config: BackendConfiguration | None = None) -> RequiredMemory:
        """The weights alone, which is a lower bound: the cache and compute buffers come on top."""
        return RequiredMemory(ram_bytes=self._locate(model).stat().st_size)


def _load_config(config: BackendConfiguration) -> LoadConfig:
    return LoadConfig(
        gpu_ids=(config.main_gpu,) if config.main_gpu is not None else (),
        gpu_layers=config.num_gpu if config.num_gpu is not None else -1,
        context_size=config.context_size,
        num_parallel=config.num_parallel,
        num_sequences=config.num_sequences,
        num_batch=config.num_batch or 512,
        num_threads=config.num_thread or 0,
        use_mmap=config.use_mmap,
    )


def _explain(end: ProcessExited) -> Exception:
    """What the end of a worker means. Its own word for a failed load is the last such line; else its last words."""
    if end.status == _EXIT_LOAD_FAILED:
        said = [line for line in end.tail.splitlines() if line.startswith(_LOAD_ERROR_PREFIX)]
        reason = said[-1].removeprefix(_LOAD_ERROR_PREFIX) if said else str(end)
        rest = "\n".join(line for line in end.tail.splitlines() if not line.startswith(_LOAD_ERROR_PREFIX))
        return ModelLoadFailed(f"{reason}\n{rest}".strip())
    return WorkerCrashed(f"the model's worker ended unexpectedly ({end})\n{end.tail}".strip())
