"""The official Python client against a real server: what it accepts is what the dialect must send."""

import asyncio
import datetime
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from ollama import AsyncClient, Client, ResponseError
from ollama_fakes import NOW_NS, FakeServices, card, finished, runner, says, serving

from compat.ollama.errors import QUEUE_FULL, RUNNER_STOPPED
from engines.errors import ModelLoadFailed, ServerBusy, WorkerCrashed
from engines.events import FinishReason, TextDelta, ThinkingDelta, TokenLogprob, ToolCallDelta
from engines.request import FOREVER, Message, OutputFormat, Sampling, ToolCall

MODEL = "llama3.2"
ASK: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def services() -> FakeServices:
    """The house; each test gives it its script."""
    return FakeServices(cards=[card("llama3.2:latest", "tools", "thinking")])


@pytest_asyncio.fixture
async def client(services: FakeServices) -> AsyncIterator[AsyncClient]:
    """The asynchronous client in front of the services."""
    async with serving(services) as url, AsyncClient(host=url) as client:
        yield client


async def test_list_show_and_ps(client: AsyncClient, services: FakeServices) -> None:
    """Everything typed: times, sizes, digests, details."""
    services.runners = [runner(FOREVER)]
    (listed,) = (await client.list()).models
    assert (listed.model, listed.size, listed.digest) == ("llama3.2:latest", 2019393189, "a80c" + "0" * 60)
    assert listed.modified_at == datetime.datetime.fromtimestamp(NOW_NS / 1e9, datetime.UTC)
    assert listed.details is not None
    assert (listed.details.family, listed.details.quantization_level) == ("llama", "Q4_K_M")
    shown = await client.show(MODEL)
    assert shown.modelinfo == {"general.architecture": "llama", "general.parameter_count": 32}
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.template == "{{ .Prompt }}"
    (loaded,) = (await client.ps()).models
    assert (loaded.model, loaded.size_vram, loaded.context_length) == ("llama3.2:latest", 0, 4096)
    assert loaded.expires_at is not None
    assert loaded.expires_at.year == 2318


async def test_a_chat(client: AsyncClient) -> None:
    """Content, reason and statistics arrive typed."""
    reply = await client.chat(MODEL, ASK)
    assert (reply.message.role, reply.message.content) == ("assistant", "Hello")
    assert (reply.model, reply.done, reply.done_reason) == (MODEL, True, "stop")
    assert (reply.total_duration, reply.prompt_eval_count, reply.eval_count) == (512_000_000, 9, 2)


async def test_a_streamed_chat(client: AsyncClient, services: FakeServices) -> None:
    """Thinking first, then content, then the end; and again with options, which arrive too."""
    services.script = [ThinkingDelta("hm"), *says("Hel", "lo")]
    stream = await client.chat(
        MODEL, ASK, stream=True, think="low", options={"num_ctx": 64, "seed": 1}, keep_alive="5m"
    )
    pieces = [piece async for piece in stream]
    assert [(piece.message.thinking, piece.message.content) for piece in pieces] == [
        ("hm", ""),
        (None, "Hel"),
        (None, "lo"),
        (None, ""),
    ]
    assert [piece.done for piece in pieces] == [False, False, False, True]
    (request,) = services.requests
    assert (request.think, request.load.num_ctx, request.keep_alive_s) == ("low", 64, 300)
    assert request.sampling == Sampling(seed=1)


async def test_tool_calls(client: AsyncClient, services: FakeServices) -> None:
    """A Python function becomes a tool, its call comes back, and its result goes in again."""

    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first
            b: the second
        """
        return a + b

    call = ToolCall("call_" + "a1b2c3d4" * 3, "add", {"a": 1, "b": 2})
    services.script = [ToolCallDelta(call), *finished(FinishReason.TOOL_CALLS)]
    reply = await client.chat(MODEL, ASK, tools=[add])
    assert reply.done_reason == "stop"
    assert reply.message.tool_calls is not None
    assert reply.message.tool_calls[0].function.arguments == {"a": 1, "b": 2}
    (tool,) = services.requests[0].tools
    assert tool.parameters["properties"]["a"] == {"type": "integer", "description": "the first"}
    assert tool.parameters["required"] == ["a", "b"]
    result: Any = {"role": "tool", "content": "3", "tool_name": "add"}
    await client.chat(MODEL, [*ASK, reply.message, result])
    messages = services.requests[1].messages
    assert messages is not None
    assert messages[1].tool_calls == (ToolCall("", "add", {"a": 1, "b": 2}),)
    assert messages[2] == Message("tool", "3", tool_name="add")


async def test_a_streamed_tool_call_is_on_the_last_object(client: AsyncClient, services: FakeServices) -> None:
    """With a message that has a role and content."""
    services.script = [ToolCallDelta(ToolCall("call_1", "ls", {})), *finished(FinishReason.TOOL_CALLS)]
    (piece,) = [piece async for piece in await client.chat(MODEL, ASK, stream=True)]
    assert piece.done
    assert piece.message.tool_calls is not None
    assert piece.message.tool_calls[0].function.arguments == {}


async def test_a_generation(client: AsyncClient, services: FakeServices) -> None:
    """Response, context and statistics; the context continues it."""
    services.script = [TextDelta("Hi"), *finished(tokens=(1, 2, 3), prompt_tokens=2, completion_tokens=1)]
    reply = await client.generate(MODEL, "hi", system="be brief", images=[b"\x89PNG"], format="json")
    assert (reply.response, reply.context, reply.done_reason) == ("Hi", [1, 2, 3], "stop")
    again = await client.generate(MODEL, "more", context=reply.context, stream=True)
    assert [piece.response async for piece in again] == ["Hi", ""]
    first, second = services.requests
    assert first.messages == (Message("system", "be brief"), Message("user", "hi", images=(b"\x89PNG",)))
    assert first.format == OutputFormat()
    assert (second.context_tokens, second.messages) == ((1, 2, 3), (Message("user", "more"),))


async def test_log_probabilities(client: AsyncClient, services: FakeServices) -> None:
    """Typed on chat and generate, whole and streamed."""
    token = TokenLogprob(1, b"Hi", -0.5, (TokenLogprob(1, b"Hi", -0.5), TokenLogprob(2, b"Yo", -1.5)))
    services.script = [
        TextDelta("Hi", 0, (token,)),
        TextDelta("", 0, (token,)),
        *finished(prompt_tokens=2, completion_tokens=2, truncated_tokens=3),
    ]
    chat = await client.chat(MODEL, ASK, logprobs=True, top_logprobs=2)
    generated = await client.generate(MODEL, "hi", logprobs=True, top_logprobs=2)
    for whole in (chat, generated):
        assert whole.logprobs is not None
        assert [(entry.token, entry.logprob) for entry in whole.logprobs] == [("Hi", -0.5)] * 2
        assert [top.token for top in whole.logprobs[0].top_logprobs or ()] == ["Hi", "Yo"]
    chunks = [chunk async for chunk in await client.chat(MODEL, ASK, logprobs=True, top_logprobs=2, stream=True)]
    pieces = [piece async for piece in await client.generate(MODEL, "hi", logprobs=True, stream=True)]
    for streamed in (chunks, pieces):
        assert [len(each.logprobs or ()) for each in streamed] == [1, 1, 0]
    assert [request.logprobs for request in services.requests] == [2, 2, 2, 0]


async def test_further_samplers(client: AsyncClient, services: FakeServices) -> None:
    """Honoured where they make sense; the rest is ignored, as Ollama ignores all of them."""
    options = {"mirostat": 2, "mirostat_tau": "high", "num_keep": 24, "logit_bias": {"5": -100}, "xtc_probability": 7}
    await client.chat(MODEL, ASK, options=options)
    (request,) = services.requests
    assert request.sampling == Sampling(mirostat=2, logit_bias=((5, float("-inf")),))
    assert request.num_keep == 24


async def test_loading_and_unloading(client: AsyncClient, services: FakeServices) -> None:
    """The empty prompt with and without time to stay."""
    assert (await client.generate(MODEL)).done_reason == "load"
    assert (await client.generate(MODEL, keep_alive=0)).done_reason == "unload"
    assert (await client.chat(MODEL, keep_alive=-1)).done_reason == "load"
    assert (len(services.unloads), services.loads[1].keep_alive_s) == (1, FOREVER)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "text"),
    [(ServerBusy("full"), 503, QUEUE_FULL), (ModelLoadFailed("no memory"), 500, "no memory")],
)
async def test_refusals_are_response_errors(
    client: AsyncClient, services: FakeServices, refusal: Exception, status: int, text: str, stream: bool
) -> None:
    """With text and status, also with `stream=True`, because they come before the first byte."""
    services.refusal = refusal

    async def ask() -> None:
        if stream:
            await anext(aiter(await client.chat(MODEL, ASK, stream=True)))
        else:
            await client.chat(MODEL, ASK)

    with pytest.raises(ResponseError) as refused:
        await ask()
    assert (refused.value.error, refused.value.status_code) == (text, status)


async def test_an_unknown_model_is_a_response_error(client: AsyncClient) -> None:
    """The text is the one that tools look for."""
    for asking in (client.chat("nope", ASK), client.generate("nope", "x"), client.show("nope:latest")):
        with pytest.raises(ResponseError, match=r"^model 'nope(:latest)?' not found") as refused:
            await asking
        assert refused.value.status_code == 404


async def test_a_broken_stream_raises(client: AsyncClient, services: FakeServices) -> None:
    """What came before the break is delivered; then the client raises with our message."""
    services.script = [TextDelta("Hi"), WorkerCrashed("killed")]
    pieces = aiter(await client.chat(MODEL, ASK, stream=True))
    assert (await anext(pieces)).message.content == "Hi"
    with pytest.raises(ResponseError) as broken:
        await anext(pieces)
    assert broken.value.error == f"{RUNNER_STOPPED}: killed"


async def test_the_synchronous_client(services: FakeServices) -> None:
    """The same wire, read by the blocking half."""

    def talk(url: str) -> None:
        with Client(host=url) as client:
            assert client.list().models[0].model == "llama3.2:latest"
            assert client.ps().models == []
            assert client.show(MODEL).details is not None
            assert client.chat(MODEL, ASK).message.content == "Hello"
            assert [piece.message.content for piece in client.chat(MODEL, ASK, stream=True)] == ["Hel", "lo", ""]
            assert client.generate(MODEL, "hi").response == "Hello"
            assert [piece.response for piece in client.generate(MODEL, "hi", stream=True)] == ["Hel", "lo", ""]
            assert client.generate(MODEL, keep_alive=0).done_reason == "unload"
            services.cards = [card(capabilities=("embedding",))]
            with pytest.raises(ResponseError, match=r'^"llama3.2" does not support chat'):
                client.chat(MODEL, ASK)

    async with serving(services) as url:
        await asyncio.to_thread(talk, url)
