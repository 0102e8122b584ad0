from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engines.errors import Cancelled, ModelLoadFailed, ModelNotFound, ModelNotLoaded, PromptTooLong
from engines.events import ChoiceFinished, Event, Finished, FinishReason, TextDelta, Usage
from engines.fake import FakeEngine
from engines.inference import Generation
from engines.request import EmbedRequest, GenerateRequest, Message, Origin, RerankRequest, Sampling

ORIGIN = Origin(surface="test", caller="test")


def model(folder: Path, **says: Any) -> Path:
    """A fake model's file."""
    path = folder / "model.json"
    path.write_text(json.dumps(says))
    return path


async def loaded(folder: Path, **says: Any) -> FakeEngine:
    """An engine that has such a model."""
    engine = FakeEngine()
    await engine.load(model(folder, **says))
    return engine


def ask(text: str, **sampling: Any) -> GenerateRequest:
    """A chat of one message."""
    origin = Origin(surface="test", caller="test")
    return GenerateRequest(
        id="req", model="m", origin=origin, messages=(Message("user", text),), sampling=Sampling(**sampling)
    )


async def everything(generation: Generation) -> list[Event]:
    """All events of a generation."""
    return [event async for event in generation]


async def test_it_answers_with_the_words_it_was_told(tmp_path: Path) -> None:
    """One delta a word, then the choice, then the whole request."""
    engine = await loaded(tmp_path)
    events = await everything(await engine.generate(ask("one two  three")))
    assert events[:-1] == [
        TextDelta("one"),
        TextDelta(" two"),
        TextDelta(" three"),
        ChoiceFinished(FinishReason.STOP),
    ]
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.STOP
    assert finished.usage == Usage(prompt_tokens=3, completion_tokens=3)


async def test_a_raw_prompt_is_repeated_too(tmp_path: Path) -> None:
    """Completions work like chats."""
    engine = await loaded(tmp_path)
    request = GenerateRequest(id="", model="m", origin=Origin("test", "test"), prompt="just this")
    events = await everything(await engine.generate(request))
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "just this"


async def test_a_limit_cuts_the_answer(tmp_path: Path) -> None:
    """`max_tokens` counts words, and the reason says so."""
    engine = await loaded(tmp_path)
    response = await everything(await engine.generate(ask("one two three", max_tokens=2)))
    assert response[-2] == ChoiceFinished(FinishReason.LENGTH)
    assert sum(isinstance(event, TextDelta) for event in response) == 2


async def test_infer_collects_the_whole_answer(tmp_path: Path) -> None:
    """The seam's simplest call, with its counts."""
    engine = await loaded(tmp_path)
    response = await engine.infer("one two three")
    assert response.message == Message("assistant", "one two three")
    assert (response.prompt_eval_count, response.eval_count) == (3, 3)
    assert response.tokens_per_second is not None


async def test_infer_stream_yields_texts_and_can_be_left(tmp_path: Path) -> None:
    """Closing the iterator ends the generation."""
    engine = await loaded(tmp_path)
    texts = await engine.infer_stream("one two three")
    assert await anext(texts) == "one"
    assert engine.stats().num_running == 1
    await texts.aclose()  # type: ignore[attr-defined]  # an AsyncIterator that is a generator
    assert engine.stats().num_running == 0


async def test_speed_and_load_time_are_kept(tmp_path: Path) -> None:
    """Ten words at a hundred a second after a load of a tenth take two tenths of a second at least."""
    started = time.monotonic()
    engine = await loaded(tmp_path, load_s=0.1, tokens_per_s=100)
    await everything(await engine.generate(ask("w " * 10)))
    assert time.monotonic() - started >= 0.2


async def test_usage_is_true_at_any_moment(tmp_path: Path) -> None:
    """What was said so far is counted, during and after a cancelled generation."""
    engine = await loaded(tmp_path)
    generation = await engine.generate(ask("one two three"))
    assert generation.usage == Usage(prompt_tokens=3)
    await anext(generation)
    await generation.aclose()
    await generation.aclose()
    assert generation.usage == Usage(prompt_tokens=3, completion_tokens=1)
    timings = generation.timings
    assert timings.total_s >= timings.decode_s > 0
    assert engine.stats().num_running == 0
    with pytest.raises(Cancelled):
        await anext(generation)


async def test_too_many_words_are_refused(tmp_path: Path) -> None:
    """The window is counted in words."""
    engine = await loaded(tmp_path, num_ctx=3)
    with pytest.raises(PromptTooLong):
        await engine.generate(ask("one two three"))


async def test_nothing_is_generated_without_a_model(tmp_path: Path) -> None:
    """Before `load` and after `unload`."""
    engine = FakeEngine()
    with pytest.raises(ModelNotLoaded):
        await engine.generate(ask("x"))
    await engine.load(model(tmp_path))
    assert engine.is_loaded()
    info = engine.model_info()
    assert info is not None
    assert info.name == "model"
    await engine.unload()
    await engine.unload()
    assert not engine.is_loaded()
    assert engine.model_info() is None
    with pytest.raises(ModelNotLoaded):
        await engine.generate(ask("x"))


async def test_a_load_can_be_made_to_fail(tmp_path: Path) -> None:
    """With the text that the file says, and for files that are none."""
    with pytest.raises(ModelLoadFailed, match="out of imaginary memory"):
        await loaded(tmp_path, fail="out of imaginary memory")
    with pytest.raises(ModelLoadFailed, match="no fake model"):
        await loaded(tmp_path, colour="red")
    with pytest.raises(ModelNotFound):
        await FakeEngine().load(tmp_path / "missing.json")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ModelLoadFailed, match="no fake model"):
        await FakeEngine().load(tmp_path / "text")


def test_a_crash_ends_the_process(tmp_path: Path) -> None:
    """`crash_after` is a real death, without a word."""
    program = """
import asyncio, pathlib, sys
from engines.fake import FakeEngine
async def main():
    engine = FakeEngine()
    await engine.load(pathlib.Path(sys.argv[1]))
    print((await engine.infer("one two three")).message)
asyncio.run(main())
"""
    path = model(tmp_path, crash_after=2)
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (9, b"", b"")


async def test_a_texts_vector_is_its_own(tmp_path: Path) -> None:
    """Always the same, of length 1, and as short as asked for."""
    engine = await loaded(tmp_path)
    computation = await engine.embed(
        EmbedRequest("req", "m", ORIGIN, ("one two", "one two", "three", (1, 2)), dimensions=4)
    )
    first, again, other, tokens = await computation.result()
    assert first == again != other != tokens
    assert len(first) == 4
    assert sum(number * number for number in first) == pytest.approx(1)
    assert computation.usage == Usage(prompt_tokens=7)


async def test_documents_score_by_the_words_they_share(tmp_path: Path) -> None:
    """Each pair's tokens are counted."""
    engine = await loaded(tmp_path)
    computation = await engine.rerank(RerankRequest("req", "m", ORIGIN, "a b", ("b", "b a c", "d")))
    assert await computation.result() == [1.0, 2.0, 0.0]
    assert computation.usage == Usage(prompt_tokens=11)


async def test_inputs_beyond_the_window_are_cut_or_refused(tmp_path: Path) -> None:
    """As by a real engine."""
    engine = await loaded(tmp_path, num_ctx=2)
    assert (await engine.embed(EmbedRequest("req", "m", ORIGIN, ("one two three",)))).usage.prompt_tokens <= 2
    with pytest.raises(PromptTooLong):
        await engine.embed(EmbedRequest("req", "m", ORIGIN, ("one two three",), truncate=False))


async def test_a_cancelled_computation_costs_what_there_was_time_for(tmp_path: Path) -> None:
    """And has no result."""
    engine = await loaded(tmp_path, tokens_per_s=10)
    computation = await engine.embed(EmbedRequest("req", "m", ORIGIN, ("word " * 1000,)))
    await computation.aclose()
    with pytest.raises(Cancelled):
        await computation.result()
    assert computation.usage.prompt_tokens < 1000
