"""Calls that the client forces with `tool_choice` (`spec/openai.md` section 4.3). Pure.

How a model writes calls differs by its template, and some templates know none. So the answer as a whole is constrained
to one JSON object, a tool's name and its arguments, which is read as the call here. The surprise: the model is never
made to call twice, which `required` leaves open.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace

import msgspec

from compat.openai.refusals import invalid
from engines.events import ChoiceFinished, Event, FinishReason, TextDelta, ToolCallDelta
from engines.request import JSON, OutputFormat, Tool, ToolCall

_ELSEWHERE = {"$schema", "$id"}
"""Keywords that make a schema a document of its own, which it no longer is inside another."""

_ARGUMENTS = ', "arguments": '


def one_call(tools: Sequence[Tool]) -> OutputFormat:
    """The constraint to one call of one of the tools. Raises BadRequest."""
    try:
        return OutputFormat({"anyOf": [_call(tool, f"#/anyOf/{position}") for position, tool in enumerate(tools)]})
    except RecursionError:
        raise invalid("tools", "nested too deeply") from None


def _call(tool: Tool, path: str) -> JSON:
    """The schema of one tool's call; `path` is where it is."""
    parameters = {key: value for key, value in tool.parameters.items() if key not in _ELSEWHERE}
    arguments = _moved({"type": "object"} | parameters, f"{path}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: JSON, path: str) -> JSON:
    """The schema with its references into itself leading to `path`, where it is now."""
    if isinstance(schema, list):
        return [_moved(item, path) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: path + value[1:]
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/"))
        else _moved(value, path)
        for key, value in schema.items()
    }


async def read_calls(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """The events of answers that `one_call` constrained, with a call instead of its text."""
    pieces: defaultdict[int, list[str]] = defaultdict(list)
    async for event in events:
        match event:
            case TextDelta(text, index, logprobs):
                pieces[index].append(text)
                if logprobs:
                    yield replace(event, text="")
            case ChoiceFinished(_, index):
                for read in _read("".join(pieces[index]), event):
                    yield read
            case _:
                yield event


def _read(text: str, finished: ChoiceFinished) -> Iterator[Event]:
    """A choice's call, and its end. Of a call that the limit cut short the arguments are what there is of them."""
    call = _parse(text)
    if call is not None:
        yield ToolCallDelta(call, finished.index)
    elif text:
        yield TextDelta(text, finished.index)
    is_call = call is not None and finished.reason is FinishReason.STOP
    yield replace(finished, reason=FinishReason.TOOL_CALLS) if is_call else finished


def _parse(text: str) -> ToolCall | None:
    """The call that a text is, or begins with; None where not even the name is whole."""
    head, _, rest = text.partition(_ARGUMENTS)
    try:
        name = msgspec.json.decode(head + "}", type=dict[str, str])["name"]
    except (msgspec.DecodeError, KeyError):
        return None
    try:
        arguments: dict[str, JSON] | str = msgspec.json.decode(text, type=dict[str, JSON])["arguments"]
    except (msgspec.DecodeError, KeyError, RecursionError):
        arguments = rest
    return ToolCall(f"call_{secrets.token_hex(12)}", name, arguments)
