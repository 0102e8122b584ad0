from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from random_models import SHAPES, write_model

from engines.errors import BadRequest, PromptTooLong
from engines.events import (
    ChoiceFinished,
    Event,
    Finished,
    FinishReason,
    PromptEcho,
    TextDelta,
    ThinkingDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from engines.inference import LoadConfig
from engines.llamacpp.engine import LlamaCppEngine
from engines.request import (
    GenerateRequest,
    LoadOptions,
    Message,
    Origin,
    OutputFormat,
    Priority,
    Sampling,
    Syntax,
    Tool,
)

DEMO = Path(__file__).parents[3] / "engines/store/demo/demo.gguf"
CONFIG = LoadConfig(gpu_layers=0, context_size=512, num_parallel=4, num_threads=1)
GREEDY = Sampling(temperature=0.0)
FRANCE = (Message("user", "What is the capital of France?"),)
PARIS = "The capital of France is Paris."
STORY = "Once upon a time"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[True, False], ids=["pool", "streams"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[LlamaCppEngine]:
    """The demo model, with room for four windows of 512 tokens: of all together, or of each its own."""
    engine = LlamaCppEngine()
    await engine.load(DEMO, replace(CONFIG, unified_cache=request.param, flash_attention=request.param))
    yield engine
    await engine.unload()


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def ask(engine: LlamaCppEngine, **fields: Any) -> list[Event]:
    """Every event of one request."""
    given: dict[str, Any] = {"id": "req_1", "model": "demo", "origin": Origin("direct", "test"), "sampling": GREEDY}
    return [event async for event in await engine.generate(GenerateRequest(**given | fields))]


def text_of(events: list[Event], index: int = 0) -> str:
    """The answer of a choice."""
    return "".join(event.text for event in events if isinstance(event, TextDelta) and event.index == index)


def told_of(events: list[Event], kind: type[TextDelta | ThinkingDelta] = TextDelta) -> list[TokenLogprob]:
    """The tokens that were told of, in order."""
    return [told for event in events if isinstance(event, kind) for told in event.logprobs]


def end_of(events: list[Event]) -> Finished:
    """The last event."""
    assert isinstance(events[-1], Finished)
    return events[-1]


async def test_the_tokens_told_of_spell_the_answer(engine: LlamaCppEngine) -> None:
    """Each with its probability, most of them near one for a model that knows."""
    events = await ask(engine, messages=FRANCE, logprobs=0)
    told = told_of(events)
    assert b"".join(each.data for each in told).decode() == text_of(events) == PARIS
    assert all(-1 < each.logprob <= 0 and each.top == () for each in told)


async def test_the_likeliest_alternatives_are_told_in_order(engine: LlamaCppEngine) -> None:
    """Greedy decoding takes the first of them, and together they are no more than certain."""
    for told in told_of(await ask(engine, messages=FRANCE, logprobs=5)):
        assert len(told.top) == 5
        assert told.top[0].token == told.token
        assert all(one.logprob >= other.logprob for one, other in pairwise(told.top))


async def test_samplers_do_not_change_what_is_told(engine: LlamaCppEngine) -> None:
    """The model's own logits count, not what temperature, filters, biases or a grammar made of them."""
    plain = told_of(await ask(engine, prompt=STORY, sampling=Sampling(temperature=0.0, max_tokens=1), logprobs=3))
    hot = Sampling(temperature=2.0, top_k=2, seed=1, max_tokens=1, logit_bias=((5, 3.0),))
    format_ = OutputFormat(syntax=Syntax.REGEX, grammar="[0-9]+")
    other = told_of(await ask(engine, prompt=STORY, sampling=hot, logprobs=3, format=format_))
    assert [each.logprob for each in other[0].top] == pytest.approx([each.logprob for each in plain[0].top])
    assert other[0].token != plain[0].token


async def test_reasoning_and_answer_have_their_own_tokens(engine: LlamaCppEngine) -> None:
    """The markers between them belong to neither."""
    events = await ask(engine, messages=(Message("user", "What is 3 + 4?"),), think=True, logprobs=0)
    answer = b"".join(each.data for each in told_of(events)).decode()
    assert answer == text_of(events)
    thought = b"".join(each.data for each in told_of(events, ThinkingDelta)).decode()
    assert thought.strip()
    assert "think>" not in thought + answer


async def test_a_tool_call_is_not_told_token_by_token(engine: LlamaCppEngine) -> None:
    """It is shown as a call."""
    weather = Tool("get_weather", "Get the weather", {"type": "object", "properties": {"city": {"type": "string"}}})
    asked = (Message("user", "What is the weather in Paris?"),)
    events = await ask(engine, messages=asked, tools=(weather,), logprobs=0)
    assert any(isinstance(event, ToolCallDelta) for event in events)
    assert told_of(events) == []


async def test_a_prompt_can_be_told_as_well(engine: LlamaCppEngine) -> None:
    """Every token but the first has a probability, the same that it has when it is generated."""
    once = await ask(engine, prompt=STORY, sampling=replace(GREEDY, max_tokens=80), logprobs=0)
    whole = STORY + text_of(once)
    echoed = await ask(engine, prompt=whole, sampling=replace(GREEDY, max_tokens=0), logprobs=2, echo=True)
    echo, *rest = echoed
    assert isinstance(echo, PromptEcho)
    assert echo.text == whole
    assert echo.logprobs[0].logprob == 0.0
    assert len(echo.logprobs) == end_of(echoed).usage.prompt_tokens
    generated = [each.logprob for each in told_of(once)]
    assert [each.logprob for each in echo.logprobs[-len(generated) :]] == pytest.approx(generated, abs=0.02)
    assert [type(event) for event in rest] == [ChoiceFinished, Finished]
    assert end_of(echoed).reason is FinishReason.LENGTH


async def test_an_echo_without_probabilities_is_the_text_alone(engine: LlamaCppEngine) -> None:
    """And costs no more than the answer."""
    events = await ask(engine, prompt=STORY, sampling=replace(GREEDY, max_tokens=3), echo=True, num_choices=2)
    assert events[0] == PromptEcho(STORY)
    assert text_of(events, 0) == text_of(events, 1) != ""


async def test_a_full_window_ends_the_answer(engine: LlamaCppEngine) -> None:
    """Unless it may shift."""
    endless = replace(GREEDY, ignore_eos=True)
    end = end_of(await ask(engine, prompt=STORY, sampling=endless))
    assert end.reason is FinishReason.LENGTH
    assert end.usage == Usage(prompt_tokens=4, completion_tokens=508, cached_tokens=end.usage.cached_tokens)


async def test_a_window_that_shifts_goes_on(engine: LlamaCppEngine) -> None:
    """What it lost is counted, and no answer goes on for ever."""
    endless = replace(GREEDY, ignore_eos=True)
    small = {"prompt": STORY, "shift": True, "load": LoadOptions(num_ctx=64)}
    end = end_of(await ask(engine, sampling=replace(endless, max_tokens=300), **small))
    assert (end.reason, end.usage.completion_tokens) == (FinishReason.LENGTH, 300)
    assert 304 - end.usage.shifted_tokens <= 64
    unbounded = end_of(await ask(engine, sampling=endless, **small))
    assert unbounded.usage.completion_tokens == 10 * 64


async def test_two_answers_from_one_prompt_shift_apart(engine: LlamaCppEngine) -> None:
    """Cells that both hold cannot be moved, so the first of them is computed anew."""
    sampling = Sampling(temperature=0.7, seed=5, ignore_eos=True, max_tokens=700)
    events = await ask(engine, prompt=STORY + " there was" * 40, sampling=sampling, shift=True, num_choices=2)
    assert end_of(events).usage.completion_tokens == 1400
    assert engine.stats().num_free_cells == engine.stats().num_cells


async def test_a_long_prompt_loses_its_middle(engine: LlamaCppEngine) -> None:
    """The beginning and the end stay, with room for an answer; without permission it is refused."""
    prompt = "Once upon a time " + "there was a frog. " * 300 + "The end is here"
    with pytest.raises(PromptTooLong):
        await ask(engine, prompt=prompt)
    with pytest.raises(PromptTooLong):
        await ask(engine, prompt=prompt, truncate=True)
    events = await ask(
        engine, prompt=prompt, truncate=True, shift=True, num_keep=4, echo=True, sampling=replace(GREEDY, max_tokens=1)
    )
    usage = end_of(events).usage
    assert usage.prompt_tokens == 4 + (512 - 4) // 2
    assert usage.truncated_tokens > 900
    assert isinstance(events[0], PromptEcho)
    assert events[0].text.startswith("Once upon a time")
    assert events[0].text.endswith("The end is here")


async def test_every_sampler_runs(engine: LlamaCppEngine) -> None:
    """Each of the list gives an answer, and with a seed the same one again."""
    for sampling in (
        Sampling(top_k=0),
        Sampling(mirostat=1),
        Sampling(mirostat=2, mirostat_tau=3.0, mirostat_eta=0.2),
        Sampling(dry_multiplier=0.8, dry_sequence_breakers=("\n", "the")),
        Sampling(xtc_probability=0.5, xtc_threshold=0.05),
        Sampling(top_n_sigma=1.0),
        Sampling(repeat_penalty=1.2, repeat_last_n=-1),
        Sampling(dynatemp_range=0.5, dynatemp_exponent=2.0),
        Sampling(typical_p=0.5, min_p=0.1),
        Sampling(seed=2**70),
    ):
        said = sampling.over(Sampling(seed=11, max_tokens=12, temperature=0.9))
        first, again = [text_of(await ask(engine, prompt=STORY, sampling=said)) for _ in range(2)]
        assert first == again != "", sampling


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": Sampling(stop=("x",) * 300)},
        {"sampling": Sampling(logit_bias=((5000, 1.0),))},
        {"prompt": None, "prompt_tokens": (1, 99999)},
        {"prompt": ""},
        {"format": OutputFormat({"type": "nonsense"})},
    ],
)
async def test_what_is_impossible_is_refused_before_anything_runs(
    engine: LlamaCppEngine, fields: dict[str, Any]
) -> None:
    """And leaves nothing behind."""
    before = engine.stats()
    with pytest.raises(BadRequest):
        await ask(engine, **{"prompt": STORY} | fields)
    after = engine.stats()
    assert (after.num_running, after.num_waiting, after.num_free_cells) == (0, 0, after.num_cells)
    assert after.totals["steps"] == before.totals["steps"]


async def test_one_special_token_is_a_prompt(engine: LlamaCppEngine) -> None:
    """As short as one can be."""
    assert end_of(await ask(engine, prompt="<|endoftext|>", sampling=replace(GREEDY, max_tokens=3)))


async def test_a_caller_who_leaves_while_a_prompt_is_prepared_leaves_nothing(engine: LlamaCppEngine) -> None:
    """Neither a sequence nor cells."""
    asking = asyncio.create_task(ask(engine, prompt=STORY * 50))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert (await ask(engine, messages=FRANCE))[-1]
    assert engine.stats().num_free_cells == engine.stats().num_cells


async def test_schema_and_reasoning_go_together(engine: LlamaCppEngine) -> None:
    """The reasoning is free and the answer is JSON."""
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    asked = (Message("user", "What is 3 + 4?"),)
    events = await ask(engine, messages=asked, think=True, format=OutputFormat(schema))
    assert any(isinstance(event, ThinkingDelta) for event in events)
    assert isinstance(json.loads(text_of(events))["sum"], int)


def long_prompt(seed: int, num_words: int = 150) -> str:
    """A prompt of some hundred tokens that no other begins like."""
    return " ".join(f"{(seed * 7919 + i * 104729) % 997}" for i in range(num_words))


async def test_a_prefix_survives_a_restart(tmp_path: Path) -> None:
    """The next engine on the same folder computes only what is new, and answers the same."""
    config = replace(CONFIG, context_size=1024, shelf=str(tmp_path), shelf_bytes=2**30)
    sampling = replace(GREEDY, max_tokens=10)
    first = LlamaCppEngine()
    await first.load(DEMO, config)
    cold = await ask(first, prompt=long_prompt(1), sampling=sampling)
    await first.unload()
    second = LlamaCppEngine()
    await second.load(DEMO, config)
    warm = await ask(second, prompt=long_prompt(1), sampling=sampling)
    totals = second.stats().totals
    await second.unload()
    assert text_of(warm) == text_of(cold)
    assert end_of(cold).usage.cached_tokens == 0
    assert end_of(warm).usage.cached_tokens == end_of(warm).usage.prompt_tokens - 1
    assert totals["prefill_tokens"] + totals["decode_tokens"] <= 11
    assert totals["restored_tokens"] >= end_of(warm).usage.cached_tokens


async def test_prefixes_that_the_cache_forgot_come_back(tmp_path: Path) -> None:
    """More chats than cells: each one's second turn begins with its first, wherever that was kept meanwhile."""
    config = replace(CONFIG, context_size=1024, num_parallel=1, shelf=str(tmp_path), shelf_bytes=2**30)
    engine = LlamaCppEngine()
    await engine.load(DEMO, config)
    sampling = replace(GREEDY, max_tokens=4)
    turns = {seed: await ask(engine, prompt=long_prompt(seed), sampling=sampling) for seed in range(4)}
    for seed, turn in turns.items():
        again = await ask(engine, prompt=long_prompt(seed) + text_of(turn) + " and", sampling=sampling)
        assert end_of(again).usage.cached_tokens >= end_of(turn).usage.prompt_tokens
    stats = engine.stats()
    await engine.unload()
    assert stats.totals["restored_tokens"] > 0
    assert stats.num_free_cells == stats.num_cells


async def test_another_cache_type_does_not_see_the_prefixes(tmp_path: Path) -> None:
    """A state is valid for one set of context parameters."""
    config = replace(CONFIG, context_size=1024, shelf=str(tmp_path), shelf_bytes=2**30)
    sampling = replace(GREEDY, max_tokens=2)
    for each, cached in ((config, False), (replace(config, cache_type="q8_0"), False), (config, True)):
        engine = LlamaCppEngine()
        await engine.load(DEMO, each)
        end = end_of(await ask(engine, prompt=long_prompt(1), sampling=sampling))
        await engine.unload()
        assert (end.usage.cached_tokens > 0) is cached


async def test_a_shelf_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    """The model serves without it."""
    (tmp_path / "file").write_text("")
    engine = LlamaCppEngine()
    await engine.load(DEMO, replace(CONFIG, shelf=str(tmp_path / "file"), shelf_bytes=2**30))
    assert text_of(await ask(engine, messages=FRANCE)) == PARIS
    await engine.unload()


async def test_batch_work_gives_way_to_somebody_who_reads(tmp_path: Path) -> None:
    """A chat that arrives while batch work fills the cache displaces some of it, which ends all the same."""
    engine = LlamaCppEngine()
    await engine.load(DEMO, replace(CONFIG, context_size=512, num_parallel=1))
    sampling = replace(GREEDY, ignore_eos=True, max_tokens=150)
    batch = [
        asyncio.create_task(ask(engine, prompt=f"{i} {STORY}", sampling=sampling, priority=Priority.BATCH))
        for i in range(3)
    ]
    while engine.stats().num_free_cells > 150:  # noqa: ASYNC110  # the engine has no event for this
        await asyncio.sleep(0.001)
    chat = await ask(
        engine,
        prompt=long_prompt(3, 60),
        sampling=replace(GREEDY, ignore_eos=True, max_tokens=20),
        priority=Priority.INTERACTIVE,
    )
    still_running = sum(not task.done() for task in batch)
    ends = [end_of(events) for events in await asyncio.gather(*batch)]
    stats = engine.stats()
    await engine.unload()
    assert end_of(chat).usage.completion_tokens == 20
    assert still_running >= 2
    assert [end.usage.completion_tokens for end in ends] == [150] * 3
    assert stats.totals["preemptions"] >= 1
    assert stats.num_free_cells == stats.num_cells


async def test_what_is_kept_moves_together_and_is_still_what_it_was(tmp_path: Path) -> None:
    """After a crowd has left, the last chat moves to the front, and its next turn answers as if it had not."""
    engine = LlamaCppEngine()
    await engine.load(DEMO, replace(CONFIG, context_size=1024, num_parallel=4))
    sampling = replace(GREEDY, max_tokens=30)
    crowd = [ask(engine, prompt=long_prompt(seed, 100), sampling=sampling) for seed in range(5)]
    await asyncio.gather(*crowd)
    turn = await ask(engine, messages=FRANCE, sampling=sampling)
    following = (*FRANCE, Message("assistant", text_of(turn)), Message("user", "What is the capital of Italy?"))
    warm = await ask(engine, messages=following, sampling=sampling)
    restored = await ask(engine, prompt=long_prompt(2, 100), sampling=sampling)
    stats = engine.stats()
    await engine.unload()
    assert text_of(warm) == "The capital of Italy is Rome."
    assert end_of(warm).usage.cached_tokens > 20
    assert end_of(restored).usage.cached_tokens == end_of(restored).usage.prompt_tokens - 1
    assert stats.totals["restored_tokens"] > 0
    assert stats.num_free_cells == stats.num_cells


@pytest.mark.parametrize(
    ("name", "is_unified"), [("gemma3", True), ("gemma3", False), ("lfm2", True), ("lfm2", False), ("mamba", True)]
)
async def test_other_memories_answer_the_same_with_and_without_what_they_kept(
    tmp_path: Path, name: str, is_unified: bool
) -> None:
    """A sliding window shares prefixes like any other cache; recurrent memory shares nothing, and is right too."""
    shape = replace(SHAPES[name], window=64 if SHAPES[name].window else 0)
    config = replace(CONFIG, context_size=1024, unified_cache=is_unified)
    engine = LlamaCppEngine()
    await engine.load(write_model(shape, tmp_path / "model.gguf"), config)
    prompt = tuple(range(300, 500))
    fields: dict[str, Any] = {"prompt_tokens": prompt, "sampling": replace(GREEDY, max_tokens=8, ignore_eos=True)}
    cold = await ask(engine, **fields, logprobs=0)
    warm = await ask(engine, **fields, logprobs=0)
    longer = await ask(engine, **fields | {"prompt_tokens": (*prompt[:150], 7, 8, 9)}, logprobs=0)
    fresh = LlamaCppEngine()
    await fresh.load(tmp_path / "model.gguf", config)
    reference = await ask(fresh, **fields | {"prompt_tokens": (*prompt[:150], 7, 8, 9)}, logprobs=0)
    await engine.unload()
    await fresh.unload()
    assert (end_of(warm).usage.cached_tokens > 0) is (name == "gemma3")
    for one, other in ((cold, warm), (longer, reference)):
        assert [each.token for each in told_of(one)] == [each.token for each in told_of(other)]
        assert [each.logprob for each in told_of(one)] == pytest.approx([t.logprob for t in told_of(other)], abs=0.05)
