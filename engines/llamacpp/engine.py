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
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from llguidance import LLMatcher

from engines.chat.jinja import CHATML, ChatTemplate
from engines.chat.parser import ReplyParser
from engines.chat.prompt import Prompt, PromptBuilder
from engines.errors import (
    BadRequest,
    HeadwaterError,
    ModelNotFound,
    ModelNotLoaded,
    ServerBusy,
    UnsupportedFeature,
    WorkerCrashed,
)
from engines.events import ChoiceFinished, Delta, Event, Finished, FinishReason, TextDelta, Timings, Usage
from engines.inference import EngineStats, InferenceBackend, LoadConfig, ModelInfo
from engines.llamacpp.bindings import Context, Model
from engines.llamacpp.constraints import ConstrainedChooser, Grammars
from engines.llamacpp.detokenize import TextStream
from engines.llamacpp.loop import EngineLoop, Output
from engines.llamacpp.sampling import make_chooser
from engines.llamacpp.scheduler import Scheduler
from engines.llamacpp.sequence import Sequence, TokenChooser
from engines.request import GenerateRequest, Sampling
from engines.store.gguf import read_header

log = logging.getLogger(__name__)

DEFAULT_NUM_CTX = 4096
PROMPT_LIMIT_S = 30.0
MAX_STOPS = 256
KEPT_SEQUENCES = 32
"""Slots beyond those that run, for prefixes of finished requests."""

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
)
"""What holds where nobody says anything: Ollama's defaults (`spec/ollama.md` section 3)."""


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

    async def load(self, model_path: Path, config: LoadConfig = LoadConfig()) -> None:
        """Load a GGUF. The file is checked before a model that is already loaded is given up."""
        async with self._loading:
            await asyncio.to_thread(_check_file, model_path)
            await self._unload()
            model = await asyncio.to_thread(self._load, model_path, config)
            self._events = asyncio.get_running_loop()
            self._loop = EngineLoop(self._context, self._scheduler, self._publish, self._fail)
            self._loop.start()
            self.model_path, self.config, self._model, self._failure = model_path, config, model, None

    def _load(self, path: Path, config: LoadConfig) -> Model:
        main_gpu = config.gpu_ids[0] if config.gpu_ids else None
        model = Model(path, num_gpu=config.gpu_layers, main_gpu=main_gpu, use_mmap=config.use_mmap)
        try:
            self._num_ctx = _window(config.context_size, model.num_ctx_train)
            # Finished sequences keep their slots, so there are more than can run; recurrent memory pays for each.
            num_slots = config.num_sequences + (0 if model.is_recurrent else KEPT_SEQUENCES)
            cores = len(os.sched_getaffinity(0))
            self._context = Context(
                model,
                num_cells=self._num_ctx * config.num_parallel,
                num_sequences=num_slots,
                num_batch=max(config.num_batch, num_slots),
                num_threads=min(config.num_threads or cores, 4 * cores),  # ggml dies of some hundred threads
            )
            bos, eos = model.special_text("bos"), model.special_text("eos")
            template = ChatTemplate(model.chat_template() or CHATML, bos=bos, eos=eos)
        except BaseException:
            model.close()
            raise
        self._builder = PromptBuilder(template, _tokenizer(model), bos=bos if model.adds_bos else "")
        self._scheduler = Scheduler(
            num_cells=self._context.num_cells,
            num_slots=num_slots,
            num_batch=self._context.num_batch,
            # A sliding window's cells are overwritten once they are masked, so an old prefix may be there no longer.
            shares_prefixes=not (model.is_recurrent or model.has_window),
            kept_cells=self._num_ctx // 2,
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
        header = read_header(self.model_path)
        return ModelInfo(
            name=self.model_path.stem,
            size=self.model_path.stat().st_size,
            quantization=header.file_type,
            parameters=str(self._model.num_parameters),
        )

    def stats(self) -> EngineStats:
        """What the loop is doing."""
        if self._model is None:
            return EngineStats()
        return EngineStats(
            num_ctx=self._num_ctx,
            num_cells=self._context.num_cells,
            num_free_cells=self._loop.num_free_cells,
            num_running=self._loop.num_running,
            num_waiting=self._loop.num_waiting,
            totals=asdict(self._loop.totals),
        )

    async def generate(self, request: GenerateRequest) -> LlamaCppGeneration:
        """Render, tokenize and submit; raises what makes the request impossible."""
        self._require_loaded()
        arrived = time.monotonic()
        if any(message.images for message in request.messages or ()):
            raise UnsupportedFeature("this model is missing data required for image input", param="images")
        sampling = request.sampling.over(DEFAULTS)
        if len(sampling.stop or ()) > MAX_STOPS:  # every token of everyone waits while they are compared
            raise BadRequest(f"there may be at most {MAX_STOPS} stop strings", param="stop")
        num_ctx = min(request.load.num_ctx or self._num_ctx, self._num_ctx)
        prompt = await asyncio.get_running_loop().run_in_executor(self._prompts, self._build, request, num_ctx)
        self._require_loaded()
        if self._failure is not None:
            raise WorkerCrashed(str(self._failure))
        matcher = None
        if request.format is not None:  # before anything runs, so that a bad schema is refused
            matcher = await asyncio.to_thread(self._grammars.compile, request.format)
            self._require_loaded()
        generation = LlamaCppGeneration(self, request, prompt, arrived)
        for index in range(request.num_choices):
            sequence = self._sequence(prompt, _with_seed(sampling, index), num_ctx, arrived)
            if matcher is not None:
                may_think = bool(request.think) and request.messages is not None
                sequence.sampler = self._constrain(sequence.sampler, matcher.deep_copy(), prompt, may_think=may_think)
            generation.add(sequence, index)
            self._generations[sequence] = generation
            self._loop.submit(sequence)
        return generation

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

    def _constrain(
        self, chooser: TokenChooser, matcher: LLMatcher, prompt: Prompt, *, may_think: bool
    ) -> ConstrainedChooser:
        assert self._model is not None
        return ConstrainedChooser(
            self._model, self._context, chooser, matcher, in_thinking=prompt.in_thinking, may_think=may_think
        )

    def _sequence(self, prompt: Prompt, sampling: Sampling, num_ctx: int, arrived: float) -> Sequence:
        assert self._model is not None
        chooser = make_chooser(self._model, self._context, sampling, prompt.tokens, num_ctx=num_ctx)
        max_tokens = sampling.max_tokens if sampling.max_tokens is not None else -1
        return Sequence(
            tokens=list(prompt.tokens),
            num_ctx=num_ctx,
            max_tokens=max_tokens if max_tokens >= 0 else num_ctx,
            sampler=chooser,
            text=TextStream(self._model.piece, self._model.is_end, sampling.stop or ()),
            arrived=arrived,
        )

    def parser(self, request: GenerateRequest, prompt: Prompt, index: int) -> ReplyParser | None:
        """How to read a reply: raw prompts are answered with raw text."""
        if request.messages is None:
            return None
        return ReplyParser(
            self._builder.reply_format,
            in_thinking=prompt.in_thinking,
            with_tools=bool(request.tools),
            index=index,
        )

    def is_end(self, token: int) -> bool:
        """Whether a token ends a generation."""
        return self._model is not None and self._model.is_end(token)

    def cancel(self, sequence: Sequence) -> None:
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


def _check_file(path: Path) -> None:
    """Refuse what is no GGUF before llama.cpp sees it, whose own checks abort the process now and then."""
    if not path.is_file():
        raise ModelNotFound(path.name)
    read_header(path)


def _window(asked: int | None, trained: int) -> int:
    """Tokens of one request's window: what was asked for, within what the model was trained with."""
    if asked is None:
        asked = DEFAULT_NUM_CTX
    elif asked <= 0:
        asked = trained or DEFAULT_NUM_CTX
    return min(asked, trained) if trained else asked


def _tokenizer(model: Model) -> Callable[[str, bool], list[int]]:
    return lambda text, add_special: model.tokenize(text, add_special=add_special, parse_special=True)


def _with_seed(sampling: Sampling, index: int) -> Sampling:
    """Choice i of a seeded request uses the seed plus i, so that choices differ and can be repeated."""
    if index == 0 or sampling.seed is None or sampling.seed < 0:
        return sampling
    return Sampling(seed=sampling.seed + index).over(sampling)


class LlamaCppGeneration:
    """The events of one request, made from the outputs of its sequences."""

    def __init__(self, engine: LlamaCppEngine, request: GenerateRequest, prompt: Prompt, arrived: float) -> None:
        self._engine = engine
        self._request = request
        self._prompt = prompt
        self._arrived = arrived
        self._sequences: dict[Sequence, int] = {}
        self._parsers: list[ReplyParser | None] = []
        self._reasons: dict[int, FinishReason] = {}
        self._outputs: deque[Output] = deque()
        self._ready: deque[Event] = deque()
        self._news = asyncio.Event()
        self._error: HeadwaterError | None = None
        self._thinking_tokens = 0
        self._is_over = False

    def add(self, sequence: Sequence, index: int) -> None:
        """A sequence of this request."""
        self._sequences[sequence] = index
        self._parsers.append(self._engine.parser(self._request, self._prompt, index))

    def deliver(self, output: Output) -> None:
        """One output of one of its sequences."""
        self._outputs.append(output)
        if output.reason is not None:
            self._reasons[self._sequences[output.sequence]] = output.reason
        self._news.set()

    def fail(self, error: HeadwaterError) -> None:
        """The engine is gone."""
        self._error = error
        self._news.set()

    @property
    def usage(self) -> Usage:
        """Tokens as the sequences hold them now."""
        return Usage(
            prompt_tokens=len(self._prompt.tokens),
            cached_tokens=next(iter(self._sequences)).num_reused,
            completion_tokens=sum(sequence.num_generated for sequence in self._sequences),
            thinking_tokens=self._thinking_tokens,
            truncated_tokens=self._prompt.truncated_tokens,
        )

    @property
    def timings(self) -> Timings:
        """Times of the first choice; decoding ends with the last."""
        first = next(iter(self._sequences))
        now = time.monotonic()
        started, prefilled = first.scheduled or now, first.first_token or now
        last = max(sequence.last_token for sequence in self._sequences)
        return Timings(
            queue_s=started - self._arrived,
            prefill_s=prefilled - started,
            decode_s=max(last - prefilled, 0.0),
            ttft_s=prefilled - self._arrived,
            total_s=now - self._arrived,
        )

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._ready:
            if self._is_over:
                raise StopAsyncIteration
            await self._more()
        event = self._ready.popleft()
        self._is_over = self._is_over or isinstance(event, Finished)
        return event

    async def _more(self) -> None:
        """Wait for outputs and turn them into events."""
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        while self._outputs:
            self._read(self._outputs.popleft())
        if len(self._reasons) == len(self._sequences):
            self._ready.append(Finished(self._reasons[0], self.usage, self.timings, self._tokens()))

    def _read(self, output: Output) -> None:
        index = self._sequences[output.sequence]
        parser = self._parsers[index]
        if parser is None:
            deltas: list[Delta] = [TextDelta(output.text, index)] if output.text else []
        else:
            has_token = output.reason is not FinishReason.CANCEL and output.sequence.num_generated > 0
            self._thinking_tokens += parser.is_thinking and has_token
            deltas = parser.decode(output.text) if output.text else []
            if output.reason is not None:
                deltas += parser.flush()
        self._ready.extend(deltas)
        if output.reason is not None:
            reason = output.reason
            if parser is not None and parser.has_calls and reason is FinishReason.STOP:
                reason = FinishReason.TOOL_CALLS
            self._reasons[index] = reason
            self._ready.append(ChoiceFinished(reason, index))

    def _tokens(self) -> tuple[int, ...]:
        if not self._request.return_tokens:
            return ()
        first = next(iter(self._sequences))
        ended = first.num_generated > 0 and self._engine.is_end(first.tokens[-1])
        return tuple(first.tokens[:-1] if ended else first.tokens)

    async def aclose(self) -> None:
        """Cancel what is running and wait, at most one step, until it has stopped."""
        if not self._is_over:
            for sequence, index in self._sequences.items():
                if index not in self._reasons:
                    self._engine.cancel(sequence)
            while len(self._reasons) < len(self._sequences) and self._error is None:
                self._news.clear()
                await self._news.wait()
            while self._outputs:  # nobody reads them any more, but they count
                self._read(self._outputs.popleft())
        self._is_over = True
        self._ready.clear()
