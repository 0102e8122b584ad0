import json
from typing import Any

import pytest
from openai_fakes import card, finished, says

from compat.openai.errors import render_error
from compat.openai.logprobs import EchoDelta
from compat.openai.render import ChatChunks, CompletionChunks, Reply, render_chat, render_completion, render_model
from compat.services import Answer
from engines.errors import (
    AccessDenied,
    BadRequest,
    BodyTooLarge,
    Cancelled,
    GGUFParseError,
    HeadwaterError,
    InvalidModelName,
    ModelLoadFailed,
    ModelNotFound,
    ModelNotLoaded,
    PromptTooLong,
    ServerBusy,
    TemplateError,
    UnsupportedCapability,
    UnsupportedFeature,
    WorkerCrashed,
    WrongModel,
)
from engines.events import Event, FinishReason, TextDelta, ThinkingDelta, TokenLogprob, ToolCallDelta
from engines.request import ToolCall

REPLY = Reply("chatcmpl-1", 7, "m", "fp_1a2b3c4d")
CALLS: list[Event] = [ToolCallDelta(ToolCall("c1", "f", {"a": 1})), ToolCallDelta(ToolCall("c2", "g", {}))]


def collected(events: list[Event], num_choices: int = 1) -> Answer:
    """The whole answer of these events."""
    answer = Answer(num_choices)
    for event in events:
        answer.add(event)
    return answer


def chunks(kind: type[ChatChunks] | type[CompletionChunks], events: list[Event], **reply: Any) -> list[Any]:
    """The chunks of these events, decoded."""
    stream = kind(Reply("chatcmpl-1", 7, "m", "fp_1a2b3c4d", **reply))
    rendered = [*stream.opening(), *(stream.render(event) for event in events)]
    return [json.loads(chunk) for chunk in rendered if chunk is not None]


def test_a_whole_chat_reply_byte_for_byte() -> None:
    """Key order and null fields are those of the specification; absent things are absent."""
    assert render_chat(REPLY, collected(says("Hel", "lo"))) == (
        b'{"id":"chatcmpl-1","object":"chat.completion","created":7,"model":"m","system_fingerprint":"fp_1a2b3c4d",'
        b'"choices":[{"index":0,"message":{"role":"assistant","content":"Hello","refusal":null,"annotations":[]},'
        b'"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9,'
        b'"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}}}'
    )


def test_a_whole_reply_with_reasoning_and_calls() -> None:
    """Reasoning is there twice, content is null beside calls, and arguments are JSON text without an index."""
    events = [ThinkingDelta("hm"), *CALLS, *finished(FinishReason.TOOL_CALLS)]
    (choice,) = json.loads(render_chat(REPLY, collected(events)))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "reasoning_content": "hm",
        "reasoning": "hm",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
            {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def test_an_empty_answer_has_empty_content() -> None:
    """Never null without calls."""
    (choice,) = json.loads(render_chat(REPLY, collected(finished())))["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")


def test_broken_arguments_stay_as_the_model_wrote_them() -> None:
    """A call cut short by the token limit is still shown; no arguments at all are an empty object."""
    events: list[Event] = [
        ToolCallDelta(ToolCall("c1", "f", '{"a": ')),
        ToolCallDelta(ToolCall("c2", "f", "")),
        *finished(FinishReason.LENGTH),
    ]
    (choice,) = json.loads(render_chat(REPLY, collected(events)))["choices"]
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"a": ', "{}"]
    assert choice["finish_reason"] == "length"


def test_numbers_that_json_lacks_never_appear() -> None:
    """NaN and infinity in a model's arguments become null."""
    event = ToolCallDelta(ToolCall("c1", "f", {"a": float("nan"), "b": float("-inf")}))
    (choice,) = json.loads(render_chat(REPLY, collected([event, *finished()])))["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a":null,"b":null}'


def test_a_streamed_chunk_byte_for_byte() -> None:
    """Key order and null fields are those of the specification; `usage` is absent unless asked for."""
    head = (
        b'{"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m",'
        b'"system_fingerprint":"fp_1a2b3c4d","choices":[{"index":0,"delta":'
    )
    stream = ChatChunks(REPLY)
    assert list(stream.opening()) == [
        head + b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}'
    ]
    assert stream.render(TextDelta("Hi")) == head + b'{"content":"Hi"},"logprobs":null,"finish_reason":null}]}'


def test_a_stream_s_deltas_hold_one_kind_of_thing_each() -> None:
    """Role, reasoning, content, calls numbered from zero, and an empty delta with the reason."""
    events = [ThinkingDelta("hm"), TextDelta(""), TextDelta("ok"), *CALLS, *finished(FinishReason.TOOL_CALLS)]
    choices = [chunk["choices"][0] for chunk in chunks(ChatChunks, events)]
    f, g = ({"name": "f", "arguments": '{"a":1}'}, {"name": "g", "arguments": "{}"})
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm", "reasoning": "hm"},
        {"content": "ok"},
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": f}]},
        {"tool_calls": [{"index": 1, "id": "c2", "type": "function", "function": g}]},
        {},
    ]  # fmt: skip
    assert [choice["finish_reason"] for choice in choices] == [None] * 5 + ["tool_calls"]


@pytest.mark.parametrize("kind", [ChatChunks, CompletionChunks])
def test_usage_comes_last_and_only_on_request(kind: type[ChatChunks] | type[CompletionChunks]) -> None:
    """With `include_usage` every other chunk has a null usage; without it there is no such key."""
    plain = chunks(kind, says("Hi"))
    assert all("usage" not in chunk for chunk in plain)
    *others, last = chunks(kind, says("Hi"), include_usage=True)
    assert [chunk["usage"] for chunk in others] == [None] * len(plain)
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 8)


def test_every_choice_begins_in_order_and_counts_its_own_calls() -> None:
    """All roles come first, 0, 1, 2, because clients index choices by their first appearance."""
    events: list[Event] = [
        ToolCallDelta(ToolCall("c", "f", {}), index=2),
        ToolCallDelta(ToolCall("d", "f", {}), index=1),
    ]
    choices = [chunk["choices"][0] for chunk in chunks(ChatChunks, events, num_choices=3)]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 2, 1]
    assert [choice["delta"]["tool_calls"][0]["index"] for choice in choices[3:]] == [0, 0]


def test_without_parallel_calls_only_the_first_is_shown() -> None:
    """`parallel_tool_calls: false` promises at most one, streamed or not."""
    streamed = [chunk["choices"][0]["delta"] for chunk in chunks(ChatChunks, CALLS, parallel_tool_calls=False)]
    assert len([delta for delta in streamed if "tool_calls" in delta]) == 1
    reply = Reply("chatcmpl-1", 7, "m", "fp_1a2b3c4d", parallel_tool_calls=False)
    (choice,) = json.loads(render_chat(reply, collected([*CALLS, *finished()])))["choices"]
    assert [call["id"] for call in choice["message"]["tool_calls"]] == ["c1"]


def test_a_completion_whole_and_streamed() -> None:
    """Text and index on every choice; the last chunk of a choice has empty text and the reason."""
    whole = json.loads(render_completion(REPLY, collected(says("a", "b"))))
    assert whole["object"] == "text_completion"
    assert whole["choices"] == [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"}]
    streamed = chunks(CompletionChunks, says("a", "b"))
    assert {chunk["object"] for chunk in streamed} == {"text_completion"}
    assert [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in streamed] == [
        ("a", None),
        ("b", None),
        ("", "stop"),
    ]


def token(data: bytes, logprob: float) -> TokenLogprob:
    """A token and its one alternative, itself."""
    return TokenLogprob(1, data, logprob, (TokenLogprob(1, data, logprob),))


WITH_LOGPROBS: list[Event] = [
    ThinkingDelta("hm", 0, (token(b"hm", -3.0),)),
    TextDelta("", 0, (token(b"\xc3", -0.5),)),
    TextDelta("\u00e9!", 0, (token(b"\xa9", -0.25), token(b"!", -1.0))),
    TextDelta("", 0, (token(b"", -0.125),)),
    *finished(),
]


def test_a_chat_s_tokens_are_those_of_its_content() -> None:
    """Each chunk has its own delta's; what shows no text travels with what does, or with the end."""
    reply = Reply("chatcmpl-1", 7, "m", "fp_1a2b3c4d", logprobs=1)
    (choice,) = json.loads(render_chat(reply, collected(WITH_LOGPROBS)))["choices"]
    entries = choice["logprobs"]["content"]
    assert [(entry["bytes"], entry["logprob"]) for entry in entries] == [
        ([0xC3], -0.5),
        ([0xA9], -0.25),
        ([33], -1.0),
        ([], -0.125),
    ]
    streamed = [chunk["choices"][0] for chunk in chunks(ChatChunks, WITH_LOGPROBS, logprobs=1)]
    assert [choice["delta"].get("content") for choice in streamed] == ["", None, "\u00e9!", None]
    assert [choice["logprobs"] and choice["logprobs"]["content"] for choice in streamed] == [
        None,
        None,
        entries[:3],
        entries[3:],
    ]


def test_tokens_that_nobody_asked_for_are_not_shown() -> None:
    """They may be there for another reason."""
    (choice,) = json.loads(render_chat(REPLY, collected(WITH_LOGPROBS)))["choices"]
    assert choice["logprobs"] is None
    for kind in (ChatChunks, CompletionChunks):
        assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks(kind, WITH_LOGPROBS))


def test_a_completion_s_prompt_is_part_of_its_text() -> None:
    """Whole and streamed, in the same arrays and with offsets that go on."""
    events: list[Event] = [
        EchoDelta("Hey", 0, (token(b"Hey", 0.0),)),
        TextDelta("", 0, (token(b" ", -0.5),)),
        TextDelta(" a", 0, (token(b"a", -0.25),)),
        TextDelta("b", 0, (token(b"b", -1.0),)),
        *finished(),
    ]
    reply = Reply("cmpl-1", 7, "m", "fp_1a2b3c4d", logprobs=0)
    (whole,) = json.loads(render_completion(reply, collected(events)))["choices"]
    assert whole["text"] == "Hey ab"
    assert whole["logprobs"] == {
        "tokens": ["Hey", " ", "a", "b"],
        "token_logprobs": [None, -0.5, -0.25, -1.0],
        "top_logprobs": [None, {" ": -0.5}, {"a": -0.25}, {"b": -1.0}],
        "text_offset": [0, 3, 4, 5],
    }
    streamed = [chunk["choices"][0] for chunk in chunks(CompletionChunks, events, logprobs=0)]
    assert [choice["text"] for choice in streamed] == ["Hey", " a", "b", ""]
    for name, values in whole["logprobs"].items():
        assert [value for choice in streamed[:3] for value in choice["logprobs"][name]] == values
    assert streamed[3]["logprobs"] is None


def test_the_likeliest_of_each_prompt_s_answers_are_kept() -> None:
    """Best first, numbered prompt by prompt; every token that was generated is charged."""
    events: list[Event] = [
        TextDelta(text, index, (token(text.encode(), logprob),))
        for index, (text, logprob) in enumerate([("a", -2.0), ("b", -1.0), ("c", -3.0), ("d", -1.0), ("e", -2.0)])
    ]
    reply = Reply("cmpl-1", 7, "m", "fp_1a2b3c4d", num_choices=6, best_of=3, num_kept=2)
    answer = collected([*events, *finished(num_choices=6, completion_tokens=6)], 6)
    whole = json.loads(render_completion(reply, answer))
    assert [(choice["index"], choice["text"]) for choice in whole["choices"]] == [
        (0, "b"),
        (1, "a"),
        (2, "d"),
        (3, "e"),
    ]
    assert {choice["logprobs"] for choice in whole["choices"]} == {None}
    assert whole["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(("truncated", "extra"), [(0, {}), (3, {"truncated_tokens": 3})])
def test_a_prompt_that_was_cut_says_so(truncated: int, extra: dict[str, int]) -> None:
    """In the usage, and only then."""
    whole = json.loads(render_chat(REPLY, collected(finished(prompt_tokens=5, truncated_tokens=truncated))))
    assert {name: whole["usage"][name] for name in extra} == extra
    assert ("truncated_tokens" in whole["usage"]) is bool(extra)


def test_a_model_shows_its_context_twice() -> None:
    """Clients read one or the other key."""
    body = render_model(card("hf.co/a/b:Q4_K_M", "tools", namespace="a"), "as-asked")
    assert (body.id, body.created, body.owned_by) == ("as-asked", 1757141666, "a")
    assert (body.context_length, body.max_model_len, body.capabilities) == (4096, 4096, ("completion", "tools"))


INVALID, SERVER = "invalid_request_error", "server_error"


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (BadRequest("x"), 400, INVALID, None, None),
        (BadRequest("x", param="n", reason="invalid_type"), 400, INVALID, "n", "invalid_type"),
        (UnsupportedFeature("x", param="n", reason="unsupported_value"), 400, INVALID, "n", "unsupported_value"),
        (UnsupportedCapability("m", "vision"), 400, INVALID, "model", "unsupported_model"),
        (InvalidModelName("::"), 400, INVALID, "model", "invalid_value"),
        (TemplateError("x"), 400, INVALID, "prompt", "invalid_value"),
        (PromptTooLong(99, 10), 400, INVALID, "prompt", "context_length_exceeded"),
        (AccessDenied("x"), 403, "permission_error", None, "insufficient_permissions"),
        (ModelNotFound("m"), 404, "not_found_error", "model", "model_not_found"),
        (BodyTooLarge(5), 413, INVALID, None, "request_too_large"),
        (Cancelled(), 499, INVALID, None, "cancelled"),
        (ModelLoadFailed("x"), 500, SERVER, "model", "model_load_failed"),
        (GGUFParseError("x", 3), 500, SERVER, "model", "model_load_failed"),
        (WorkerCrashed("x"), 500, SERVER, None, "internal_error"),
        (WrongModel("a", "b"), 500, SERVER, None, "internal_error"),
        (ModelNotLoaded(), 500, SERVER, None, "internal_error"),
        (HeadwaterError("x"), 500, SERVER, None, "internal_error"),
        (ServerBusy("x"), 503, SERVER, None, "server_overloaded"),
        (ZeroDivisionError("secret"), 500, SERVER, None, "internal_error"),
    ],
)  # fmt: skip
def test_every_error_has_its_row(error: Exception, status: int, kind: str, param: str | None, code: str | None) -> None:
    """Status, type, param and code of the error table; all four keys are always there."""
    reply = render_error(error, "prompt")
    detail = json.loads(reply.body)["error"]
    assert reply.status == status
    assert (detail["type"], detail["param"], detail["code"]) == (kind, param, code)
    assert "secret" not in detail["message"]


def test_an_overflow_says_the_phrase_and_the_numbers() -> None:
    """Coding clients compact their conversation when they recognise this."""
    detail = json.loads(render_error(PromptTooLong(99, 10)).body)["error"]
    assert (
        "This model's maximum context length is 10 tokens. However, your messages resulted in 99" in detail["message"]
    )
    assert (detail["n_prompt_tokens"], detail["n_ctx"], detail["param"]) == (99, 10, "messages")


def test_an_unknown_model_is_named_in_openai_s_words() -> None:
    """Clients match on the phrase."""
    detail = json.loads(render_error(ModelNotFound("gpt-9")).body)["error"]
    assert detail["message"] == "The model `gpt-9` does not exist or you do not have access to it."


@pytest.mark.parametrize(("retry_after_s", "header"), [(0, "1"), (5, "5"), (600, "60")])
def test_a_busy_server_says_when_to_come_back(retry_after_s: int, header: str) -> None:
    """Between one second and what both official clients still honour."""
    assert render_error(ServerBusy("x", retry_after_s)).headers == {"Retry-After": header}


def test_a_load_that_will_fail_again_is_not_retried() -> None:
    """Each failed request would otherwise cost three loads."""
    assert render_error(ModelLoadFailed("x")).headers == {"x-should-retry": "false"}
    assert render_error(WorkerCrashed("x")).headers == {}
