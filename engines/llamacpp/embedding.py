"""The llama.cpp engine for embeddings and reranking: an InferenceBackend that computes many inputs together.

Owns the model, its context and the loop thread. Long texts are tokenized in a thread of its own, one request at a time.
Three decisions:

- A model that says nothing of pooling is a completion model. It gets mean pooling: llama-server pools it not at all and
  then refuses (`Pooling type 'none' is not OAI compatible`), Ollama's runner refuses too, and of what can be had from a
  model that was never trained for it, the mean uses every token where the last one mostly knows what comes next.
- An encoder's batch holds at least one whole window, since it reads an input in both directions. A causal model's need
  not: longer inputs are read in chunks, whose pooled rows add up to the same vector.
- A batch of several inputs stops at `FILL` tokens, or at fewer for a large vocabulary, because llama.cpp reserves a row
  of logits for every token of a batch, needed or not.
"""

from __future__ import annotations

import asyncio
import os
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np

from engines.errors import (
    BadRequest,
    HeadwaterError,
    ModelNotLoaded,
    PromptTooLong,
    ServerBusy,
    UnsupportedCapability,
    WorkerCrashed,
)
from engines.events import Timings, Tokenization, Usage, Vector
from engines.inference import EngineStats, InferenceBackend, LoadConfig, ModelInfo
from engines.llamacpp.embedding_context import EmbeddingContext, Vectors
from engines.llamacpp.embedding_loop import EmbeddingLoop, Job
from engines.llamacpp.header import read_whole_header, suits_kernels
from engines.llamacpp.model import Model, rerank_joints
from engines.llamacpp.pairs import Pair, PairBuilder
from engines.llamacpp.threads import Threads
from engines.llamacpp.tokenization import tokenization
from engines.request import EmbedRequest, GenerateRequest, Mode, Priority, RerankRequest, TokenizeRequest
from engines.store.gguf import GGUFHeader, Pooling

T = TypeVar("T")

DEFAULT_NUM_CTX = 4096
MAX_SEQUENCES = 256  # llama-cparams.h LLAMA_MAX_SEQ
MAX_RECURRENT_SEQUENCES = 8  # each has a state of its own
FILL, MIN_FILL = 256, 128
"""Tokens of a batch. On a CPU a token costs the least from some 160 on and more again past 512; a step should be short,
because whoever comes meanwhile waits for it."""

SHORT_TEXT = 2000
"""Characters that take less time to tokenize, some 0.2 ms, than to hand to another thread and back."""

MAX_LOGITS_BYTES = 128 << 20
UNKNOWN_TOKEN = "unknown_token"  # noqa: S105  # the reason of a refusal

_RAW_ARCHITECTURES = ("nomic-bert", "nomic-bert-moe")


class EmbeddingEngine(InferenceBackend):
    """One GGUF model that makes vectors, or scores.

    Args:
        mode: EMBEDDING or RERANKING.
        on_failure: called when llama.cpp fails for good; the process should end, since its memory cannot be trusted.
    """

    def __init__(self, mode: Mode, on_failure: Callable[[BaseException], None] | None = None) -> None:
        self._mode = mode
        self._on_failure = on_failure
        self._loading = asyncio.Lock()
        self._model: Model | None = None
        self._computations: set[JobComputation[Any]] = set()
        self._progress = 0.0
        self._failure: BaseException | None = None

    async def load(self, model_path: Path, config: LoadConfig = LoadConfig()) -> None:
        """Load a GGUF. The file is checked before a model that is already loaded is given up."""
        async with self._loading:
            header = await asyncio.to_thread(read_whole_header, model_path, config.parts)
            await self._unload()
            self._progress = 0.0
            model = await asyncio.to_thread(self._load, model_path, header, config)
            self._events = asyncio.get_running_loop()
            self._loop.start()
            self.model_path, self.config, self._model, self._failure = model_path, config, model, None

    def _note_progress(self, fraction: float) -> None:
        """From the thread that loads."""
        self._progress = fraction

    def _load(self, path: Path, header: GGUFHeader, config: LoadConfig) -> Model:
        model = Model(
            path,
            parts=config.parts,
            adapters=config.adapters,
            suits_kernels=suits_kernels(header),
            num_gpu=config.gpu_layers,
            main_gpu=config.gpu_ids[0] if config.gpu_ids else None,
            tensor_split=config.tensor_split,
            use_mmap=config.use_mmap,
            use_mlock=config.use_mlock,
            on_progress=self._note_progress,
        )
        try:
            self._num_ctx = _window(config.context_size, model.num_ctx_train)
            fill = _fill(config.num_batch, model.num_tokens)
            self._context = self._make_context(model, header, fill, config)
        except BaseException:
            model.close()
            raise
        self._header = header
        self._around = model.tokenize("", add_special=True, parse_special=True)
        self._pairs = PairBuilder(model, rerank_joints(model), model.chat_template("rerank"))
        threads = Threads(self._context.num_threads)
        self._loop = EmbeddingLoop(self._context, fill=fill, threads=threads, on_failure=self._fail)
        self._prompts = ThreadPoolExecutor(1, thread_name_prefix="prompt")
        return model

    def _make_context(self, model: Model, header: GGUFHeader, fill: int, config: LoadConfig) -> EmbeddingContext:
        cores = len(os.sched_getaffinity(0))
        pooling = Pooling.MEAN if header.pooling is Pooling.UNSAID else header.pooling
        make = partial(
            EmbeddingContext,
            model,
            pooling=pooling,
            num_ctx=self._num_ctx,
            num_sequences=min(MAX_RECURRENT_SEQUENCES if model.is_recurrent else MAX_SEQUENCES, fill),
            num_threads=min(config.num_threads or cores, 4 * cores),  # ggml dies of some hundred threads
            flash_attention=config.flash_attention,
        )
        context = make(num_batch=fill)  # which is also how we learn whether the model is an encoder
        if context.can_split or fill >= self._num_ctx:
            return context
        context.close()
        return make(num_batch=self._num_ctx)

    async def unload(self) -> None:
        """Free the model; what is still running ends with an error."""
        async with self._loading:
            await self._unload()

    async def _unload(self) -> None:
        if self._model is None:
            return
        model, self._model = self._model, None
        await asyncio.to_thread(self._loop.stop)
        self._end_all(ServerBusy("the model was unloaded"))
        await asyncio.to_thread(self._prompts.shutdown)
        self._context.close()
        model.close()
        self.model_path = self.config = None

    def is_loaded(self) -> bool:
        """Whether a model is loaded."""
        return self._model is not None

    def model_info(self) -> ModelInfo | None:
        """What is loaded."""
        if self._model is None or self.model_path is None:
            return None
        return ModelInfo(
            name=self.model_path.stem,
            size=self.model_path.stat().st_size,
            quantization=self._header.file_type,
            parameters=str(self._model.num_parameters),
        )

    def stats(self) -> EngineStats:
        """What the loop is doing. Nothing stays in a cache between two batches, so no cells are told."""
        if self._model is None:
            return EngineStats(load_progress=self._progress)
        return EngineStats(
            num_ctx=self._num_ctx,
            num_running=self._loop.num_running,
            num_waiting=self._loop.num_waiting,
            totals=asdict(self._loop.totals),
        )

    async def generate(self, request: GenerateRequest) -> NoReturn:
        """Not here."""
        raise UnsupportedCapability(request.model, "completion")

    async def embed(self, request: EmbedRequest) -> JobComputation[Sequence[Vector[float]]]:
        """Tokenize and submit; raises what makes the request impossible."""
        self._require_loaded()
        if self._mode is not Mode.EMBEDDING or self._header.pooling in (Pooling.NONE, Pooling.RANK):
            raise UnsupportedCapability(request.model, "embedding")
        num_ctx = min(request.load.num_ctx or self._num_ctx, self._num_ctx)
        tokenize = partial(self._inputs, request.inputs, num_ctx, truncate=request.truncate)
        normalize = request.normalize if request.normalize is not None else _normalizes(self._header)
        finish = partial(_vectors, dimensions=request.dimensions, normalize=normalize)
        num_characters = sum(map(len, request.inputs))
        return await self._submit(tokenize, num_characters, request.priority, finish)

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """In the thread of prompts, whose turn it may not be at once."""
        if self._model is None:
            raise ModelNotLoaded
        return await asyncio.get_running_loop().run_in_executor(self._prompts, tokenization, self._model, request)

    async def rerank(self, request: RerankRequest) -> JobComputation[Sequence[float]]:
        """Tokenize and submit; raises what makes the request impossible."""
        self._require_loaded()
        if self._mode is not Mode.RERANKING or self._header.pooling is not Pooling.RANK:
            raise UnsupportedCapability(request.model, "rerank")
        num_ctx = min(request.load.num_ctx or self._num_ctx, self._num_ctx)
        tokenize = partial(self._pair_inputs, request, num_ctx)
        num_characters = sum(len(request.query) + len(document) for document in request.documents)
        return await self._submit(tokenize, num_characters, request.priority, _scores)

    async def _submit(
        self,
        tokenize: Callable[[], list[Pair]],
        num_characters: int,
        priority: Priority,
        finish: Callable[[Vectors], T],
    ) -> JobComputation[T]:
        arrived = time.monotonic()
        if num_characters <= SHORT_TEXT:
            inputs = tokenize()
        else:
            inputs = await asyncio.get_running_loop().run_in_executor(self._prompts, tokenize)
            self._require_loaded()
        if self._failure is not None:
            raise WorkerCrashed(str(self._failure))
        computation = JobComputation(self, inputs, priority, self._context.num_dimensions, finish, arrived)
        if inputs:
            self._computations.add(computation)
            self._loop.submit(computation.job)
        return computation

    def _inputs(self, texts: Sequence[str | tuple[int, ...]], num_ctx: int, *, truncate: bool) -> list[Pair]:
        return [self._input(text, num_ctx, truncate=truncate) for text in texts]

    def _input(self, text: str | tuple[int, ...], num_ctx: int, *, truncate: bool) -> Pair:
        """The token ids of one input, cut from the end to fit; the special tokens around it stay."""
        model = self._model
        if model is None:
            raise ModelNotLoaded
        if isinstance(text, str):
            tokens, closing = model.tokenize(text, add_special=True, parse_special=True), self._around[model.adds_bos :]
        else:
            tokens, closing = self._known(text, model.num_tokens), []
        if not tokens:
            raise BadRequest("an input is empty, and this model adds no tokens of its own", param="input")
        excess = len(tokens) - num_ctx
        if excess <= 0:
            return Pair(tokens)
        if not truncate or num_ctx <= len(self._around):
            raise PromptTooLong(len(tokens), num_ctx)
        return Pair([*tokens[: num_ctx - len(closing)], *closing], excess)

    def _known(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        for token in tokens:
            if not 0 <= token < num_tokens:
                message = f"token {token} is not in this model's vocabulary of {num_tokens}"
                raise BadRequest(message, param="input", reason=UNKNOWN_TOKEN)
        return list(tokens)

    def _pair_inputs(self, request: RerankRequest, num_ctx: int) -> list[Pair]:
        if self._model is None:
            raise ModelNotLoaded
        return [
            self._pairs.build(
                request.query,
                document,
                num_ctx=num_ctx,
                truncate=request.truncate,
                max_document=request.max_document_tokens,
            )
            for document in request.documents
        ]

    def cancel(self, job: Job) -> None:
        """End a job; its `on_end` follows."""
        self._loop.cancel(job)

    def notify(self, computation: JobComputation[T]) -> None:
        """From the loop thread: a job has ended."""
        self._events.call_soon_threadsafe(self._settle, computation)

    def _settle(self, computation: JobComputation[T]) -> None:
        self._computations.discard(computation)
        computation.settle()

    def _fail(self, error: BaseException) -> None:
        """From the loop thread, which has ended."""
        self._failure = error
        self._events.call_soon_threadsafe(self._end_all, WorkerCrashed(f"llama.cpp failed: {error}"))
        if self._on_failure is not None:
            self._events.call_soon_threadsafe(self._on_failure, error)

    def _end_all(self, error: HeadwaterError) -> None:
        for computation in self._computations:
            computation.settle(error)
        self._computations.clear()


class JobComputation(Generic[T]):
    """One request's inputs in the loop, and what becomes of their rows."""

    def __init__(
        self,
        engine: EmbeddingEngine,
        inputs: Sequence[Pair],
        priority: Priority,
        num_dimensions: int,
        finish: Callable[[Vectors], T],
        arrived: float,
    ) -> None:
        self.job = Job(
            inputs=[each.tokens for each in inputs],
            rank=priority.rank,
            rows=np.empty((len(inputs), num_dimensions), np.float32),
            arrived=arrived,
            on_end=lambda: engine.notify(self),
        )
        self._engine = engine
        self._finish = finish
        self._truncated_tokens = sum(each.truncated_tokens for each in inputs)
        self._ended: asyncio.Future[HeadwaterError | None] = asyncio.get_running_loop().create_future()
        if not inputs:
            self.settle()

    def settle(self, error: HeadwaterError | None = None) -> None:
        """The job has ended, or the engine has."""
        if not self._ended.done():
            self._ended.set_result(error or self.job.error)

    @property
    def usage(self) -> Usage:
        """Tokens computed so far."""
        return Usage(prompt_tokens=self.job.computed_tokens, truncated_tokens=self._truncated_tokens)

    @property
    def timings(self) -> Timings:
        """Times up to now or the end."""
        job = self.job
        ended = job.ended or time.monotonic()
        started = job.started or ended
        return Timings(queue_s=started - job.arrived, prefill_s=ended - started, total_s=ended - job.arrived)

    async def result(self) -> T:
        """Vectors or scores."""
        error = await asyncio.shield(self._ended)
        if error is not None:
            raise error
        return self._finish(self.job.rows)

    async def aclose(self) -> None:
        """Cancel what is not computed yet and wait, at most one step, until it has stopped."""
        if not self._ended.done():
            self._engine.cancel(self.job)
            await asyncio.shield(self._ended)


def _window(asked: int | None, trained: int) -> int:
    """Tokens of one input: what was asked for, and never more than an encoder has positions for."""
    if asked is None:
        asked = DEFAULT_NUM_CTX
    elif asked <= 0:
        asked = trained or DEFAULT_NUM_CTX
    return min(asked, trained) if trained else asked


def _fill(num_batch: int, num_vocabulary: int) -> int:
    return min(num_batch, max(MIN_FILL, min(FILL, MAX_LOGITS_BYTES // (4 * num_vocabulary))))


def _normalizes(header: GGUFHeader) -> bool:
    """Whether Ollama's runner gives vectors of length 1 by itself (`spec/ollama.md` section 5.5)."""
    said = header.metadata.get(f"{header.architecture}.normalize_embeddings")
    if isinstance(said, bool):
        return said
    if header.architecture == "bert":
        return header.metadata.get("tokenizer.ggml.model") == "bert"
    return header.architecture not in _RAW_ARCHITECTURES


def _vectors(rows: Vectors, *, dimensions: int | None, normalize: bool) -> Sequence[Vector[float]]:
    """The rows, cut and of length 1 where that is wanted; a row of zeros stays one (common.cpp, embd_normalize)."""
    if dimensions is not None and 0 < dimensions < rows.shape[1]:
        rows = rows[:, :dimensions]
    if normalize:
        lengths = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1, keepdims=True))
        rows = np.divide(rows, lengths, out=np.zeros(rows.shape), where=lengths > 0).astype(np.float32)
    return [array("f", row.tobytes()) for row in rows]


def _scores(rows: Vectors) -> Sequence[float]:
    """The first class's logit of each pair, as llama-server tells it."""
    return [float(score) for score in rows[:, 0]]
