"""Calls that `tool_choice` forces: the constraint they make, and the call that is read from the answer."""

import json
import re
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import pytest
from openai_fakes import ORIGIN, FakeServices, card, finished, serving

from compat.openai.decode import decode_chat
from compat.openai.forced import read_calls
from compat.openai.parse import parse_chat
from engines.errors import BadRequest
from engines.events import ChoiceFinished, Event, FinishReason, TextDelta, ThinkingDelta, TokenLogprob, ToolCallDelta
from engines.request import GenerateRequest, OutputFormat, Syntax, ToolCall

F = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}
G = {"type": "function", "function": {"name": "g"}}
NAMED = {"type": "function", "function": {"name": "g"}}
CALL = '{"name": "f", "arguments": {"x": 1}}'


def parse(**body: Any) -> GenerateRequest:
    """A chat with both tools, parsed."""
    whole = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [F, G]} | body
    return parse_chat(decode_chat(json.dumps(whole).encode()), card("m"), request_id="req_1", origin=ORIGIN)


def refusal(**body: Any) -> tuple[str | None, str | None]:
    """Path and code of a chat's refusal."""
    with pytest.raises(BadRequest) as caught:
        parse(**body)
    return caught.value.param, caught.value.reason


def schemas(request: GenerateRequest) -> list[Any]:
    """The schema of each call that the request allows."""
    assert request.format is not None
    assert request.format.syntax is Syntax.JSON_SCHEMA
    schema: Any = request.format.schema
    branches: list[Any] = schema["anyOf"]
    return branches


async def read(*events: Event) -> list[Event]:
    """What is made of an answer."""

    async def play(script: Iterable[Event]) -> AsyncIterator[Event]:
        for event in script:
            yield event

    return [event async for event in read_calls(play(events))]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ["f", "g"]),
        ("any", ["f", "g"]),
        (NAMED, ["g"]),
        ({"type": "function", "name": "f"}, ["f"]),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}, ["g"]),
    ],
)
def test_a_forced_choice_leaves_no_other_answer_than_a_call(choice: Any, names: list[str]) -> None:
    """Its tools are those the model is shown, and the only names that the answer may hold."""
    request = parse(tool_choice=choice)
    assert [tool.name for tool in request.tools] == names
    assert [branch["properties"]["name"]["const"] for branch in schemas(request)] == names


def test_arguments_are_objects_of_the_tool_s_schema() -> None:
    """A schema that does not say what it describes describes an object."""
    (branch, _) = schemas(parse(tool_choice="required"))
    assert branch["properties"]["arguments"] == {"type": "object", "properties": {"x": {"type": "integer"}}}
    assert (branch["required"], branch["additionalProperties"]) == (["name", "arguments"], False)


def test_references_follow_their_schema() -> None:
    """`$defs` of each tool are found where that tool's schema is now; a property may be called `$ref`."""
    parameters = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {"P": {"type": "string"}},
        "properties": {"p": {"$ref": "#/$defs/P"}, "again": [{"$ref": "#"}], "$ref": {"const": 1}},
    }
    tool = {"type": "function", "function": {"name": "h", "parameters": parameters}}
    arguments = schemas(parse(tools=[G, tool], tool_choice="required"))[1]["properties"]["arguments"]
    assert arguments["properties"] == {
        "p": {"$ref": "#/anyOf/1/properties/arguments/$defs/P"},
        "again": [{"$ref": "#/anyOf/1/properties/arguments"}],
        "$ref": {"const": 1},
    }
    assert "$schema" not in arguments


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice", "unsupported_value"),
        ({"tool_choice": "required", "guided_regex": "a"}, "guided_regex", "invalid_value"),
    ],
)
def test_what_cannot_be_called_is_refused(body: dict[str, Any], param: str, reason: str) -> None:
    """No tools, an unknown one, or a constraint that leaves no room for a call."""
    assert refusal(**body) == (param, reason)


def test_a_call_wins_over_the_format_of_content() -> None:
    """There is no content that `response_format` could be about."""
    wanted = parse(tool_choice=NAMED, response_format={"type": "json_object"}).format
    assert wanted == parse(tool_choice=NAMED).format != OutputFormat()


async def test_the_answer_is_read_as_a_call() -> None:
    """However it is cut, after its reasoning, with the tokens that were asked for."""
    token = TokenLogprob(1, b"{", -0.5)
    thought = ThinkingDelta("hm")
    events = await read(thought, TextDelta(CALL[:9], 0, (token,)), TextDelta(CALL[9:]), *finished())
    assert events[:2] == [thought, TextDelta("", 0, (token,))]
    _, _, called, choice, last = events
    assert isinstance(called, ToolCallDelta)
    assert re.fullmatch("call_[0-9a-f]{24}", called.call.id)
    assert (called.call.name, called.call.arguments) == ("f", {"x": 1})
    assert choice == ChoiceFinished(FinishReason.TOOL_CALLS)
    assert last == finished()[-1]


async def test_choices_are_told_apart() -> None:
    """Their pieces may come in any order."""
    events = await read(TextDelta(CALL[:5], 1), TextDelta(CALL, 0), TextDelta(CALL[5:], 1), *finished(num_choices=2))
    assert [event.index for event in events if isinstance(event, ToolCallDelta)] == [0, 1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"name": "f", "arguments": {"x": "a', ("f", '{"x": "a')),
        ('{"name": "f", "argu', '{"name": "f", "argu'),
        ('{"name": "f"', ("f", "")),
        ("", None),
    ],
)
async def test_a_call_that_the_limit_cut_short(text: str, shown: Any) -> None:
    """What there is of it is shown, as a call once its name is whole, and the reason stays the limit."""
    *deltas, choice, _ = await read(TextDelta(text), *finished(FinishReason.LENGTH))
    match deltas:
        case [ToolCallDelta(call)]:
            assert (call.name, call.arguments) == shown
        case [TextDelta(content)]:
            assert content == shown
        case _:
            assert shown is None
    assert choice == ChoiceFinished(FinishReason.LENGTH)


async def test_a_call_that_the_engine_found_passes() -> None:
    """Some templates' calls are just such an object, and then there is no text."""
    call = ToolCallDelta(ToolCall("call_1", "f", {}))
    assert await read(call, *finished(FinishReason.TOOL_CALLS)) == [call, *finished(FinishReason.TOOL_CALLS)]


@pytest.mark.parametrize("stream", [False, True])
async def test_clients_see_a_call_and_no_content(stream: bool) -> None:
    """Whole and streamed."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [F], "tool_choice": "required"}
    services = FakeServices([TextDelta(CALL), *finished()], cards=[card("m")])
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post("/v1/chat/completions", json=body | {"stream": stream})
    if stream:
        _, shown, last = (json.loads(line[6:])["choices"][0] for line in response.text.split("\n\n")[:-2])
        assert shown["delta"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x":1}'}
        assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")
    else:
        (choice,) = response.json()["choices"]
        assert choice["message"]["content"] is None
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x":1}'}
        assert choice["finish_reason"] == "tool_calls"
