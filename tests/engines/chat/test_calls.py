"""Calls found by the tag of a template and the names of tools, however the reply is cut."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.chat.calls import CallFinder
from engines.chat.parser import ReplyFormat, ReplyParser
from engines.events import TextDelta, ThinkingDelta, ToolCallDelta

NAMES = ["get", "get_weather", "add"]
WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
PARIS = ("get_weather", {"city": "Paris"})


def find(tag: str, *chunks: str, names: list[str] = NAMES) -> tuple[str, list[Any]]:
    """The text and the calls of a reply in these chunks."""
    finder = CallFinder(tag, names)
    pieces = [piece for chunk in chunks for piece in finder.decode(chunk)] + finder.flush()
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return text, [piece for piece in pieces if not isinstance(piece, str)]


REPLIES: list[tuple[str, str, tuple[str, list[Any]]]] = [
    ("<call>", f"<call>\n{WEATHER}\n</call>", ("", [PARIS])),
    ("<call>", f"Well. <call>{WEATHER}{WEATHER}</call> done", ("Well. ", [PARIS, PARIS])),
    ("<call>", '<call>get_weather {"city": "Paris"}', ("", [PARIS])),
    ("<call>", '<call>{"name": "add", "parameters": {"a": 1}}', ("", [("add", {"a": 1})])),
    ("<call>", '<call>{"name": "add"}', ("", [("add", {})])),
    ("<call>", '<call>{"name": "add", "arguments": {}}', ("", [("add", {})])),
    ("<call>", '<call>{"name": "add", "arguments": "{\\"a\\": 1}"}', ("", [("add", {"a": 1})])),
    ("<call>", '<call>{"add": {"a": 1}}', ("", [("add", {"a": 1})])),
    ("<call>", '<call>{"tool_calls": [{"name": "add", "arguments": {"a": 1}}]}', ("", [("add", {"a": 1})])),
    ("<call>", '<call>{"name": "add", "arguments": {"s": "}{\\""}}', ("", [("add", {"s": '}{"'})])),
    ("<call>", '<call>{broken} add {"a": 1}', ("", [("add", {"a": 1})])),
    ("<call>", "1 < 2 <cal", ("1 < 2 <cal", [])),
    ("<call>", '<call>{"name": "unknown", "arguments": {}}', ('<call>{"name": "unknown", "arguments": {}}', [])),
    ("<call>", "<call>add", ("<call>add", [])),
    ("<call>", "no call", ("no call", [])),
    ("[CALLS]", f"[CALLS] [{WEATHER}]", ("", [PARIS])),
    ("{", WEATHER, ("", [PARIS])),
    ("{", f" {WEATHER}\n{WEATHER}", (" ", [PARIS, PARIS])),
    ("{", f"Sure: {WEATHER}", (f"Sure: {WEATHER}", [])),
    ("{", '{"answer": 42} and more', ('{"answer": 42} and more', [])),
    ("{", '{"answer": ', ('{"answer": ', [])),
    ("[", f"[{WEATHER}]", ("", [PARIS])),
    ("[", "[1, 2] is a list", ("[1, 2] is a list", [])),
]


@pytest.mark.parametrize(("tag", "reply", "expected"), REPLIES)
def test_calls_are_found_alike_however_the_reply_is_cut(tag: str, reply: str, expected: Any) -> None:
    """Whole, letter by letter, and in two at every place."""
    assert find(tag, reply) == expected
    assert find(tag, *reply) == expected
    for at in range(len(reply)):
        assert find(tag, reply[:at], reply[at:]) == expected, at


def test_a_name_that_may_still_grow_is_waited_for() -> None:
    """`get` may become `get_weather`, and is `get` when the reply ends there."""
    assert find("<call>", '<call>{"city": "x"} ', "get", "_weather ") == ("", [("get_weather", {"city": "x"})])
    assert find("<call>", '<call>{"city": "x"} get') == ("", [("get", {"city": "x"})])


def test_text_is_sent_as_soon_as_it_is_no_tag() -> None:
    """Only what may be the beginning of the tag is held back."""
    finder = CallFinder("<call>", NAMES)
    assert [finder.decode(chunk) for chunk in ("One ", "<", "b>", "<ca", "ll>x")] == [["One "], [], ["<b>"], [], []]
    assert finder.is_calling
    bare = CallFinder("{", NAMES)
    assert [bare.decode(chunk) for chunk in (" ", "a", "{")] == [[" "], ["a"], ["{"]]
    assert not bare.is_calling


@given(st.text('{}[]"\\abgetd_ws:,<call>', max_size=60), st.sampled_from(["<call>", "{", "["]), st.data())
def test_any_reply_is_text_and_calls_however_it_is_cut(reply: str, tag: str, data: st.DataObject) -> None:
    """Where there are no calls, nothing that was said is lost."""
    at = data.draw(st.integers(0, len(reply)))
    whole = find(tag, reply)
    assert find(tag, reply[:at], reply[at:])[1][: len(whole[1])] == whole[1]
    assert whole[1] or whole[0] == reply


def test_a_long_reply_is_read_in_linear_time() -> None:
    """What was looked through is not looked through again for every token."""
    names = [f"tool_{number}" for number in range(100)]
    started = time.monotonic()
    find("<call>", "<call>", *(['{"a": [1, 2, "x'] * 20_000), names=names)
    find("<call>", "<call>", *(['{"a": 1} '] * 20_000), names=names)
    assert time.monotonic() - started < 10


def test_a_reply_has_reasoning_before_its_calls() -> None:
    """The markers are those of the template, and a call inside the reasoning is none."""
    reply_format = ReplyFormat(("<r>", "</r>"), tool_tag="<call>")
    parser = ReplyParser(reply_format, in_thinking=False, tools=NAMES)
    deltas = [delta for letter in f"<r>hm <call>{WEATHER}</r>So: <call>{WEATHER}" for delta in parser.decode(letter)]
    deltas += parser.flush()
    thinking = "".join(delta.text for delta in deltas if isinstance(delta, ThinkingDelta))
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    (call,) = [delta.call for delta in deltas if isinstance(delta, ToolCallDelta)]
    assert (thinking, text, call.name, call.arguments) == (f"hm <call>{WEATHER}", "So: ", *PARIS)
    assert parser.has_calls is True


def test_without_tools_nothing_is_a_call() -> None:
    """Whatever it looks like."""
    parser = ReplyParser(ReplyFormat(tool_tag="{"), in_thinking=False)
    assert parser.decode(WEATHER) + parser.flush() == [TextDelta(WEATHER, 0)]
