"""The llama.cpp engine: an InferenceBackend that decodes many requests together.

Owns the model, its context and the loop thread, and turns what the loop publishes into events. Rendering and tokenizing
happen in a thread of their own, one prompt at a time; a prompt that hangs in hostile template code beyond any limit
that Python can enforce ends the process, which costs this model's users a restart and nobody else anything.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from llguidance import LLMatcher

from engines.chat.jinja import CHATML, ChatTemplate
from engines.chat.parser import THINK, ReplyParser
from engines.chat.prompt import Prompt, PromptBuilder
from engines.errors import (
    BadRequest,
    HeadwaterError,
    ModelNotLoaded,
    ServerBusy,
    UnsupportedFeature,
    WorkerCrashed,
)
from engines.events import Tokenization
from engines.inference import EngineStats, InferenceBackend, LoadConfig, ModelInfo
from engines.llamacpp.constraints import ConstrainedChooser, Grammars
from engines.llamacpp.context import Context
from engines.llamacpp.detokenize import TextStream
from engines.llamacpp.generation import LlamaCppGeneration
from engines.llamacpp.header import read_whole_header, suits_kernels
from engines.llamacpp.layout import lay_out
from engines.llamacpp.loop import EngineLoop, Output
from engines.llamacpp.model import Model, version
from engines.llamacpp.pace import Pace
from engines.llamacpp.sampling import make_chooser, resolve_bias
from engines.llamacpp.scheduler import Scheduler
from engines.llamacpp.sequence import Sequence, TokenChooser
from engines.llamacpp.shelf import Disk, Shelf, fingerprint
from engines.llamacpp.threads import Threads
from engines.llamacpp.tokenization import tokenization
from engines.request import GenerateRequest, Sampling, TokenizeRequest
from engines.store.gguf import GGUFHeader

log = logging.getLogger(__name__)

PROMPT_LIMIT_S = 30.0
KEPT_CELLS = 256
"""For prefixes of finished requests beside that of the one that finished last: the shelf holds the others."""

MAX_STOPS = 256

DEFAULTS = Sampling(
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.0,
    typical_p=1.0,
    repeat_last_n=64,
    repeat_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    seed=-1,
    stop=(),
    max_tokens=-1,
    top_n_sigma=0.0,
    xtc_probability=0.0,
    xtc_threshold=0.1,
    dry_multiplier=0.0,
    dry_base=1.75,
    dry_allowed_length=2,
    dry_penalty_last_n=-1,
    dry_sequence_breakers=("\n", ":", '"', "*"),
    mirostat=0,
    mirostat_tau=5.0,
    mirostat_eta=0.1,
    dynatemp_range=0.0,
    dynatemp_exponent=1.0,
    logit_bias=(),
    ignore_eos=False,
)
"""What holds where nobody says anything: Ollama's defaults (`spec/ollama.md` section 3), beyond them llama-server's."""

SHIFTED_WINDOWS = 10
"""Windows that an answer without a limit may fill when its window shifts (`spec/ollama.md` section 3, num_predict)."""


class LlamaCppEngine(InferenceBackend):
    """One GGUF model on llama.cpp.

    Args:
        on_failure: called when llama.cpp fails for good; the process should end, since its memory cannot be trusted.
    """

    def __init__(self, on_failure: Callable[[BaseException], None] | None = None) -> None:
        self._on_failure = on_failure
        self._loading = asyncio.Lock()
        self._model: Model | None = None
        self._generations: dict[Sequence, LlamaCppGeneration] = {}
        self._failure: BaseException | None = None
        self._progress = 0.0

    async def load(self, model_path: Path, config: LoadConfig = LoadConfig()) -> None:
        """Load a GGUF. The file is checked before a model that is already loaded is given up."""
        async with self._loading:
            header = await asyncio.to_thread(read_whole_header, model_path, config.parts)
            await self._unload()
            self._progress = 0.0
            model = await asyncio.to_thread(self._load, model_path, header, config)
            self._events = asyncio.get_running_loop()
            self._loop = EngineLoop(
                self._context,
                self._scheduler,
                self._publish,
                self._fail,
                pace=Pace(slowdown=config.prefill_slowdown, max_chunk=self._scheduler.num_batch),
                threads=Threads(self._context.num_threads),
                piece=model.piece,
                shelf=self._shelf,
            )
            self._loop.start()
            self.model_path, self.config, self._header = model_path, config, header
            self._model, self._failure = model, None

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
            layout = lay_out(config, model.num_ctx_train, is_recurrent=model.is_recurrent)
            self._num_ctx = layout.num_ctx
            cores = len(os.sched_getaffinity(0))
            self._context = Context(
                model,
                num_cells=layout.num_cells,
                num_sequences=layout.num_slots,
                num_batch=layout.num_batch,
                num_ubatch=layout.num_ubatch,
                num_outputs=layout.num_outputs,
                num_threads=min(config.num_threads or cores, 4 * cores),  # ggml dies of some hundred threads
                is_unified=layout.is_unified,
                flash_attention=config.flash_attention,
                cache_type=config.cache_type,
            )
            bos, eos = model.special_text("bos"), model.special_text("eos")
            template = ChatTemplate(model.chat_template() or CHATML, bos=bos, eos=eos)
        except BaseException:
            model.close()
            raise
        self._builder = PromptBuilder(
            template, _tokenizer(model), bos=bos if model.adds_bos else "", infill=model.infill_texts()
        )
        shares_prefixes = not model.is_recurrent  # recurrent memory is one state, of which no part can be taken
        self._shelf = Shelf(config.shelf_memory_bytes, _open_disk(path, config)) if shares_prefixes else None
        self._scheduler = Scheduler(
            num_cells=self._context.num_cells,
            num_slots=layout.num_slots,
            num_batch=self._context.num_batch,
            shares_prefixes=shares_prefixes,
            is_unified=layout.is_unified,
            kept_cells=KEPT_CELLS if layout.is_unified else None,
            shelf=self._shelf,
        )
        self._grammars = Grammars(model)
        self._prompts = ThreadPoolExecutor(1, thread_name_prefix="prompt")
        return model

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
        self._grammars.close()
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
        """What the loop is doing."""
        if self._model is None:
            return EngineStats(load_progress=self._progress)
        return EngineStats(
            num_ctx=self._num_ctx,
            num_cells=self._context.num_cells,
            num_free_cells=self._loop.num_free_cells,
            num_running=self._loop.num_running,
            num_waiting=self._loop.num_waiting,
            totals=asdict(self._loop.totals),
        )

    async def render(self, request: GenerateRequest) -> str:
        """The text of the request's prompt; only what goes before a chat's messages is known as tokens alone."""
        self._require_loaded()
        events = asyncio.get_running_loop()
        return await events.run_in_executor(self._prompts, self._render, request)

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """In the thread of prompts, whose turn it may not be at once."""
        if self._model is None:
            raise ModelNotLoaded
        return await asyncio.get_running_loop().run_in_executor(self._prompts, tokenization, self._model, request)

    def _render(self, request: GenerateRequest) -> str:
        prompt = self._build(request, min(request.load.num_ctx or self._num_ctx, self._num_ctx))
        assert self._model is not None
        tokens = request.prompt_tokens or request.context_tokens
        before = b"".join(self._model.piece(token, special=True) for token in tokens)
        return before.decode("utf-8", "replace") + prompt.text

    async def generate(self, request: GenerateRequest) -> LlamaCppGeneration:
        """Render, tokenize and submit; raises what makes the request impossible."""
        self._require_loaded()
        arrived = time.monotonic()
        if any(message.images for message in request.messages or ()):
            raise UnsupportedFeature("this model is missing data required for image input", param="images")
        if len(request.sampling.stop or ()) > MAX_STOPS:  # every token of everyone waits while they are compared
            raise BadRequest(f"there may be at most {MAX_STOPS} stop strings", param="stop")
        matcher = None
        if request.format is not None:  # before anything runs, so that a bad schema is refused
            matcher = await asyncio.to_thread(self._grammars.compile, request.format)
            self._require_loaded()
        events = asyncio.get_running_loop()
        prompt, sequences = await events.run_in_executor(self._prompts, self._prepare, request, matcher, arrived)
        self._require_loaded()
        if self._failure is not None:
            raise WorkerCrashed(str(self._failure))
        generation = self._generation(request, prompt, sequences, arrived)
        for sequence in sequences:
            self._generations[sequence] = generation
            self._loop.submit(sequence)
        return generation

    def _prepare(
        self, request: GenerateRequest, matcher: LLMatcher | None, arrived: float
    ) -> tuple[Prompt, list[Sequence]]:
        """The prompt, and a sequence for each choice. In the thread of prompts: this is work for milliseconds."""
        num_ctx = min(request.load.num_ctx or self._num_ctx, self._num_ctx)
        prompt = self._build(request, num_ctx)
        sampling = request.sampling.over(DEFAULTS)
        choices = [_with_seed(sampling, index) for index in range(request.num_choices)]
        return prompt, [
            self._sequence(request, prompt, choice, matcher, index, num_ctx, arrived)
            for index, choice in enumerate(choices)
        ]

    def _build(self, request: GenerateRequest, num_ctx: int) -> Prompt:
        if self._model is None:
            raise ModelNotLoaded
        for token in (*(request.prompt_tokens or ()), *request.context_tokens):
            if not 0 <= token < self._model.num_tokens:
                raise BadRequest(f"token {token} is not in this model's vocabulary", param="prompt")
        faulthandler.dump_traceback_later(PROMPT_LIMIT_S, exit=True)
        try:
            return self._builder.build(request, num_ctx=num_ctx)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _sequence(
        self,
        request: GenerateRequest,
        prompt: Prompt,
        sampling: Sampling,
        matcher: LLMatcher | None,
        index: int,
        num_ctx: int,
        arrived: float,
    ) -> Sequence:
        assert self._model is not None
        bias = resolve_bias(self._model, sampling)
        chooser = make_chooser(self._model, self._context, sampling, prompt.tokens, num_ctx=num_ctx, bias=bias)
        if matcher is not None:
            chooser = self._constrain(request, prompt, chooser, matcher)
        limit = num_ctx * (SHIFTED_WINDOWS if request.shift else 1)
        max_tokens = sampling.max_tokens if sampling.max_tokens is not None else -1
        num_keep = len(prompt.tokens) if request.num_keep < 0 else request.num_keep + self._model.adds_bos
        return Sequence(
            tokens=list(prompt.tokens),
            num_ctx=num_ctx,
            max_tokens=min(max_tokens, limit) if max_tokens >= 0 else limit,
            sampler=chooser,
            text=TextStream(self._model.piece, self._model.is_end, sampling.stop or ()),
            priority=request.priority,
            num_keep=num_keep if request.shift else None,
            num_logprobs=request.logprobs,
            echoes=request.echo and request.logprobs is not None and index == 0,
            arrived=arrived,
        )

    def _constrain(
        self, request: GenerateRequest, prompt: Prompt, chooser: TokenChooser, matcher: LLMatcher
    ) -> ConstrainedChooser:
        assert self._model is not None
        assert request.format is not None
        return ConstrainedChooser(
            self._model,
            self._context,
            chooser,
            self._grammars,
            matcher,
            triggers=request.format.triggers,
            markers=self._builder.reply_format(request).thinking or THINK,
            in_thinking=prompt.in_thinking,
            may_think=bool(request.think) and request.messages is not None,
        )

    def _generation(
        self, request: GenerateRequest, prompt: Prompt, sequences: list[Sequence], arrived: float
    ) -> LlamaCppGeneration:
        assert self._model is not None
        parsers: list[ReplyParser | None] = [None] * len(sequences)
        # A prompt that is no chat is answered with raw text, unless the template in use says how reasoning looks.
        if request.messages is not None or (request.template is not None and request.think):
            reply_format = self._builder.reply_format(request)
            names = [tool.name for tool in request.tools]
            parsers = [
                ReplyParser(reply_format, in_thinking=prompt.in_thinking, tools=names, index=index)
                for index in range(len(sequences))
            ]
        return LlamaCppGeneration(
            request, prompt, sequences, parsers, arrived=arrived, vocabulary=self._model, cancel=self._cancel
        )

    def _cancel(self, sequence: Sequence) -> None:
        """End a sequence; its last output follows."""
        self._loop.cancel(sequence)

    def _publish(self, outputs: list[Output]) -> None:
        """From the loop thread: hand one step's outputs to the event loop, all at once."""
        self._events.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            generation = self._generations.get(output.sequence)
            if generation is not None:
                if output.reason is not None:
                    del self._generations[output.sequence]
                generation.deliver(output)

    def _fail(self, error: BaseException) -> None:
        """From the loop thread, which has ended."""
        self._failure = error
        self._events.call_soon_threadsafe(self._end_all, WorkerCrashed(f"llama.cpp failed: {error}"))
        if self._on_failure is not None:
            self._events.call_soon_threadsafe(self._on_failure, error)

    def _end_all(self, error: HeadwaterError) -> None:
        for generation in set(self._generations.values()):
            generation.fail(error)
        self._generations.clear()


def _open_disk(path: Path, config: LoadConfig) -> Disk | None:
    """Where this model's prefixes are on the disk; a folder that cannot be used is no reason not to serve."""
    if not config.shelf or config.shelf_bytes <= 0:
        return None
    files = [Path(file) for file in config.parts] or [path]
    parameters = f"{version()} {config.cache_type} {config.flash_attention} {config.gpu_layers}"
    name = fingerprint([*files, *map(Path, config.adapters)], parameters)
    try:
        return Disk(Path(config.shelf), name, config.shelf_bytes)
    except OSError as error:
        log.warning("no prefixes are kept on the disk: %s", error)
        return None


def _tokenizer(model: Model) -> Callable[[str, bool], list[int]]:
    return lambda text, add_special: model.tokenize(text, add_special=add_special, parse_special=True)


def _with_seed(sampling: Sampling, index: int) -> Sampling:
    """Choice i of a seeded request uses the seed plus i, so that choices differ and can be repeated."""
    if index == 0 or sampling.seed is None or sampling.seed < 0:
        return sampling
    return Sampling(seed=sampling.seed + index).over(sampling)
