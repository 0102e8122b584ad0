"""One worker process on the demo model, spoken to over its socket as the gateway does."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines.events import ChoiceFinished, Event, Finished, FinishReason, TextDelta, ThinkingDelta, ToolCallDelta, Usage
from engines.request import GenerateRequest, LoadOptions, Message, Origin, OutputFormat, Sampling, Tool, ToolCall
from engines.wire import (
    DONE,
    REQUEST_ID_HEADER,
    EventDecoder,
    decode_cost,
    encode_request,
    path_of,
)

pytestmark = pytest.mark.e2e

DEMO = Path(__file__).parents[2] / "engines/store/demo/demo.gguf"
NAME = "demo"
PATIENCE_S = 60.0
FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."
WEATHER = Tool("get_weather", "Get the weather", {"type": "object", "properties": {"city": {"type": "string"}}})


class Worker:
    """A running worker and how to speak with it."""

    def __init__(self, socket: Path, process: subprocess.Popen[bytes]) -> None:
        self.socket = socket
        self.process = process

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client on the worker's socket, with as many connections as are asked for."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket), limits=httpx.Limits(max_connections=None))
        async with httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=PATIENCE_S) as client:
            yield client

    async def health(self) -> int:
        """The status of `/health`; 0 while nobody listens."""
        async with self.client() as client:
            try:
                return (await client.get("/health")).status_code
            except httpx.TransportError:
                return 0

    async def metrics(self) -> dict[str, float]:
        """The worker's numbers, without their prefix."""
        async with self.client() as client:
            text = (await client.get("/metrics")).text
        return {name: float(value) for name, value in re.findall(r"^headwater_(\w+) (\S+)$", text, re.MULTILINE)}

    async def idle(self) -> dict[str, float]:
        """The numbers once nothing runs, which is at once or a step later."""
        numbers: dict[str, float] = {}

        async def is_idle() -> bool:
            numbers.update(await self.metrics())
            return numbers["engine_sequences_running"] + numbers["engine_sequences_waiting"] == 0

        await until(is_idle)
        return numbers


async def until(condition: Callable[[], Any]) -> None:
    """Wait until what another process does has happened."""
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():  # noqa: ASYNC110  # another process has no event to wait for
            await asyncio.sleep(0.01)


@contextmanager
def working(**config: Any) -> Iterator[Worker]:
    """A worker, from its start to its end."""
    folder = Path(tempfile.mkdtemp(prefix="hw"))
    argv = [sys.executable, "-m", "engines.worker", "--model", str(DEMO), "--name", NAME, "--name", "demo:latest"]
    argv += ["--socket", str(folder / "s"), "--config", json.dumps(config)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE)
    assert process.stdin is not None
    try:
        yield Worker(folder / "s", process)
    finally:
        process.stdin.close()
        process.wait(PATIENCE_S)
        shutil.rmtree(folder)


async def ready(worker: Worker) -> Worker:
    """The worker once its model is loaded."""

    async def is_ready() -> bool:
        assert worker.process.poll() is None, "the worker ended"
        return await worker.health() == 200

    await until(is_ready)
    return worker


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """One worker for all tests that do not break theirs."""
    with working(num_parallel=4) as running:
        asyncio.run(_ready(running))
        yield running


async def _ready(worker: Worker) -> None:
    await ready(worker)


def ask(text: str, request_id: str = "req_1", **fields: Any) -> GenerateRequest:
    """A greedy chat of one message; sampling fields may be given by name."""
    said = {name: fields.pop(name) for name in list(fields) if name in Sampling.__dataclass_fields__}
    request = GenerateRequest(
        id=request_id,
        model=NAME,
        origin=Origin(surface="test", caller="test"),
        messages=(Message("user", text),),
        sampling=Sampling(**{"temperature": 0.0, "max_tokens": 200, **said}),
    )
    return replace(request, **fields)


def raw(prompt: str, **fields: Any) -> GenerateRequest:
    """A raw completion."""
    return ask("", messages=None, prompt=prompt, **fields)


async def events_of(response: httpx.Response) -> AsyncIterator[tuple[Event, Usage]]:
    """The events of a stream, each with what the request had cost by then."""
    decoder = EventDecoder()
    async for line in response.aiter_lines():
        if line and (data := line.removeprefix("data: ").encode()) != DONE:
            for event in decoder.decode(data):
                yield event, decoder.usage


@asynccontextmanager
async def streaming(worker: Worker, request: GenerateRequest) -> AsyncIterator[httpx.Response]:
    """An answer while it comes."""
    async with (
        worker.client() as client,
        client.stream(
            "POST",
            path_of(request),
            content=encode_request(request, request.model),
            headers={REQUEST_ID_HEADER: request.id},
        ) as response,
    ):
        yield response


async def answer(worker: Worker, request: GenerateRequest) -> Answer:
    """A whole answer, which must be admitted."""
    async with streaming(worker, request) as response:
        assert response.status_code == 200, await response.aread()
        return Answer([pair async for pair in events_of(response)])


async def refusal(worker: Worker, request: GenerateRequest) -> tuple[int, dict[str, Any]]:
    """The status and the error of a request that is not admitted."""
    async with streaming(worker, request) as response:
        body = json.loads(await response.aread())
        return response.status_code, body["error"]


class Answer:
    """A whole answer's events."""

    def __init__(self, pairs: list[tuple[Event, Usage]]) -> None:
        self.events = [event for event, _ in pairs]
        self.usages = [usage for _, usage in pairs]
        finished = self.events[-1]
        assert isinstance(finished, Finished)
        self.finished = finished

    def text(self, index: int = 0) -> str:
        """The text of a choice."""
        return "".join(e.text for e in self.events if isinstance(e, TextDelta) and e.index == index)

    @property
    def thinking(self) -> str:
        """The reasoning."""
        return "".join(event.text for event in self.events if isinstance(event, ThinkingDelta))

    @property
    def calls(self) -> list[ToolCall]:
        """The tool calls."""
        return [event.call for event in self.events if isinstance(event, ToolCallDelta)]


async def test_it_knows_the_capital_of_france(worker: Worker) -> None:
    """A greedy answer, word for word, in many deltas."""
    reply = await answer(worker, ask(FRANCE))
    assert reply.text() == PARIS
    assert sum(isinstance(event, TextDelta) for event in reply.events) > 5
    assert reply.events[-2:] == [ChoiceFinished(FinishReason.STOP), reply.finished]
    assert reply.finished.reason is FinishReason.STOP


async def test_usage_grows_with_the_stream_and_timings_add_up(worker: Worker) -> None:
    """Every chunk knows what the request has cost; the end-of-turn token counts, as in Ollama."""
    reply = await answer(worker, ask(FRANCE, return_tokens=True))
    completions = [usage.completion_tokens for usage in reply.usages]
    assert completions == sorted(completions)
    assert completions[0] >= 1
    usage = reply.finished.usage
    prompt_and_answer = reply.finished.tokens
    assert len(prompt_and_answer) == usage.prompt_tokens + usage.completion_tokens - 1
    assert usage.cached_tokens <= usage.prompt_tokens - 1
    assert (usage.thinking_tokens, usage.truncated_tokens) == (0, 0)
    timings = reply.finished.timings
    assert timings.queue_s >= 0
    assert timings.prefill_s > 0
    assert timings.decode_s > 0


async def test_returned_tokens_continue_the_conversation(worker: Worker) -> None:
    """Ollama's `context`: ids of prompt and answer, given back with the next question."""
    first = await answer(worker, ask(FRANCE, return_tokens=True))
    second = await answer(worker, ask("What is 2 + 3?", context_tokens=first.finished.tokens))
    alone = await answer(worker, ask("What is 2 + 3?"))
    given = second.finished.usage.prompt_tokens
    assert given == len(first.finished.tokens) + alone.finished.usage.prompt_tokens
    assert second.finished.tokens == ()


async def test_it_thinks_when_asked(worker: Worker) -> None:
    """Reasoning comes apart from the answer, and is counted."""
    reply = await answer(worker, ask("What is 7 + 5?", think=True))
    assert reply.thinking
    assert "12" in reply.text()
    assert "<" not in reply.thinking + reply.text()
    usage = reply.finished.usage
    assert 0 < usage.thinking_tokens < usage.completion_tokens
    kinds = [type(event) for event in reply.events]
    assert kinds.index(TextDelta) > max(i for i, kind in enumerate(kinds) if kind is ThinkingDelta)
    assert (await answer(worker, ask("What is 7 + 5?", think=False))).thinking == ""


async def test_thinking_tokens_are_those_before_the_answer(worker: Worker) -> None:
    """Cut in the middle of the reasoning, every token after the opening marker is reasoning."""
    reply = await answer(worker, ask("What is 7 + 5?", think=True, max_tokens=6))
    assert reply.text() == ""
    usage = reply.finished.usage
    assert usage.completion_tokens == 6
    assert usage.thinking_tokens == 5
    nothing = await answer(worker, ask("What is 7 + 5?", think=True, max_tokens=0))
    assert nothing.finished.usage.thinking_tokens == 0


async def test_it_calls_a_tool(worker: Worker) -> None:
    """A call is an event of its own, and the reason says so."""
    reply = await answer(worker, ask("What is the weather in Paris?", tools=(WEATHER,)))
    [call] = reply.calls
    assert (call.name, call.arguments) == ("get_weather", {"city": "Paris"})
    assert reply.text() == ""
    assert reply.finished.reason is FinishReason.TOOL_CALLS


async def test_it_reads_a_tools_result(worker: Worker) -> None:
    """A whole tool dialogue is a prompt like any other."""
    call = ToolCall("call_1", "get_weather", {"city": "Paris"})
    turns = (
        Message("user", "What is the weather in Paris?"),
        Message("assistant", tool_calls=(call,)),
        Message("tool", '{"weather": "sunny"}', tool_name="get_weather", tool_call_id="call_1"),
    )
    reply = await answer(worker, ask("", messages=turns, tools=(WEATHER,)))
    assert reply.finished.reason in (FinishReason.STOP, FinishReason.TOOL_CALLS)


async def test_stop_strings_end_the_answer_and_do_not_show(worker: Worker) -> None:
    """Also one that spans tokens and begins inside one."""
    reply = await answer(worker, ask(FRANCE, stop=(" is Par", "never")))
    assert reply.text() == "The capital of France"
    assert reply.finished.reason is FinishReason.STOP


@pytest.mark.parametrize("limit", [0, 1, 5])
async def test_a_token_limit_ends_the_answer(worker: Worker, limit: int) -> None:
    """Exactly so many tokens, and the reason is the length."""
    reply = await answer(worker, ask(FRANCE, max_tokens=limit))
    assert PARIS.startswith(reply.text())
    assert reply.finished.usage.completion_tokens == limit
    assert reply.finished.reason is FinishReason.LENGTH


async def test_a_seed_repeats_an_answer(worker: Worker) -> None:
    """The same seed gives the same text, other seeds others."""

    async def tell(seed: int) -> str:
        return (await answer(worker, ask("Tell me a story.", temperature=1.5, seed=seed, max_tokens=30))).text()

    first, again, *others = await asyncio.gather(*map(tell, [7, 7, 8, 9, 2**40, -1]))
    assert first == again
    assert len({first, *others}) > 1


async def test_choices_differ_and_are_counted_together(worker: Worker) -> None:
    """Two answers to one prompt, which is counted once."""
    request = ask("Tell me a story.", temperature=1.5, seed=7, max_tokens=20, num_choices=2, logprobs=0)
    reply, again = await asyncio.gather(answer(worker, request), answer(worker, replace(request, id="req_2")))
    assert reply.text(0) != reply.text(1)
    assert again.text(0) != again.text(1)
    for index in (0, 1):
        told = [
            [each for e in r.events if isinstance(e, TextDelta) and e.index == index for each in e.logprobs]
            for r in (reply, again)
        ]
        alike = list(takewhile(lambda pair: pair[0].token == pair[1].token, zip(*told, strict=False)))
        assert len(alike) >= 5
        assert all(one.logprob == pytest.approx(other.logprob, abs=0.05) for one, other in alike)
    finished = [event.index for event in reply.events if isinstance(event, ChoiceFinished)]
    assert sorted(finished) == [0, 1]
    # Probabilities are compared and no texts: a batch's shape decides the last bits of a logit, and those decide which
    # of many equally likely names a story takes.
    single = await answer(worker, replace(request, num_choices=1))
    usage = reply.finished.usage
    assert usage.prompt_tokens == single.finished.usage.prompt_tokens
    assert usage.completion_tokens <= 40


async def test_greedy_choices_are_alike(worker: Worker) -> None:
    """Nothing of one choice leaks into the other."""
    reply = await answer(worker, ask(FRANCE, num_choices=3))
    assert [reply.text(index) for index in range(3)] == [PARIS] * 3


EXTREMES: list[dict[str, Any]] = [
    {"repeat_penalty": 1.3, "repeat_last_n": -1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"repeat_penalty": 1e-40, "repeat_last_n": 64},
    {"repeat_penalty": 1e40},
    {"repeat_penalty": -1.0},
    {"presence_penalty": 1e40},
    {"presence_penalty": -1e40},
    {"frequency_penalty": 1e308},
    {"temperature": 1e308},
    {"temperature": 1e-40},
    {"temperature": -1.0},
    {"top_k": 2**60},
    {"top_k": -(2**60)},
    {"top_p": 0.0},
    {"top_p": -5.0},
    {"top_p": 1e308},
    {"min_p": 1.0},
    {"min_p": 1e308},
    {"min_p": -1.0},
    {"typical_p": 0.0},
    {"typical_p": -1.0},
    {"repeat_last_n": 2**60, "repeat_penalty": 1.1},
    {"seed": 2**70},
    {"seed": -(2**70)},
    {"seed": 2**32 - 1},
    {"max_tokens": 2**60, "stop": ("a",)},
    {"stop": ("", "x" * 10_000)},
    {"stop": tuple(f"stop {i}" for i in range(256))},
]


@pytest.mark.parametrize("sampling", EXTREMES, ids=str)
async def test_no_sampling_parameter_breaks_the_engine(worker: Worker, sampling: dict[str, Any]) -> None:
    """Absurd values give absurd text at worst, and the next request is answered as ever."""
    request = ask(FRANCE, **{"temperature": 1.0, "max_tokens": 8, **sampling})
    await answer(worker, request)
    assert (await answer(worker, ask(FRANCE))).text() == PARIS


async def test_a_raw_prompt_is_completed(worker: Worker) -> None:
    """No template, no parser: text in, text out."""
    reply = await answer(
        worker, raw("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    )
    assert reply.text().endswith(PARIS)


async def test_raw_tokens_are_completed(worker: Worker) -> None:
    """The ids of a rendered chat give the same answer."""
    chat = await answer(worker, ask(FRANCE, return_tokens=True))
    prompt = chat.finished.tokens[: chat.finished.usage.prompt_tokens]
    reply = await answer(worker, ask("", messages=None, prompt_tokens=prompt))
    assert reply.text() == PARIS
    assert reply.finished.usage.prompt_tokens == len(prompt)


async def test_an_answer_can_be_continued(worker: Worker) -> None:
    """A trailing assistant message is the beginning of the answer."""
    turns = (Message("user", FRANCE), Message("assistant", "The capital of France"))
    assert (await answer(worker, ask("", messages=turns))).text().strip() == "is Paris."


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"messages": (Message("user", "word " * 5000),)}, "context_length_exceeded"),
        ({"load": LoadOptions(num_ctx=10)}, "context_length_exceeded"),
        ({"load": LoadOptions(num_ctx=-1)}, "context_length_exceeded"),
        ({"messages": None, "prompt": ""}, "invalid_request"),
        ({"messages": None, "prompt_tokens": (10**6,)}, "invalid_request"),
        ({"messages": None, "prompt_tokens": (-1,)}, "invalid_request"),
        ({"context_tokens": (2**70,)}, "invalid_request"),
        ({"messages": ()}, "template_error"),
        ({"stop": tuple(f"stop {i}" for i in range(257))}, "invalid_request"),
        ({"messages": None, "prompt": "x" * (5 * 1024 * 1024)}, "context_length_exceeded"),
        ({"template_kwargs": {"tools": 5}}, "template_error"),
        ({"messages": (Message("assistant", tool_calls=(ToolCall("1", "f", {}),)),)}, None),
        ({"messages": (Message("user", "Look", images=(b"png",)),)}, "unsupported_feature"),
        ({"format": OutputFormat({"type": "colour"})}, "invalid_request"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_impossible_requests_are_refused_before_anything_runs(
    worker: Worker, fields: dict[str, Any], code: str | None
) -> None:
    """A real status, a stable code, and the engine is untouched."""
    before = (await worker.idle())["engine_steps_total"]
    status, error = await refusal(worker, ask(FRANCE, **fields))
    assert status == 400
    assert code is None or error["code"] == code
    assert (await worker.metrics())["engine_steps_total"] == before


async def test_a_long_prompt_has_its_numbers(worker: Worker) -> None:
    """What the client is told in its dialect's words."""
    _, error = await refusal(worker, ask("word " * 5000))
    assert error["n_ctx"] == 4096
    assert error["n_prompt_tokens"] > 5000


async def test_a_long_chat_may_be_cut(worker: Worker) -> None:
    """With `truncate` the oldest messages go, and are counted."""
    turns = (Message("user", "word " * 5000), Message("assistant", "Yes."), Message("user", FRANCE))
    reply = await answer(worker, ask("", messages=turns, truncate=True))
    assert reply.text() == PARIS
    assert reply.finished.usage.truncated_tokens > 5000


async def test_a_smaller_window_ends_the_answer(worker: Worker) -> None:
    """A request may have less than the worker's window; its end is the length."""
    prompt = (await answer(worker, ask(FRANCE))).finished.usage.prompt_tokens
    reply = await answer(worker, ask(FRANCE, load=LoadOptions(num_ctx=prompt + 4)))
    assert reply.finished.usage.completion_tokens == 4
    assert reply.finished.reason is FinishReason.LENGTH


async def test_a_wrong_model_is_misdirected(worker: Worker) -> None:
    """One worker, one model, under each of its names."""
    assert (await refusal(worker, ask(FRANCE, model="llama3")))[0] == 421
    assert (await answer(worker, ask(FRANCE, model="demo:latest"))).text() == PARIS


@pytest.mark.parametrize("body", [b"", b"[", b"{}", b"[" * 100_000, b'{"model": "demo", "messages": 5}'])
async def test_a_malformed_body_is_refused(worker: Worker, body: bytes) -> None:
    """The worker says what is wrong and goes on."""
    async with worker.client() as client:
        reply = await client.post("/v1/chat/completions", content=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_request"


async def test_requests_beside_each_other_share_steps(worker: Worker) -> None:
    """Sixteen answers take little more steps than one, and each is what it is alone."""
    before = await worker.idle()
    requests = [ask(FRANCE, f"req_{i}") for i in range(16)]
    replies = await asyncio.gather(*(answer(worker, request) for request in requests))
    assert [reply.text() for reply in replies] == [PARIS] * 16
    after = await worker.idle()
    num_tokens = sum(reply.finished.usage.completion_tokens for reply in replies)
    assert after["engine_steps_total"] - before["engine_steps_total"] < num_tokens / 3
    assert after["engine_kv_cells_free"] == after["engine_kv_cells"]


async def test_cancelling_ends_a_request_and_tells_its_cost(worker: Worker) -> None:
    """`POST /cancel/{id}` mid-stream: the usage is final, the stream ends, and the cells are free."""
    request = ask("Tell me a story.", "req_cancelled", temperature=1.0, max_tokens=4000)
    async with streaming(worker, request) as response, worker.client() as client:
        events = events_of(response)
        seen = 0
        async for event, usage in events:
            seen = usage.completion_tokens
            if isinstance(event, TextDelta) and seen > 3:
                break
        reply = await client.post(f"/cancel/{request.id}")
        assert reply.status_code == 200
        cost, timings = decode_cost(reply.content)
        async for _, usage in events:
            assert usage.completion_tokens <= cost.completion_tokens
    assert seen <= cost.completion_tokens < 4000
    assert cost.prompt_tokens > 0
    assert timings.prefill_s > 0
    numbers = await worker.idle()
    assert numbers["engine_kv_cells_free"] == numbers["engine_kv_cells"]
    decoded = numbers["engine_decode_tokens_total"]
    assert (await worker.metrics())["engine_decode_tokens_total"] == decoded, "it goes on computing"


async def test_cancelling_what_is_over_tells_its_cost_and_what_is_unknown_is_not_found(worker: Worker) -> None:
    """The question may come after the end; only an id never seen has no answer."""
    reply = await answer(worker, ask(FRANCE, "req_over"))
    async with worker.client() as client:
        told = await client.post("/cancel/req_over")
        assert decode_cost(told.content)[0] == reply.finished.usage
        assert (await client.post("/cancel/req_unknown")).status_code == 404


async def test_a_client_that_leaves_frees_its_slot(worker: Worker) -> None:
    """Mid-stream, and before the first byte."""
    async with streaming(worker, ask("Tell me a story.", temperature=1.0, max_tokens=4000)) as response:
        async for event, _ in events_of(response):
            if isinstance(event, TextDelta):
                break
    numbers = await worker.idle()
    assert numbers["engine_kv_cells_free"] == numbers["engine_kv_cells"]


async def test_clients_that_leave_at_once_leave_nothing_behind(worker: Worker) -> None:
    """A connection that closes right behind its request costs the engine nothing for long."""
    body = encode_request(ask("Tell me a story.", temperature=1.0, max_tokens=4000), NAME)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: w\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(20):
        _, writer = await asyncio.open_unix_connection(str(worker.socket))
        writer.write(head + body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    numbers = await worker.idle()
    assert numbers["engine_kv_cells_free"] == numbers["engine_kv_cells"]
    assert (await answer(worker, ask(FRANCE))).text() == PARIS


async def test_a_shared_beginning_is_computed_once(worker: Worker) -> None:
    """The next turn of a chat finds the last one in the cache, and says so."""
    turns = [Message("user", "Please remember: " + "the sky is blue. " * 10 + FRANCE)]
    first = await answer(worker, ask("", messages=tuple(turns)))
    turns += [Message("assistant", first.text()), Message("user", "What is 2 + 3?")]
    second = await answer(worker, ask("", messages=tuple(turns)))
    assert second.finished.usage.cached_tokens > first.finished.usage.prompt_tokens / 2


async def test_output_follows_a_schema(worker: Worker) -> None:
    """Constrained output is JSON of the right shape, whatever the model would rather say."""
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    reply = await answer(worker, ask("What is 2 + 3?", format=OutputFormat(schema)))
    assert isinstance(json.loads(reply.text())["n"], int)


async def test_health_is_503_until_the_model_is_loaded() -> None:
    """The socket is there first; the status never goes back."""
    with working() as starting:
        statuses: list[int] = []

        async def is_ready() -> bool:
            statuses.append(await starting.health())
            return statuses[-1] == 200

        await until(is_ready)
        assert set(statuses) <= {0, 503, 200}
        assert await starting.health() == 200


async def test_a_full_cache_only_costs_time() -> None:
    """With cells for one window, many long answers preempt each other, and go on where they were.

    Their beginnings are compared and their lengths: logits differ in the last bits with the shape of a batch, so that
    a near tie far into an answer may fall the other way.
    """
    with working(context_size=256, num_parallel=1, num_sequences=16) as small:
        await ready(small)
        prompts = [
            "List: a, b, c,",
            "<|im_start|>assistant\nThe",
            "Once upon a time",
            "Count: 1 2 3",
            "A, B, C, D,",
            "The",
        ]
        requests = [raw(prompt, request_id=f"req_{i}") for i, prompt in enumerate(prompts)]
        alone = [await answer(small, request) for request in requests]
        together = await asyncio.gather(*(answer(small, request) for request in requests))
        assert [reply.text()[:20] for reply in together] == [reply.text()[:20] for reply in alone]
        assert all(reply.finished.usage.total_tokens <= 256 for reply in together)
        numbers = await small.idle()
        assert numbers["engine_preemptions_total"] > 0
        assert numbers["engine_kv_cells_free"] == numbers["engine_kv_cells"] == 256


async def test_a_worker_ends_politely() -> None:
    """SIGTERM is an orderly end, and the socket is gone."""
    with working() as ending:
        await ready(ending)
        ending.process.terminate()
        assert await asyncio.to_thread(ending.process.wait, PATIENCE_S) == 0
        assert not ending.socket.exists()


async def test_a_worker_does_not_outlive_its_parent() -> None:
    """The closing of its standard input ends it, whatever it is doing."""
    with working() as orphan:
        await ready(orphan)
        started = time.monotonic()
        async with streaming(orphan, ask("Tell me a story.", temperature=1.0, max_tokens=4000)) as response:
            await anext(events_of(response))
            assert orphan.process.stdin is not None
            orphan.process.stdin.close()
            await asyncio.to_thread(orphan.process.wait, PATIENCE_S)
        assert time.monotonic() - started < 10
