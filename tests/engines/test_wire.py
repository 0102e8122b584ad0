from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engines.errors import (
    BadRequest,
    HeadwaterError,
    PromptTooLong,
    ServerBusy,
    TemplateError,
    UnsupportedFeature,
    WorkerCrashed,
)
from engines.events import (
    ChoiceFinished,
    Event,
    Finished,
    FinishReason,
    PromptEcho,
    TextDelta,
    ThinkingDelta,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
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
    ToolCall,
)
from engines.wire import (
    MAX_CHOICES,
    EventDecoder,
    decode_cost,
    decode_error,
    decode_request,
    encode_cost,
    encode_error,
    encode_event,
    encode_request,
    path_of,
)

ORIGIN = Origin(surface="ollama/completion", caller="gateway")
CHAT = GenerateRequest(id="req_1", model="m", origin=ORIGIN, messages=(Message("user", "Hi"),), stream=True)

texts = st.text(max_size=12)
counts = st.integers(0, 2**31)
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
seconds = st.floats(0, 1e6, width=32)
plain_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, plain_json, max_size=3)
broken_arguments = st.sampled_from(["", "{", '{"a": ', "[1]", "null", "text"])
calls = st.builds(ToolCall, id=texts, name=texts, arguments=objects | broken_arguments)
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=texts,
    thinking=texts,
    images=st.lists(st.binary(min_size=1, max_size=8), max_size=2).map(tuple),
    tool_calls=st.lists(calls, max_size=2).map(tuple),
    tool_name=texts,
    tool_call_id=texts,
)
samplings = st.builds(
    Sampling,
    temperature=st.none() | numbers,
    top_k=st.none() | st.integers(-5, 2**40),
    top_p=st.none() | numbers,
    min_p=st.none() | numbers,
    typical_p=st.none() | numbers,
    repeat_last_n=st.none() | st.integers(-1, 4096),
    repeat_penalty=st.none() | numbers,
    presence_penalty=st.none() | numbers,
    frequency_penalty=st.none() | numbers,
    seed=st.none() | st.integers(-(2**70), 2**70),
    stop=st.none() | st.lists(texts, max_size=3).map(tuple),
    max_tokens=st.none() | st.integers(-1, 2**31),
    xtc_probability=st.none() | numbers,
    dry_multiplier=st.none() | numbers,
    dry_allowed_length=st.none() | st.integers(0, 100),
    dry_sequence_breakers=st.none() | st.lists(texts, max_size=3).map(tuple),
    mirostat=st.none() | st.integers(0, 2),
    ignore_eos=st.none() | st.booleans(),
    logit_bias=st.none()
    | st.lists(st.tuples(st.integers(0, 200_000) | texts, numbers | st.just(-math.inf)), max_size=3).map(tuple),
)
tokens = st.lists(st.integers(0, 200_000), max_size=5).map(tuple)
prompts = (
    st.fixed_dictionaries({"messages": st.lists(messages, max_size=4).map(tuple)})
    | st.fixed_dictionaries({"prompt": texts})
    | st.fixed_dictionaries({"prompt_tokens": tokens})
)
requests = st.builds(
    lambda prompt, **fields: GenerateRequest(id="req_1", model="m", origin=ORIGIN, stream=True, **prompt, **fields),
    prompts,
    context_tokens=tokens,
    tools=st.lists(st.builds(Tool, name=texts, description=texts, parameters=objects), max_size=2).map(tuple),
    format=st.none()
    | st.builds(OutputFormat, schema=st.none() | objects, triggers=st.lists(texts, max_size=2).map(tuple))
    | st.builds(
        OutputFormat,
        syntax=st.sampled_from([Syntax.REGEX, Syntax.GBNF, Syntax.LARK]),
        grammar=texts,
        triggers=st.lists(texts, max_size=2).map(tuple),
    ),
    sampling=samplings,
    load=st.builds(LoadOptions, num_ctx=st.none() | counts),
    think=st.none() | st.booleans() | st.sampled_from(["low", "high"]),
    template_kwargs=objects,
    truncate=st.booleans(),
    shift=st.booleans(),
    num_keep=st.integers(-1, 100),
    num_choices=st.integers(1, MAX_CHOICES),
    logprobs=st.none() | st.integers(0, 20),
    echo=st.booleans(),
    return_tokens=st.booleans(),
    priority=st.sampled_from(Priority),
)
usages = st.builds(Usage, counts, counts, counts, counts, counts, counts)
logprobs = st.floats(-100, 0, width=32)
alternatives = st.builds(TokenLogprob, st.integers(0, 200_000), st.binary(max_size=6), logprobs)
told = st.lists(
    st.builds(
        TokenLogprob,
        st.integers(0, 200_000),
        st.binary(max_size=6),
        logprobs,
        st.lists(alternatives, max_size=2).map(tuple),
    ),
    max_size=3,
).map(tuple)
indexes = st.integers(0, 7)
events = st.one_of(
    st.builds(TextDelta, st.text(min_size=1), indexes, told),
    st.builds(TextDelta, st.just(""), indexes, told.filter(bool)),
    st.builds(ThinkingDelta, st.text(min_size=1), indexes, told),
    st.builds(ThinkingDelta, st.just(""), indexes, told.filter(bool)),
    st.builds(PromptEcho, st.text(), told),
    st.builds(ToolCallDelta, calls, indexes),
    st.builds(ChoiceFinished, st.sampled_from(FinishReason), indexes),
    st.builds(
        Finished,
        st.sampled_from(FinishReason),
        usages,
        st.builds(Timings, queue_s=seconds, prefill_s=seconds, decode_s=seconds),
        tokens,
    ),
)


def round_trip(request: GenerateRequest) -> GenerateRequest:
    """A request as the worker reads it."""
    return decode_request(encode_request(request, request.model), id=request.id, surface=request.origin.surface)


def decoded(body: object) -> GenerateRequest:
    """What the worker makes of a body that we did not write."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return decode_request(data, id="req_1", surface="ollama/completion")


@given(request=requests)
def test_a_request_survives_the_way_to_the_worker(request: GenerateRequest) -> None:
    """Everything that the worker needs arrives as it was sent."""
    assert round_trip(request) == request


def test_what_the_gateway_keeps_to_itself_does_not_travel() -> None:
    """The worker learns the surface, not who asks, and sampling comes resolved."""
    request = replace(
        CHAT,
        origin=Origin(surface="openai/chat", caller="alice", user="bob"),
        defaults=Sampling(temperature=0.5),
        keep_alive_s=5.0,
    )
    assert round_trip(request) == replace(CHAT, origin=Origin(surface="openai/chat", caller="gateway"))


def test_the_worker_is_told_its_own_name() -> None:
    """The model's id replaces the name that the client typed."""
    assert json.loads(encode_request(CHAT, "sha256:abc"))["model"] == "sha256:abc"


def test_a_request_is_one_that_other_servers_understand() -> None:
    """Messages, tools and formats have OpenAI's shape, images are data URLs."""
    call = ToolCall("call_1", "f", {"a": "é"})
    request = replace(
        CHAT,
        messages=(Message("user", "Look", images=(b"png",)), Message("assistant", tool_calls=(call,))),
        tools=(Tool("f", "does f", {"type": "object"}),),
        format=OutputFormat({"type": "object"}),
    )
    body = json.loads(encode_request(request, "m"))
    assert path_of(request) == "/v1/chat/completions"
    assert body["messages"][0]["content"] == [
        {"type": "text", "text": "Look"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,cG5n"}},
    ]
    assert body["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": "é"}'}
    assert body["tools"][0]["function"] == {"name": "f", "description": "does f", "parameters": {"type": "object"}}
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert body["stream_options"]["include_usage"] is True


def test_raw_prompts_go_to_the_completions_route() -> None:
    """Text and token ids alike."""
    assert path_of(replace(CHAT, messages=None, prompt="x")) == "/v1/completions"
    assert path_of(replace(CHAT, messages=None, prompt_tokens=(1,))) == "/v1/completions"


def test_half_a_surrogate_pair_is_refused() -> None:
    """Text that is no Unicode has no bytes; the request is at fault, not we."""
    with pytest.raises(BadRequest, match="surrogate"):
        encode_request(replace(CHAT, messages=(Message("user", "\ud800"),)), "m")
    with pytest.raises(BadRequest):
        decoded(b'{"model": "m", "prompt": "\\ud800"}')


SOUND: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
MALFORMED: list[object] = [
    b"",
    b"{",
    b"\xff",
    b"[" * 100_000,
    None,
    [],
    "text",
    {},
    {"model": "m"},
    {"messages": []},
    {**SOUND, "model": 5},
    {**SOUND, "prompt": "both"},
    {**SOUND, "messages": "Hi"},
    {**SOUND, "messages": ["Hi"]},
    {**SOUND, "messages": [{}]},
    {**SOUND, "messages": [{"role": 5, "content": "Hi"}]},
    {**SOUND, "messages": [{"role": "user", "content": 5}]},
    {**SOUND, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {**SOUND, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]},
    {**SOUND, "messages": [{"role": "user", "tool_calls": [{"function": {"name": 5, "arguments": "{}"}}]}]},
    {**SOUND, "messages": [{"role": "user", "tool_calls": [{"function": {}}]}]},
    {**SOUND, "messages": [{"role": "user", "tool_calls": 5}]},
    {**SOUND, "temperature": "hot"},
    {**SOUND, "top_k": 1.5},
    {**SOUND, "seed": True},
    {**SOUND, "stop": "text"},
    {**SOUND, "stop": [1]},
    {**SOUND, "max_tokens": "many"},
    {**SOUND, "num_ctx": "large"},
    {**SOUND, "tools": [{}]},
    {**SOUND, "tools": [{"function": {"name": "f", "parameters": []}}]},
    {**SOUND, "response_format": {}},
    {**SOUND, "response_format": {"type": "json_schema"}},
    {**SOUND, "chat_template_kwargs": [1]},
    {**SOUND, "truncate": "yes"},
    {**SOUND, "priority": "urgent"},
    {**SOUND, "logprobs": "all"},
    {**SOUND, "logit_bias": [[1]]},
    {**SOUND, "response_format": {"type": "regex"}},
    {**SOUND, "response_format": {"type": "perl", "grammar": ""}},
    {**SOUND, "think": 5},
    {**SOUND, "context_tokens": ["a"]},
    {**SOUND, "n": 0},
    {**SOUND, "n": -1},
    {**SOUND, "n": MAX_CHOICES + 1},
    {**SOUND, "n": "two"},
    {"model": "m", "prompt": 5},
    {"model": "m", "prompt": [1.5]},
    {"model": "m", "prompt": ["a"]},
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: str(body)[:60])
def test_a_malformed_body_is_a_bad_request(body: object) -> None:
    """Whatever is wrong with it, the worker says so and goes on."""
    with pytest.raises(BadRequest, match="malformed worker request"):
        decoded(body)


@given(body=st.binary() | st.dictionaries(st.sampled_from([*SOUND, "prompt", "n", "stop", "tools"]), plain_json))
@example(body={**SOUND, "n": 1})
def test_any_body_is_a_request_or_a_bad_request(body: object) -> None:
    """Nothing else can come of a body."""
    with suppress(BadRequest):
        assert isinstance(decoded(body), GenerateRequest)


def data_of(frame: bytes) -> bytes:
    """The data of one SSE frame, which is a single line."""
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    assert frame.count(b"\n") == 2
    return frame.removeprefix(b"data: ").rstrip()


def close(one: Event, other: Event) -> bool:
    """Whether two events are the same but for what a float loses in milliseconds."""
    if not isinstance(one, Finished) or not isinstance(other, Finished):
        return one == other
    pairs = [(getattr(e.timings, name) for e in (one, other)) for name in ("queue_s", "prefill_s", "decode_s")]
    return all(a == pytest.approx(b) for a, b in pairs) and replace(one, timings=other.timings) == other


@given(event=events, usage=usages)
def test_events_survive_the_way_back(event: Event, usage: Usage) -> None:
    """Each event is one frame, and tells the gateway what the request has cost so far."""
    decoder = EventDecoder()
    [arrived] = decoder.decode(data_of(encode_event(event, usage)))
    assert close(arrived, event)
    assert decoder.usage == (event.usage if isinstance(event, Finished) else usage)


def test_an_unknown_server_without_a_reason_gets_the_first_choices() -> None:
    """llama-server's last chunk has usage and no reason; the choice said why it ended."""
    decoder = EventDecoder()
    [finished] = decoder.decode(b'{"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}], "usage": null}')
    assert finished == ChoiceFinished(FinishReason.LENGTH)
    usage = b'{"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}'
    assert decoder.decode(b'{"choices": [], "usage": ' + usage + b"}") == [
        Finished(FinishReason.LENGTH, Usage(prompt_tokens=3, completion_tokens=2), Timings())
    ]


@given(usage=usages, queue=seconds, prefill=seconds, decode=seconds)
def test_a_cost_survives(usage: Usage, queue: float, prefill: float, decode: float) -> None:
    """The reply to a cancel says what was spent, details included."""
    arrived, timings = decode_cost(encode_cost(usage, Timings(queue_s=queue, prefill_s=prefill, decode_s=decode)))
    assert arrived == usage
    assert (timings.queue_s, timings.prefill_s, timings.decode_s) == pytest.approx((queue, prefill, decode))


@pytest.mark.parametrize(
    "error",
    [
        PromptTooLong(10, 5),
        UnsupportedFeature("no images", param="images"),
        TemplateError("roles must alternate"),
        BadRequest("empty", param="prompt"),
        WorkerCrashed("gone"),
        ServerBusy("later"),
        HeadwaterError("what"),
    ],
    ids=lambda error: error.code,
)
def test_errors_keep_class_words_and_field(error: HeadwaterError) -> None:
    """An error of the worker is raised in the gateway as it was, in a reply and in a stream."""
    data = encode_error(error)
    arrived = decode_error(json.loads(data)["error"])
    assert type(arrived) is type(error)
    assert arrived.message == error.message
    assert getattr(arrived, "param", None) == getattr(error, "param", None)
    with pytest.raises(type(error)):
        EventDecoder().decode(data)


def test_a_long_prompt_keeps_its_numbers() -> None:
    """Dialects write them in their own words."""
    arrived = decode_error(json.loads(encode_error(PromptTooLong(10, 5)))["error"])
    assert isinstance(arrived, PromptTooLong)
    assert (arrived.prompt_tokens, arrived.num_ctx) == (10, 5)


def test_an_error_of_another_server_is_ours_with_its_words() -> None:
    """A code that we do not know is an internal error."""
    arrived = decode_error({"message": "out of memory", "code": 500})
    assert type(arrived) is HeadwaterError
    assert arrived.message == "out of memory"
