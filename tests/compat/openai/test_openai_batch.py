import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest
from openai_fakes import ORIGIN, FakeServices, finished, says

from compat.openai.batch import generate_all
from compat.openai.logprobs import EchoDelta
from compat.services import collect
from engines.errors import HeadwaterError, ServerBusy, WorkerCrashed
from engines.events import Event, FinishReason, PromptEcho, TextDelta, TokenLogprob
from engines.request import GenerateRequest


def requests(num: int, num_choices: int = 1) -> list[GenerateRequest]:
    """As many raw prompts."""
    return [
        GenerateRequest(str(position), "m", ORIGIN, prompt=str(position), num_choices=num_choices)
        for position in range(num)
    ]


async def test_one_request_is_passed_through() -> None:
    """A single prompt costs nothing extra: its events are the house's own."""
    services = FakeServices(says("a"))
    assert await generate_all(services, requests(1)) is services.playbacks[0]


async def test_choices_are_numbered_prompt_by_prompt_and_usage_is_summed() -> None:
    """Choice s of prompt p is p * n + s; the prompt is counted once for each prompt."""
    script = [
        TextDelta("x", 0),
        TextDelta("y", 1),
        *finished(FinishReason.LENGTH, num_choices=2, prompt_tokens=3, completion_tokens=2),
    ]
    services = FakeServices(script)
    answer = await collect(await generate_all(services, requests(3, num_choices=2)), 6)
    assert [choice.text for choice in answer.choices] == ["x", "y"] * 3
    assert answer.finished is not None
    assert (answer.finished.usage.prompt_tokens, answer.finished.usage.completion_tokens) == (9, 6)
    assert answer.finished.reason is FinishReason.LENGTH
    assert all(playback.closed.is_set() for playback in services.playbacks)


@pytest.mark.parametrize("num_prompts", [1, 2])
async def test_a_prompt_is_echoed_in_each_of_its_choices(num_prompts: int) -> None:
    """Also when it is the only one."""
    token = TokenLogprob(5, b"Hey", 0.0)
    services = FakeServices([PromptEcho("Hey", (token,)), TextDelta("a", 1), *finished(num_choices=2)])
    asked = [dataclasses.replace(request, echo=True) for request in requests(num_prompts, num_choices=2)]
    answer = await collect(await generate_all(services, asked), 2 * num_prompts)
    assert [choice.text for choice in answer.choices] == ["Hey", "Heya"] * num_prompts
    assert [choice.pieces[0] for choice in answer.choices] == [
        EchoDelta("Hey", index, (token,)) for index in range(2 * num_prompts)
    ]


async def test_prompts_run_side_by_side() -> None:
    """A later prompt's answer is read while an earlier one still waits."""
    gate = asyncio.Event()
    services = FakeServices([gate, *says("slow")], says("fast"))
    events = await generate_all(services, requests(2))
    assert await anext(events) == TextDelta("fast", 1)
    gate.set()
    answer = await collect(events, 2)
    assert answer.choices[0].text == "slow"


async def test_a_refused_prompt_cancels_the_others_before_anything_is_answered() -> None:
    """The refusal is raised as a real error, and nothing is left running."""

    class FullAfterOne(FakeServices):
        async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
            """The first request is admitted."""
            if self.playbacks:
                raise ServerBusy("full")
            return await super().generate(request)

    services = FullAfterOne([asyncio.Event()])
    with pytest.raises(ServerBusy):
        await generate_all(services, requests(3))
    assert [playback.closed.is_set() for playback in services.playbacks] == [True]


async def test_a_prompt_that_fails_later_ends_the_whole_answer() -> None:
    """The error follows the events before it; closing then cancels the others."""
    services = FakeServices([asyncio.Event()], [TextDelta("a"), WorkerCrashed("gone")])
    events = await generate_all(services, requests(2))
    assert await anext(events) == TextDelta("a", 1)
    with pytest.raises(WorkerCrashed):
        await anext(events)
    with pytest.raises(StopAsyncIteration):
        await anext(events)
    await events.aclose()  # type: ignore[attr-defined]  # a Batch, and everything the house returns, can be closed
    assert all(playback.closed.is_set() for playback in services.playbacks)


async def test_an_answer_without_its_last_event_is_an_error() -> None:
    """A reader would otherwise wait for ever."""
    with pytest.raises(HeadwaterError, match="without its last event"):
        await collect(await generate_all(FakeServices([TextDelta("a")]), requests(2)), 2)
