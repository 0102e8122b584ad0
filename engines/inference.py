"""InferenceBackend: one loaded model in this process, whatever computes it.

The object-level seam (`spec/sessions-adapters.md` section 1): load, unload, is_loaded, model_info, infer and
infer_stream come from there, `generate`, `embed` and `rerank` are what `engines.worker` serves. Sessions and adapters
are part of the contract; an engine that has none inherits a refusal. The surprise: `generate` and `infer_stream` are
coroutines that return an iterator, so that every refusal is raised at the await, before anything was streamed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from engines.errors import ModelNotLoaded, UnsupportedFeature
from engines.events import Event, Finished, TextDelta, Timings, Tokenization, Usage, Vector
from engines.request import EmbedRequest, GenerateRequest, Message, Origin, RerankRequest, Sampling, TokenizeRequest


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """How to load a model.

    Attributes:
        gpu_ids: devices to use, empty chooses. gpu_layers: layers to offload, negative is all, 0 the CPU only.
        context_size: window of one request in tokens; None leaves it to the engine, -1 takes the model's own.
        keep_alive: pinned in memory, exempt from idle eviction.
        num_parallel: how many windows the KV cache must hold at once. num_sequences: most requests decoded together.
        num_batch: prompt tokens of one step. num_threads: 0 takes one for each core. use_mmap: None chooses.
        use_mlock: keep the weights from being swapped out. tensor_split: shares of each device, empty chooses.
        unified_cache: whether requests share one pool of cells; else each has a window of its own where there are
            enough of them. flash_attention: None chooses. cache_type: of K and V, such as `f16` or `q8_0`.
        parts: the files of a split model in order, empty for a single one. adapters: LoRA files, all active.
        step_limit_s: a step that takes longer hangs, and the worker ends itself.
        prefill_slowdown: how many times longer a step may take for those who decode when a prompt is read beside them.
        shelf_memory_bytes: for prefixes that have left the cache. shelf: the folder of those on the disk, empty for
            none. shelf_bytes: how large it may become.
    """

    gpu_ids: tuple[int, ...] = ()
    gpu_layers: int = -1
    context_size: int | None = None
    keep_alive: bool = False
    num_parallel: int = 1
    num_sequences: int = 64
    num_batch: int = 512
    num_threads: int = 0
    use_mmap: bool | None = None
    use_mlock: bool = False
    tensor_split: tuple[float, ...] = ()
    unified_cache: bool = True
    flash_attention: bool | None = None
    cache_type: str = "f16"
    parts: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    step_limit_s: float = 120.0
    prefill_slowdown: float = 2.5
    shelf_memory_bytes: int = 512 << 20
    shelf: str = ""
    shelf_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Options of `infer`: what is None is the engine's choice."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatResponse:
    """A complete answer. `total_duration` is in nanoseconds, as in Ollama."""

    message: Message
    done: bool = True
    total_duration: int | None = None
    eval_count: int | None = None
    prompt_eval_count: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens per second of the whole call; None when either is unknown."""
        if not self.eval_count or not self.total_duration:
            return None
        return self.eval_count / (self.total_duration / 1e9)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is loaded. `size` is the file's in bytes."""

    name: str
    size: int
    quantization: str | None = None
    parameters: str | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine is doing and has done since it was loaded; totals only grow.

    Attributes:
        num_ctx: window of one request. num_cells: KV cells in all.
        load_progress: from 0 to 1 while a model is being loaded.
    """

    num_ctx: int = 0
    num_cells: int = 0
    num_free_cells: int = 0
    num_running: int = 0
    num_waiting: int = 0
    load_progress: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)


T_co = TypeVar("T_co", covariant=True)


class Work(Protocol):
    """One admitted request, and what it has cost so far."""

    @property
    def usage(self) -> Usage:
        """Tokens so far, true at any moment."""

    @property
    def timings(self) -> Timings:
        """Times so far."""

    async def aclose(self) -> None:
        """Cancel what is still running; `usage` is final once this returns. Harmless after the end."""


class Generation(Work, Protocol):
    """The events of one answer."""

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def __anext__(self) -> Event: ...


class Computation(Work, Protocol[T_co]):
    """Something that comes all at once."""

    async def result(self) -> T_co:
        """What was asked for, once it is all computed. Raises what went wrong, Cancelled after `aclose`."""


class CompletionSession(Protocol):
    """Fed tokens and their KV state (`spec/sessions-adapters.md` section 2.1)."""

    model_digest: str
    num_tokens: int

    async def feed(self, text: str | Sequence[int]) -> Usage:
        """Append text without generating."""

    def generate(
        self, text: str | Sequence[int] = "", *, sampling: Sampling, commit: bool = True
    ) -> AsyncIterator[Event]:
        """Append text and generate; without `commit` the session stays as it was."""

    async def write_to(self, into: bytearray) -> int:
        """Append the serialised session to `into`; returns the bytes written."""

    async def to_bytes(self) -> bytes:
        """The serialised session."""

    async def try_clone(self) -> CompletionSession:
        """An independent copy."""

    async def aclose(self) -> None:
        """Free it; harmless when done twice."""


class InferenceBackend(ABC):
    """One model in this process. Loads and unloads are serialised by the engine; `generate` runs beside itself."""

    model_path: Path | None = None
    config: LoadConfig | None = None

    @abstractmethod
    async def load(self, model_path: Path, config: LoadConfig = LoadConfig()) -> None:
        """Load a model, replacing one that is loaded. Raises ModelNotFound, GGUFParseError or ModelLoadFailed."""

    @abstractmethod
    async def unload(self) -> None:
        """Free the model; running generations end as errors. Harmless when nothing is loaded."""

    @abstractmethod
    def is_loaded(self) -> bool:
        """Whether a model is loaded."""

    @abstractmethod
    def model_info(self) -> ModelInfo | None:
        """What is loaded, if anything."""

    @abstractmethod
    async def generate(self, request: GenerateRequest) -> Generation:
        """Admit a request and return its events. Raises what makes it impossible, ModelNotLoaded included."""

    async def render(self, request: GenerateRequest) -> str:
        """The prompt that `generate` would prefill, as text. Raises what makes it impossible."""
        raise UnsupportedFeature("this engine does not show its prompts")

    @abstractmethod
    def stats(self) -> EngineStats:
        """What the engine is doing; cheap, never waits."""

    async def embed(self, request: EmbedRequest) -> Computation[Sequence[Vector[float]]]:
        """Admit a request for one vector for each input, in order. Raises what makes it impossible."""
        raise UnsupportedFeature("this engine does not make embeddings")

    async def rerank(self, request: RerankRequest) -> Computation[Sequence[float]]:
        """Admit a request for one score for each document, in order. Raises what makes it impossible."""
        raise UnsupportedFeature("this engine does not rerank")

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """The token ids of a text, or the text of token ids. Raises BadRequest for an id that is none."""
        raise UnsupportedFeature("this engine does not show its tokens")

    async def infer(self, prompt: str, options: ChatOptions = ChatOptions()) -> ChatResponse:
        """One whole answer to one user message."""
        generation = await self.generate(_chat_request(prompt, options))
        texts: list[str] = []
        finished: Finished | None = None
        async for event in generation:
            if isinstance(event, TextDelta):
                texts.append(event.text)
            elif isinstance(event, Finished):
                finished = event
        assert finished is not None, "a generation ends with Finished"
        return ChatResponse(
            message=Message("assistant", "".join(texts)),
            total_duration=int(finished.timings.total_s * 1e9),
            eval_count=finished.usage.completion_tokens,
            prompt_eval_count=finished.usage.prompt_tokens,
        )

    async def infer_stream(self, prompt: str, options: ChatOptions = ChatOptions()) -> AsyncIterator[str]:
        """The text deltas of one answer; closing the iterator cancels within one decode step."""
        return _texts(await self.generate(_chat_request(prompt, options)))

    async def new_session(self, **options: Any) -> CompletionSession:
        """An empty session on the loaded model."""
        raise UnsupportedFeature("this engine has no sessions")

    async def session_from_bytes(self, data: bytes) -> CompletionSession:
        """A session from what `to_bytes` gave, checked against the loaded model."""
        raise UnsupportedFeature("this engine has no sessions")

    async def add_adapter(self, name: str, path: Path) -> None:
        """Register an adapter; its weights are not loaded yet."""
        raise UnsupportedFeature("this engine has no adapters")

    async def load_adapter(self, qualified_name: str) -> None:
        """Bring a registered adapter's weights into memory, inactive."""
        raise UnsupportedFeature("this engine has no adapters")

    async def unload_adapter(self, qualified_name: str) -> None:
        """Free an adapter's weights; it stays registered."""
        raise UnsupportedFeature("this engine has no adapters")

    def list_adapters(self) -> list[str]:
        """Qualified names of the registered adapters."""
        return []

    def _require_loaded(self) -> None:
        if not self.is_loaded():
            raise ModelNotLoaded


async def _texts(generation: Generation) -> AsyncIterator[str]:
    try:
        async for event in generation:
            if isinstance(event, TextDelta):
                yield event.text
    finally:
        await generation.aclose()


def _chat_request(prompt: str, options: ChatOptions) -> GenerateRequest:
    sampling = Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_tokens=options.max_tokens,
        seed=options.seed,
        stop=options.stop,
    )
    origin = Origin(surface="direct", caller="direct")
    return GenerateRequest(id="", model="", origin=origin, messages=(Message("user", prompt),), sampling=sampling)
