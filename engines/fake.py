"""A deterministic engine without weights, with settable load time and speed, for studying everything around an engine.

It answers with the words of the last message (or of the prompt), one token a word, at `tokens_per_s`. A text's vector
is made of its words and nothing else, and a document scores by the words that it shares with the query. A "model" is a
small JSON file: `{"load_s": 0.0, "tokens_per_s": 1000, "num_ctx": 4096, "fail": "", "crash_after": null, "crash":
"exit"}`, every key optional. `fail` makes the load fail with that text; after `crash_after` tokens the process ends
(`exit`, or `abort` as C++ does), runs in circles (`spin`) or never finishes its step (`stall`). Timing is honest:
several requests share nothing, as on a machine with cores to spare.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import sys
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from engines.errors import BadRequest, Cancelled, ModelLoadFailed, ModelNotFound, PromptTooLong
from engines.events import (
    ChoiceFinished,
    Event,
    Finished,
    FinishReason,
    TextDelta,
    Timings,
    Tokenization,
    Usage,
    Vector,
)
from engines.inference import EngineStats, InferenceBackend, LoadConfig, ModelInfo
from engines.request import EmbedRequest, GenerateRequest, RerankRequest, TokenizeRequest

T = TypeVar("T")

NUM_DIMENSIONS = 8
LOAD_PARTS = 10


@dataclass(frozen=True, slots=True)
class FakeModel:
    """What a fake model file says."""

    load_s: float = 0.0
    tokens_per_s: float = 1000.0
    num_ctx: int = 4096
    fail: str = ""
    crash_after: int | None = None
    crash: str = "exit"


async def _exit() -> None:
    os._exit(9)


async def _abort() -> None:
    sys.stderr.write("GGML_ASSERT(everything is fine) failed\n")
    sys.stderr.flush()
    os.abort()


async def _spin() -> None:
    while True:
        pass


async def _stall() -> None:
    await asyncio.Event().wait()


_CRASHES = {"exit": _exit, "abort": _abort, "spin": _spin, "stall": _stall}


class FakeEngine(InferenceBackend):
    """An InferenceBackend that repeats what it is told."""

    def __init__(self) -> None:
        self._model: FakeModel | None = None
        self.num_running = 0
        self.num_steps = 0
        self.load_progress = 0.0

    async def load(self, model_path: Path, config: LoadConfig = LoadConfig()) -> None:
        """Read the model file, and take as long as it says."""
        try:
            text = await asyncio.to_thread(model_path.read_text)
            model = FakeModel(**json.loads(text))
        except FileNotFoundError:
            raise ModelNotFound(model_path.name) from None
        except (ValueError, TypeError) as error:
            raise ModelLoadFailed(f"{model_path.name} is no fake model: {error}") from error
        for part in range(LOAD_PARTS):
            self.load_progress = part / LOAD_PARTS
            await asyncio.sleep(model.load_s / LOAD_PARTS)
        if model.fail:
            raise ModelLoadFailed(model.fail)
        self._model, self.model_path, self.config = model, model_path, config

    async def unload(self) -> None:
        """Forget the model."""
        self._model = self.model_path = self.config = None

    def is_loaded(self) -> bool:
        """Whether a model was read."""
        return self._model is not None

    def model_info(self) -> ModelInfo | None:
        """The file's name and size."""
        if self.model_path is None:
            return None
        return ModelInfo(name=self.model_path.stem, size=self.model_path.stat().st_size)

    def stats(self) -> EngineStats:
        """How many requests run."""
        num_ctx = self._model.num_ctx if self._model else 0
        return EngineStats(
            num_ctx=num_ctx,
            num_running=self.num_running,
            load_progress=self.load_progress,
            totals={"steps": self.num_steps},
        )

    async def generate(self, request: GenerateRequest) -> FakeGeneration:
        """Admit a request whose words fit the window."""
        self._require_loaded()
        assert self._model is not None
        text = request.messages[-1].content if request.messages else request.prompt or ""
        prompt_tokens = sum(len(m.content.split()) for m in request.messages or ()) or len(text.split())
        if prompt_tokens >= self._model.num_ctx:
            raise PromptTooLong(prompt_tokens, self._model.num_ctx)
        return FakeGeneration(self, self._model, request, text.split(), prompt_tokens)

    async def render(self, request: GenerateRequest) -> str:
        """The texts of the messages, a line each, or the prompt."""
        self._require_loaded()
        return "\n".join(message.content for message in request.messages or ()) or request.prompt or ""

    async def embed(self, request: EmbedRequest) -> FakeComputation[Sequence[Vector[float]]]:
        """Admit inputs whose words, or token ids, fit the window or may be cut."""
        inputs = self._fit([_words(each) for each in request.inputs], truncate=request.truncate)
        dimensions = request.dimensions or NUM_DIMENSIONS
        return FakeComputation(self, inputs, [_vector(words, dimensions) for words in inputs])

    async def rerank(self, request: RerankRequest) -> FakeComputation[Sequence[float]]:
        """Admit documents whose words fit the window or may be cut."""
        query = request.query.split()
        documents = [each.split()[: request.max_document_tokens] for each in request.documents]
        documents = self._fit(documents, truncate=request.truncate)
        scores = [float(len({*query} & {*words})) for words in documents]
        return FakeComputation(self, [[*query, *words] for words in documents], scores)

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """One token for each character, its code point."""
        self._require_loaded()
        if request.text is not None:
            return Tokenization(request.text, tuple(map(ord, request.text)))
        tokens = request.tokens or ()
        for token in tokens:
            if token > sys.maxunicode:
                raise BadRequest(f"token {token} is not in this model's vocabulary", param="tokens")
        return Tokenization("".join(map(chr, tokens)), tokens)

    def _fit(self, inputs: list[list[str]], *, truncate: bool) -> list[list[str]]:
        self._require_loaded()
        assert self._model is not None
        num_ctx = self._model.num_ctx
        longest = max(map(len, inputs), default=0)
        if longest > num_ctx and not truncate:
            raise PromptTooLong(longest, num_ctx)
        return [words[:num_ctx] for words in inputs]

    @property
    def tokens_per_s(self) -> float:
        """The loaded model's pace."""
        assert self._model is not None
        return self._model.tokens_per_s


def _words(text: str | tuple[int, ...]) -> list[str]:
    return text.split() if isinstance(text, str) else [str(token) for token in text]


def _vector(words: list[str], dimensions: int) -> Vector[float]:
    """As random as the words' hash, and of length 1."""
    digest = hashlib.sha256(" ".join(words).encode("utf-8", "replace")).digest()
    numbers = [byte / 127.5 - 1 for byte in digest[: min(dimensions, NUM_DIMENSIONS)]]
    length = math.sqrt(sum(number * number for number in numbers))
    return array("f", (number / length for number in numbers))


class FakeComputation(Generic[T]):
    """A result that is known at once and told at the model's pace."""

    def __init__(self, engine: FakeEngine, inputs: list[list[str]], result: T) -> None:
        self._num_tokens = sum(map(len, inputs))
        self._duration_s = max(self._num_tokens, 1) / engine.tokens_per_s
        self._result = result
        self._started = time.monotonic()
        self._ended = 0.0
        self._is_done = False
        self._closed = asyncio.Event()

    @property
    def usage(self) -> Usage:
        """The words that there has been time for."""
        if self._is_done:
            return Usage(prompt_tokens=self._num_tokens)
        return Usage(prompt_tokens=int(self._num_tokens * min(self.timings.prefill_s / self._duration_s, 1.0)))

    @property
    def timings(self) -> Timings:
        """Time since admission, all of it prefill."""
        elapsed = (self._ended or time.monotonic()) - self._started
        return Timings(prefill_s=elapsed, total_s=elapsed)

    async def result(self) -> T:
        """Wait as long as it takes, then tell."""
        try:
            await asyncio.wait_for(self._closed.wait(), max(self._duration_s - self.timings.prefill_s, 0.0))
        except TimeoutError:
            self._is_done = True
            return self._result
        raise Cancelled

    async def aclose(self) -> None:
        """Stop the clock."""
        self._ended = self._ended or time.monotonic()
        self._closed.set()


class FakeGeneration:
    """The words of one reply, at the model's pace."""

    def __init__(
        self, engine: FakeEngine, model: FakeModel, request: GenerateRequest, words: list[str], prompt_tokens: int
    ) -> None:
        self._engine = engine
        self._model = model
        self._limit = request.sampling.max_tokens if request.sampling.max_tokens is not None else -1
        self._words = words if self._limit < 0 else words[: self._limit]
        self._was_cut = len(self._words) < len(words)
        self._prompt_tokens = prompt_tokens
        self._num_said = 0
        self._started = time.monotonic()
        self._events = self._speak()
        engine.num_running += 1
        self._is_over = False

    @property
    def usage(self) -> Usage:
        """Words said so far."""
        return Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._num_said)

    @property
    def timings(self) -> Timings:
        """Time since admission, all of it decoding."""
        elapsed = time.monotonic() - self._started
        return Timings(decode_s=elapsed, total_s=elapsed)

    async def _speak(self) -> AsyncIterator[Event]:
        for i, word in enumerate(self._words):
            await asyncio.sleep(1 / self._model.tokens_per_s)
            if self._is_over:
                raise Cancelled
            if self._model.crash_after is not None and self._num_said >= self._model.crash_after:
                await _CRASHES[self._model.crash]()
            self._num_said += 1
            self._engine.num_steps += 1
            yield TextDelta(word if i == 0 else f" {word}")
        reason = FinishReason.LENGTH if self._was_cut else FinishReason.STOP
        yield ChoiceFinished(reason)
        yield Finished(reason, self.usage, self.timings)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def aclose(self) -> None:
        """Stop speaking; the next event is an error."""
        if not self._is_over:
            self._is_over = True
            self._engine.num_running -= 1
