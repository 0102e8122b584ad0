"""Backend: what installs and runs workers, one process for each loaded model.

The process-level seam, after Docker Model Runner's (`spec/model-runner.md` section 2). A backend knows how to turn a
model id into a process that serves it; when to start and stop one, and who may use it, is the gateway's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from engines.request import Mode


@dataclass(frozen=True, slots=True)
class BackendConfiguration:
    """How one worker is to run its model; None leaves a choice to the backend.

    Attributes:
        context_size: window of one request in tokens; -1 the model's own.
        num_parallel: windows that the KV cache holds at once. num_sequences: most requests decoded together.
        use_mlock: keep the weights from being swapped out. tensor_split: shares of each device, empty chooses.
        flash_attention: None leaves it to the engine. cache_type: of K and V, `f16`, `q8_0` or `q4_0`.
        parts: the files of a split model in order, empty for a single one. adapters: LoRA files to apply.
        prefill_slowdown: how many times longer a step may take for those who decode when a prompt is read beside them.
        shelf_memory_bytes: for prefixes of prompts outside the KV cache. shelf: the folder where others may be kept,
            all models' together within `shelf_bytes`.
        runtime_flags: further flags in the engine's own words, where it takes any.
        draft_model: a smaller model that proposes tokens.
    """

    context_size: int | None = None
    num_parallel: int = 1
    num_sequences: int = 64
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    use_mmap: bool | None = None
    use_mlock: bool = False
    tensor_split: tuple[float, ...] = ()
    flash_attention: bool | None = None
    cache_type: str = "f16"
    parts: tuple[Path, ...] = ()
    adapters: tuple[Path, ...] = ()
    prefill_slowdown: float = 2.5
    shelf_memory_bytes: int = 512 << 20
    shelf: Path | None = None
    shelf_bytes: int = 0
    draft_model: str = ""
    runtime_flags: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class RequiredMemory:
    """Bytes that loading a model takes; None where it cannot be told."""

    ram_bytes: int | None = None
    vram_bytes: int | None = None


class Backend(ABC):
    """One way to serve models. Calls need not be safe beside each other, except `run`, whose state is its own."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Lowercase, safe in a path and in a file name: `llama.cpp`."""

    @property
    def uses_external_model_management(self) -> bool:
        """Whether models come from somewhere else than our store."""
        return False

    async def install(self) -> None:  # noqa: B027  # nothing to do is the right default
        """Make `run` possible. Idempotent."""

    @abstractmethod
    async def run(
        self, socket: Path, model: str, model_ref: str, mode: Mode, config: BackendConfiguration | None = None
    ) -> None:
        """Serve `model` on `socket` until cancelled.

        Serves an OpenAI API for exactly one model on exactly one Unix socket, answers 421 for any other model and 503
        on `/health` until it is ready, never restarts by itself, and has reaped its children when it returns.

        `model` is the model's id, a digest; `model_ref` the name that the client used; the worker answers to both.

        Raises:
            ModelLoadFailed: the model could not be loaded. WorkerCrashed: it ended later by itself.
        """

    async def uninstall(self) -> None:  # noqa: B027  # nothing to do is the right default
        """Delete what `install` brought."""

    @abstractmethod
    def status(self) -> str:
        """`Running`, `Error`, `Not Installed` or `Installing`, with `: detail` behind it where there is one."""

    async def disk_usage(self) -> int:
        """Bytes that the installation takes; 0 when nothing was downloaded."""
        return 0

    def windows(self, config: BackendConfiguration | None = None) -> int:
        """How many windows a model's cache is to hold where nobody says so and memory allows it."""
        return 1

    async def required_memory(self, model: str, config: BackendConfiguration | None = None) -> RequiredMemory:
        """An estimate for loading a model. Raises GGUFParseError when its file cannot be read."""
        return RequiredMemory()
