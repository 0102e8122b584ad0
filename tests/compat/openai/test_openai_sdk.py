"""The official Python client against a real server: what it accepts is what the dialect must send."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI
from openai_fakes import FakeServices, card, finished, says, serving
from pydantic import BaseModel

from engines.errors import AccessDenied, ModelLoadFailed, PromptTooLong, ServerBusy, WorkerCrashed
from engines.events import Event, FinishReason, PromptEcho, TextDelta, ThinkingDelta, TokenLogprob, ToolCallDelta
from engines.request import OutputFormat, Priority, Syntax, ToolCall

MODEL = "qwen3:8b"
ASK: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "ls",
        "strict": True,
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
CALLS: list[Event] = [
    ThinkingDelta("hm"),
    ToolCallDelta(ToolCall("call_1", "ls", {"path": "."})),
    ToolCallDelta(ToolCall("call_2", "ls", {})),
    *finished(FinishReason.TOOL_CALLS, prompt_tokens=44, completion_tokens=9, cached_tokens=36, thinking_tokens=2),
]


@pytest.fixture
def services() -> FakeServices:
    """The house; each test gives it its script."""
    return FakeServices()


@pytest_asyncio.fixture
async def client(services: FakeServices) -> AsyncIterator[AsyncOpenAI]:
    """The asynchronous client, without retries, in front of the services."""
    async with serving(services) as url, AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_chat(client: AsyncOpenAI, services: FakeServices) -> None:
    """Content, reason and usage arrive typed."""
    services.scripts = [says("Hel", "lo")]
    reply: Any = await client.chat.completions.create(model=MODEL, messages=ASK)
    assert reply.choices[0].message.content == "Hello"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (7, 2)


async def test_tool_calls(client: AsyncOpenAI, services: FakeServices) -> None:
    """Calls, reasoning and usage details of a whole reply."""
    services.scripts = [CALLS]
    reply: Any = await client.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL])
    message = reply.choices[0].message
    assert message.content is None
    assert message.model_extra == {"reasoning_content": "hm", "reasoning": "hm"}
    assert [(call.id, call.function.arguments) for call in message.tool_calls] == [
        ("call_1", '{"path":"."}'),
        ("call_2", "{}"),
    ]
    assert reply.usage.prompt_tokens_details.cached_tokens == 36
    assert reply.usage.completion_tokens_details.reasoning_tokens == 2


async def test_the_stream_accumulator_on_text(client: AsyncOpenAI, services: FakeServices) -> None:
    """`.stream()` rebuilds role, content and usage exactly."""
    services.scripts = [says("Hel", "lo")]
    async with client.chat.completions.stream(
        model=MODEL, messages=ASK, stream_options={"include_usage": True}
    ) as stream:
        kinds = [event.type async for event in stream]
        final: Any = await stream.get_final_completion()
    assert "content.done" in kinds
    assert (final.choices[0].message.role, final.choices[0].message.content) == ("assistant", "Hello")
    assert final.usage.total_tokens == 9
    assert final.system_fingerprint == "fp_1a2b3c4d"


async def test_the_stream_accumulator_on_parallel_calls(client: AsyncOpenAI, services: FakeServices) -> None:
    """Ids, names and arguments are not doubled, also for strict tools without arguments."""
    services.scripts = [CALLS]
    async with client.chat.completions.stream(model=MODEL, messages=ASK, tools=[TOOL]) as stream:
        final: Any = await stream.get_final_completion()
    message = final.choices[0].message
    assert final.choices[0].finish_reason == "tool_calls"
    assert [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("call_1", "ls", '{"path":"."}'),
        ("call_2", "ls", "{}"),
    ]
    assert message.tool_calls[1].function.parsed_arguments == {}


async def test_the_stream_accumulator_on_two_choices(client: AsyncOpenAI, services: FakeServices) -> None:
    """Interleaved choices come apart again, however the engine orders them."""
    services.scripts = [[TextDelta("b", 1), TextDelta("a", 0), TextDelta("b", 1), *finished(num_choices=2)]]
    async with client.chat.completions.stream(model=MODEL, messages=ASK, n=2) as stream:
        final: Any = await stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["a", "bb"]
    assert services.requests[0].num_choices == 2


@pytest.mark.parametrize("include_usage", [True, False])
async def test_usage_in_a_stream(client: AsyncOpenAI, services: FakeServices, include_usage: bool) -> None:
    """The last chunk has it and no choices, exactly when it was asked for."""
    services.scripts = [says("Hi")]
    options: Any = {"include_usage": include_usage}
    stream = await client.chat.completions.create(model=MODEL, messages=ASK, stream=True, stream_options=options)
    chunks = [chunk async for chunk in stream]
    assert [chunk.usage is not None for chunk in chunks] == [False] * 3 + [True] * include_usage
    assert [len(chunk.choices) for chunk in chunks] == [1] * 3 + [0] * include_usage


async def test_parse_returns_the_object(client: AsyncOpenAI, services: FakeServices) -> None:
    """A pydantic model becomes a schema, and its JSON an object again."""

    class City(BaseModel):
        name: str

    services.scripts = [says('{"name": ', '"Oslo"}')]
    reply: Any = await client.chat.completions.parse(model=MODEL, messages=ASK, response_format=City)
    assert reply.choices[0].message.parsed == City(name="Oslo")
    output_format = services.requests[0].format
    assert isinstance(output_format, OutputFormat)
    assert output_format.schema is not None
    assert output_format.schema["properties"] == {"name": {"title": "Name", "type": "string"}}


async def test_completions(client: AsyncOpenAI, services: FakeServices) -> None:
    """Whole and streamed, from text and from token ids."""
    services.scripts = [says("a", "b")]
    whole = await client.completions.create(model=MODEL, prompt="x")
    assert whole.choices[0].text == "ab"
    stream = await client.completions.create(model=MODEL, prompt=[1, 2], stream=True)
    assert [chunk.choices[0].text async for chunk in stream] == ["a", "b", ""]
    assert services.requests[1].prompt_tokens == (1, 2)


HELLO: list[Event] = [
    TextDelta("Hel", 0, (TokenLogprob(1, b"Hel", -0.5, (TokenLogprob(1, b"Hel", -0.5), TokenLogprob(2, b"B", -1.0))),)),
    TextDelta("lo", 0, (TokenLogprob(3, b"lo", float("-inf"), (TokenLogprob(4, b"p", -0.25),)),)),
    *finished(prompt_tokens=7, completion_tokens=2, truncated_tokens=4),
]


async def test_chat_log_probabilities(client: AsyncOpenAI, services: FakeServices) -> None:
    """Typed in a whole reply, and put together again by `.stream()`."""
    services.scripts = [HELLO]
    whole: Any = await client.chat.completions.create(
        model=MODEL, messages=ASK, logprobs=True, top_logprobs=2, logit_bias={"5": -100}, service_tier="flex"
    )
    async with client.chat.completions.stream(model=MODEL, messages=ASK, logprobs=True, top_logprobs=2) as stream:
        final: Any = await stream.get_final_completion()
    for reply in (whole, final):
        content = reply.choices[0].logprobs.content
        assert [(entry.token, entry.logprob, entry.bytes) for entry in content] == [
            ("Hel", -0.5, [72, 101, 108]),
            ("lo", -9999.0, [108, 111]),
        ]
        assert [top.token for top in content[0].top_logprobs] == ["Hel", "B"]
    assert whole.usage.truncated_tokens == 4
    assert (services.requests[0].logprobs, services.requests[0].priority) == (2, Priority.BATCH)
    assert services.requests[0].sampling.logit_bias == ((5, float("-inf")),)


async def test_completion_log_probabilities_and_echo(client: AsyncOpenAI, services: FakeServices) -> None:
    """The prompt is part of the text, streamed or not; one token's alternatives are a mapping."""
    prompt = PromptEcho("Say ", (TokenLogprob(9, b"Say", 0.0), TokenLogprob(8, b" ", -1.5)))
    services.scripts = [[prompt, *HELLO]]
    whole: Any = await client.completions.create(model=MODEL, prompt="Say ", echo=True, logprobs=1)
    logprobs = whole.choices[0].logprobs
    assert whole.choices[0].text == "Say Hello"
    assert logprobs.tokens == ["Say", " ", "Hel", "lo"]
    assert logprobs.token_logprobs == [None, -1.5, -0.5, -9999.0]
    assert logprobs.top_logprobs == [None, {" ": -1.5}, {"Hel": -0.5}, {"p": -0.25, "lo": -9999.0}]
    assert logprobs.text_offset == [0, 3, 4, 7]
    stream: Any = await client.completions.create(model=MODEL, prompt="Say ", echo=True, logprobs=1, stream=True)
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks] == ["Say ", "Hel", "lo", ""]
    assert [offset for chunk in chunks[:3] for offset in chunk.choices[0].logprobs.text_offset] == [0, 3, 4, 7]


async def test_the_best_of_several(client: AsyncOpenAI, services: FakeServices) -> None:
    """Only it comes back, without the log-probabilities that it was found by."""
    services.scripts = [
        [
            TextDelta("worse", 0, (TokenLogprob(1, b"worse", -2.0),)),
            TextDelta("better", 1, (TokenLogprob(2, b"better", -1.0),)),
            *finished(num_choices=2),
        ]
    ]
    reply = await client.completions.create(model=MODEL, prompt="x", best_of=2)
    assert [(choice.index, choice.text, choice.logprobs) for choice in reply.choices] == [(0, "better", None)]
    assert (services.requests[0].num_choices, services.requests[0].logprobs) == (2, 0)


async def test_constraints_of_other_servers(client: AsyncOpenAI, services: FakeServices) -> None:
    """As their users send them, through `extra_body`."""
    bodies: list[dict[str, Any]] = [
        {"grammar": "root ::= x", "grammar_lazy": True, "grammar_triggers": [{"type": "word", "value": "<f>"}]},
        {"guided_choice": ["yes", "no"]},
        {"structured_outputs": {"regex": "[a-z]+"}, "mirostat": 2, "dry_multiplier": 0.8},
    ]
    for body in bodies:
        await client.chat.completions.create(model=MODEL, messages=ASK, extra_body=body)
    assert [request.format for request in services.requests] == [
        OutputFormat(syntax=Syntax.GBNF, grammar="root ::= x", triggers=("<f>",)),
        OutputFormat(syntax=Syntax.REGEX, grammar="(?:yes|no)"),
        OutputFormat(syntax=Syntax.REGEX, grammar="[a-z]+"),
    ]
    assert (services.requests[2].sampling.mirostat, services.requests[2].sampling.dry_multiplier) == (2, 0.8)


async def test_models(client: AsyncOpenAI, services: FakeServices) -> None:
    """Ids with slash and colon can be listed and retrieved."""
    services.cards = [card("hf.co/a/b:Q4_K_M"), card()]
    assert [model.id async for model in client.models.list()] == ["hf.co/a/b:Q4_K_M", "qwen3:8b"]
    assert (await client.models.retrieve("hf.co/a/b:Q4_K_M")).id == "hf.co/a/b:Q4_K_M"
    assert (await client.models.retrieve("qwen3:8b")).owned_by == "library"


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (PromptTooLong(99, 10), openai.BadRequestError),
        (AccessDenied("no"), openai.PermissionDeniedError),
        (ServerBusy("full"), openai.InternalServerError),
        (ModelLoadFailed("no memory"), openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_typed(
    client: AsyncOpenAI, services: FakeServices, refusal: Exception, kind: type[openai.APIStatusError], stream: bool
) -> None:
    """Also with `stream=True`, because they come before the first byte."""
    services.refusal = refusal
    with pytest.raises(kind, match="Error code"):
        await client.chat.completions.create(model=MODEL, messages=ASK, stream=stream)


async def test_an_unknown_model_and_a_wrong_field(client: AsyncOpenAI) -> None:
    """The code and the param are there to branch on."""
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="gpt-9", messages=ASK)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model=MODEL, messages=ASK, n=99)
    assert (wrong.value.code, wrong.value.param) == ("integer_above_max_value", "n")


async def test_a_load_failure_is_asked_for_once_and_a_busy_server_again(services: FakeServices) -> None:
    """The client's retries follow `x-should-retry` and `Retry-After`."""
    async with serving(services) as url, AsyncOpenAI(base_url=url, api_key="none", max_retries=1) as client:
        services.refusal = ModelLoadFailed("no memory")
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model=MODEL, messages=ASK)
        assert len(services.requests) == 1
        services.refusal = ServerBusy("full", 1)
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model=MODEL, messages=ASK)
        assert len(services.requests) == 3


async def test_a_broken_stream_raises(client: AsyncOpenAI, services: FakeServices) -> None:
    """What came before the break is delivered; then the client raises with our message."""
    services.scripts = [[TextDelta("Hi"), WorkerCrashed("the worker died")]]
    stream = await client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
    chunks = aiter(stream)
    assert [(await anext(chunks)).choices[0].delta.content for _ in range(2)] == ["", "Hi"]
    with pytest.raises(openai.APIError, match="the worker died"):
        await anext(chunks)


async def test_the_synchronous_client(services: FakeServices) -> None:
    """The same wire, read by the blocking half of the SDK."""
    services.scripts = [says("Hel", "lo")]

    def talk(url: str) -> tuple[str | None, list[str | None], str | None, str]:
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=ASK)
            chunks = list(client.chat.completions.create(model=MODEL, messages=ASK, stream=True))
            with client.chat.completions.stream(model=MODEL, messages=ASK) as stream:
                final = stream.get_final_completion()
            listed = client.models.list().data
        deltas = [chunk.choices[0].delta.content for chunk in chunks]
        return whole.choices[0].message.content, deltas, final.choices[0].message.content, listed[0].id

    async with serving(services) as url:
        assert await asyncio.to_thread(talk, url) == ("Hello", ["", "Hel", "lo", None], "Hello", "qwen3:8b")
