"""The llama.cpp backend: runs `python -m engines.worker`, one process a model.

It imports neither llama.cpp nor the worker, so the gateway can hold it.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

from engines.backend import Backend, BackendConfiguration, RequiredMemory
from engines.errors import ModelLoadFailed, OutOfMemory, WorkerCrashed, WorkerKilled
from engines.inference import LoadConfig
from engines.llamacpp.memory import estimate
from engines.process import ProcessExited, run_process
from engines.request import Mode
from engines.store.gguf import GGUFHeader, merge_parts, read_header

POOLED_WINDOWS = 4
"""Windows that requests share: few use theirs up."""

STREAMS = 8
"""Requests at once beyond which little is won: two cores decode a fifth more for 16, each at 6 tenths of the pace."""

_EXIT_LOAD_FAILED, _LOAD_ERROR_PREFIX = 3, "load failed: "  # engines.worker
_EXIT_HUNG, _HUNG_PREFIX = 5, "watchdog: "  # engines.watchdog
_ACCELERATOR = re.compile(r"ggml-(?:cuda|hip|musa|vulkan|sycl|cann)")
_GPU = re.compile(rf"{_ACCELERATOR.pattern}|ggml-metal")
_OUT_OF_MEMORY = re.compile(
    r"(?:unable|failed) to allocate|cannot allocate memory|bad_alloc|not be enough memory", re.I
)


class LlamaCppBackend(Backend):
    """Serves GGUF models.

    Args:
        locate: the GGUF of a model id. engine: the worker's engine; tests run the fake one in real processes.
        grace_s: how long a worker may take to stop before it is killed. step_limit_s: how long a step may take, with
            more for large models, before the worker counts as hanging.
    """

    def __init__(
        self,
        locate: Callable[[str], Path],
        *,
        engine: str = "llamacpp",
        grace_s: float = 5.0,
        step_limit_s: float = 120.0,
    ) -> None:
        self._locate = locate
        self._engine = engine
        self._grace_s = grace_s
        self._step_limit_s = step_limit_s

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
        load_config = replace(_load_config(config or BackendConfiguration()), step_limit_s=self._step_limit_s)
        if mode is Mode.COMPLETION:
            load_config = _choose_attention(load_config)
        argv += ["--config", json.dumps(asdict(load_config))]
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

    def windows(self, config: BackendConfiguration | None = None) -> int:
        """A few where requests share them; as streams, one for each request that is decoded at once."""
        shared = _choose_attention(_load_config(config or BackendConfiguration())).unified_cache
        return POOLED_WINDOWS if shared else STREAMS

    async def required_memory(self, model: str, config: BackendConfiguration | None = None) -> RequiredMemory:
        """Weights, cache, compute buffers and the process, from the file's header; see `engines.llamacpp.memory`.

        What an accelerator takes is told apart where the library was built for one that has memory of its own.
        """
        config = config or BackendConfiguration()
        paths = config.parts or (self._locate(model),)
        header = await asyncio.to_thread(lambda: merge_parts([_header(p, p.stat().st_mtime_ns) for p in paths]))
        load_config = _choose_attention(_load_config(config))
        need = estimate(header, load_config)
        num_layers = header.count("block_count")
        vram_bytes = need.offloaded_bytes(num_layers, load_config.gpu_layers) if _has_library(_ACCELERATOR) else 0
        return RequiredMemory(ram_bytes=need.total_bytes - vram_bytes, vram_bytes=vram_bytes)


def _choose_attention(config: LoadConfig) -> LoadConfig:
    """Processors attend in streams and, without a word on it, without flash attention.

    In one pool of cells each token is compared with everyone's: on two cores, 0.5 B parameters decode 84 tokens/s for 8
    sequences of 300 tokens in streams and 69 in one pool. The flash attention of processors takes one token at a time
    while fewer than 64 are computed: the 84 are 65 with it, and one sequence behind 3,000 cells gets 11 instead of 22.
    llama.cpp would use it wherever it can. A cache that is not `f16` needs it.
    """
    if config.gpu_layers != 0 and _has_library(_GPU):
        return config
    without = config.flash_attention is None and config.cache_type == "f16"
    return replace(config, unified_cache=False, flash_attention=False if without else config.flash_attention)


@lru_cache(maxsize=2)
def _has_library(name: re.Pattern[str]) -> bool:
    """Whether the installed llama.cpp has a library of that name, as it has one for each kind of device."""
    spec = importlib.util.find_spec("llama_cpp")
    folders = map(Path, spec.submodule_search_locations or ()) if spec else ()
    return any(name.search(file.name) for folder in folders for file in (folder / "lib").glob("*ggml*"))


@lru_cache(maxsize=64)
def _header(path: Path, modified_ns: int) -> GGUFHeader:
    return read_header(path, arrays=False)


def _load_config(config: BackendConfiguration) -> LoadConfig:
    return LoadConfig(
        gpu_ids=(config.main_gpu,) if config.main_gpu is not None else (),
        gpu_layers=config.num_gpu if config.num_gpu is not None else -1,
        context_size=config.context_size,
        num_parallel=config.num_parallel,
        num_sequences=config.num_sequences,
        num_batch=max(config.num_batch or 0, 0) or 512,
        num_threads=max(config.num_thread or 0, 0),
        use_mmap=config.use_mmap,
        use_mlock=config.use_mlock,
        tensor_split=config.tensor_split,
        flash_attention=config.flash_attention,
        cache_type=config.cache_type,
        parts=tuple(map(str, config.parts)),
        adapters=tuple(map(str, config.adapters)),
        prefill_slowdown=config.prefill_slowdown,
        shelf_memory_bytes=config.shelf_memory_bytes,
        shelf=str(config.shelf) if config.shelf is not None else "",
        shelf_bytes=config.shelf_bytes,
    )


def _explain(end: ProcessExited) -> Exception:
    """What the end of a worker means: its own word on it where it has said one, and its last words."""
    if end.status == _EXIT_LOAD_FAILED:
        reason, rest = _split(end, _LOAD_ERROR_PREFIX)
        failure = OutOfMemory if _OUT_OF_MEMORY.search(end.tail) else ModelLoadFailed
        return failure(f"{reason}\n{rest}".strip())
    if end.status == _EXIT_HUNG:
        reason, rest = _split(end, _HUNG_PREFIX)
        return WorkerCrashed(f"the model's worker hung and was ended: {reason}\n{rest}".strip())
    if end.status == -signal.SIGKILL:
        return WorkerKilled(
            f"the model's worker was killed by SIGKILL, most likely because memory ran out\n{end.tail}".strip()
        )
    crash = WorkerKilled if _OUT_OF_MEMORY.search(end.tail) else WorkerCrashed
    return crash(f"the model's worker ended unexpectedly ({end})\n{end.tail}".strip())


def _split(end: ProcessExited, prefix: str) -> tuple[str, str]:
    """The last line with the worker's own word, and everything else."""
    lines = end.tail.splitlines()
    said = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
    return said[-1] if said else str(end), "\n".join(line for line in lines if not line.startswith(prefix))
