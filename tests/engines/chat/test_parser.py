from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.chat.parser import THINK, ReplyFormat, ReplyParser, new_call_id
from engines.events import Delta, TextDelta, ThinkingDelta, ToolCallDelta

BOTH = ReplyFormat(THINK, has_tagged_calls=True)
NEITHER = ReplyFormat()
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'

Reading = tuple[str, str, list[tuple[str, Any]]]
"""Thinking, text, and the calls by name and arguments."""


def gathered(deltas: list[Delta]) -> Reading:
    """What a reply comes to."""
    thinking = "".join(delta.text for delta in deltas if isinstance(delta, ThinkingDelta))
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    calls = [(delta.call.name, delta.call.arguments) for delta in deltas if isinstance(delta, ToolCallDelta)]
    return thinking, text, calls


def read(
    *chunks: str, reply_format: ReplyFormat = BOTH, in_thinking: bool = False, with_tools: bool = True
) -> list[Delta]:
    """All deltas of a reply that arrives in these chunks."""
    parser = ReplyParser(reply_format, in_thinking=in_thinking, tools=["add"] if with_tools else [])
    deltas = [delta for chunk in chunks for delta in parser.decode(chunk)]
    return deltas + parser.flush()


REPLIES: list[tuple[str, bool, Reading]] = [
    ("Hello", False, ("", "Hello", [])),
    ("  Hello  \n", False, ("", "  Hello  \n", [])),
    ("", False, ("", "", [])),
    ("<think>\nwhy\n</think>\n\nso", False, ("why", "so", [])),
    ("\n <think>why</think>so", False, ("why", "so", [])),
    ("<think></think>so", False, ("", "so", [])),
    ("<think>never closed ", False, ("never closed", "", [])),
    ("so <think>not first</think>", False, ("", "so <think>not first</think>", [])),
    ("<thing>", False, ("", "<thing>", [])),
    ("<thi", False, ("", "<thi", [])),
    ("why\n</think>\n\nso", True, ("why", "so", [])),
    ("\n why </thin k> </think>so", True, ("why </thin k>", "so", [])),
    ("</think>", True, ("", "", [])),
    (CALL, False, ("", "", [("add", {"a": 1})])),
    (f"Let me see. \n{CALL}\n", False, ("", "Let me see.", [("add", {"a": 1})])),
    (f"{CALL}\n{CALL} done", False, ("", "done", [("add", {"a": 1}), ("add", {"a": 1})])),
    (f"<think>\nhm\n</think>\n\n{CALL}", False, ("hm", "", [("add", {"a": 1})])),
    (f"<think>{CALL}</think>so", False, (CALL, "so", [])),
    ('<tool_call>{"name": "f"}', False, ("", "", [("f", {})])),
    ('<tool_call>{"name": "f", "parameters": {}}</tool_call>', False, ("", "", [("f", {})])),
    ("1 < 2 <tool", False, ("", "1 < 2 <tool", [])),
]


@pytest.mark.parametrize(("reply", "in_thinking", "reading"), REPLIES, ids=[repr(reply[0]) for reply in REPLIES])
def test_replies_are_split_alike_however_they_are_cut(reply: str, in_thinking: bool, reading: Reading) -> None:
    """Whole, letter by letter, and cut in two at every place: thinking, text and calls are the same."""
    assert gathered(read(reply, in_thinking=in_thinking)) == reading
    assert gathered(read(*reply, in_thinking=in_thinking)) == reading
    for at in range(len(reply)):
        assert gathered(read(reply[:at], reply[at:], in_thinking=in_thinking)) == reading, at


BROKEN_CALLS = [
    '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>',
    "<tool_call>\n not JSON \n</tool_call>",
    "<tool_call>[1]</tool_call>",
    '<tool_call>{"name": 5}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "text"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>',
    "<tool_call>" + '{"a":' * 5000 + "</tool_call>",
    "<tool_call></tool_call>",
    '<tool_call>\n{"name": "add", "argu',
    "<tool_call>",
]


@pytest.mark.parametrize("broken", BROKEN_CALLS, ids=[call[:40] for call in BROKEN_CALLS])
def test_a_broken_call_is_shown_as_the_text_it_is(broken: str) -> None:
    """Nothing the model said is lost, white space around the call included."""
    reply = f"Well,  \n{broken}"
    assert gathered(read(reply)) == ("", reply, [])
    assert gathered(read(*reply)) == ("", reply, [])


def test_text_after_a_broken_call_is_whole() -> None:
    """A broken call does not swallow the white space that follows it, and a good one may still come."""
    assert gathered(read(f"<tool_call>x</tool_call>\n\nthen {CALL}")) == (
        "",
        "<tool_call>x</tool_call>\n\nthen",
        [("add", {"a": 1})],
    )


def test_text_is_sent_as_soon_as_it_cannot_be_a_marker() -> None:
    """Only a possible beginning of a marker, and white space before it, is held back."""
    parser = ReplyParser(BOTH, in_thinking=False, tools=["add"])
    sent = [gathered(parser.decode(chunk))[1] for chunk in ("One", " two ", "<", "b", "> <tool", "_call", "!")]
    assert sent == ["One", " two", "", " <b", ">", "", " <tool_call!"]


def test_thinking_is_known_while_it_lasts() -> None:
    """`is_thinking` tells what arriving text is, so that its tokens can be counted."""
    parser = ReplyParser(BOTH, in_thinking=False)
    states = []
    for chunk in ("<think>", "why", "</think>", "so"):
        parser.decode(chunk)
        states.append(parser.is_thinking)
    assert states == [True, True, False, False]


def test_calls_are_looked_for_only_when_tools_were_offered() -> None:
    """Without tools the markers are text, exactly."""
    assert gathered(read(f"{CALL} ", with_tools=False)) == ("", f"{CALL} ", [])


def test_a_model_without_markers_is_never_interpreted() -> None:
    """A template that knows neither convention leaves replies alone."""
    reply = f"<think>x</think>{CALL} "
    assert gathered(read(reply, reply_format=NEITHER)) == ("", reply, [])


def test_deltas_belong_to_their_choice() -> None:
    """The choice's index is on every delta."""
    parser = ReplyParser(BOTH, in_thinking=False, tools=["add"], index=3)
    deltas = [*parser.decode(f"<think>a</think>b{CALL}"), *parser.flush()]
    assert [delta.index for delta in deltas] == [3, 3, 3]
    assert parser.has_calls is True


def test_call_ids_are_unique_and_look_like_openais() -> None:
    """`call_` and 24 letters or digits."""
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(call_id.startswith("call_") and len(call_id) == 29 and call_id[5:].isalnum() for call_id in ids)


MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL]
PIECES = ["<", ">", "/", "tool", "_call>", " ", "\n", "a", "é", '{"name": "f", "arguments": {}}', "{", '"']
words = st.sampled_from([*MARKERS, *PIECES])


@given(
    reply=st.lists(words, max_size=12).map("".join),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    thinks=st.booleans(),
    calls_tools=st.booleans(),
    in_thinking=st.booleans(),
)
def test_chunking_never_changes_the_reading(
    reply: str, cuts: list[int], thinks: bool, calls_tools: bool, in_thinking: bool
) -> None:
    """Any reply, cut anywhere, reads as it does in one piece."""
    bounds = [0, *sorted(min(cut, len(reply)) for cut in cuts), len(reply)]
    chunks = [reply[start:end] for start, end in pairwise(bounds)]
    options: dict[str, Any] = {
        "reply_format": ReplyFormat(THINK if thinks else None, calls_tools),
        "in_thinking": in_thinking and thinks,
    }
    assert gathered(read(*chunks, **options)) == gathered(read(reply, **options))


@given(reply=st.lists(words, max_size=12).map("".join))
def test_nothing_but_white_space_and_markers_is_lost(reply: str) -> None:
    """Every other character of a reply shows up in thinking, text or a call."""
    thinking, text, calls = gathered(read(reply))
    kept = thinking + text + "".join(json.dumps({"name": name, "arguments": args}) for name, args in calls)

    def essence(whole: str) -> list[str]:
        for marker in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
            whole = whole.replace(marker, "")
        return sorted("".join(whole.split()))

    assert essence(kept) == essence(reply)


@pytest.mark.parametrize(
    ("template", "thinks", "calls_tools"),
    [
        ("<think>{{ x }}</think>", True, False),
        ("<think>", False, False),
        ("<tool_call>", False, True),
        ("<tool_call><function=", False, False),
        ("", False, False),
    ],
)
def test_the_format_is_read_from_the_template(template: str, thinks: bool, calls_tools: bool) -> None:
    """Markers that stand in a template are used by its model; Qwen3-Coder's calls are another convention."""
    assert ReplyFormat.of(template) == ReplyFormat(THINK if thinks else None, calls_tools)


@pytest.mark.parametrize(
    ("prompt", "starts"),
    [("a<think>\n", True), ("a<think>\n\n</think>\n\n", False), ("</think>x<think>", True), ("a", False)],
)
def test_an_open_block_at_the_end_of_the_prompt_starts_in_thinking(prompt: str, starts: bool) -> None:
    """The last marker decides."""
    assert BOTH.starts_in_thinking(prompt) is starts
    assert not NEITHER.starts_in_thinking(prompt)
