"""Go templates against what Go and Ollama themselves made of them, recorded once."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from engines.chat.gotemplate.data import from_json
from engines.chat.gotemplate.executor import execute
from engines.chat.gotemplate.functions import NAMES
from engines.chat.gotemplate.parser import parse
from engines.chat.gotemplate.template import DEFAULT, GoTemplate
from engines.chat.parser import ReplyFormat
from engines.errors import GoTemplateError
from engines.request import Message, Tool, ToolCall

RECORDED = json.loads((Path(__file__).parents[2] / "recorded/gotemplate.json").read_text())
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def run(template: str, data: dict[str, Any]) -> tuple[str, str]:
    """Output and error of a template over plain data."""
    try:
        trees = parse(template, NAMES)
        plain = {name: from_json(value) for name, value in data.items()}
        return execute(trees, plain, source=template, now=lambda: NOW), ""
    except GoTemplateError as error:
        return "", error.message


def message(plain: dict[str, Any]) -> Message:
    """A message as Ollama's clients write it."""
    calls = [ToolCall(call["id"], **call["function"]) for call in plain.get("tool_calls", ())]
    return Message(**{**plain, "tool_calls": tuple(calls)})


CHATS = [[message(each) for each in chat] for chat in RECORDED["messages"]]
TOOLS = [
    Tool(tool["function"]["name"], tool["function"].get("description", ""), tool["function"]["parameters"])
    for tool in RECORDED["tools"]
]


@pytest.mark.parametrize(("template", "output", "error"), RECORDED["plain"])
def test_every_construct_does_what_it_does_in_go(template: str, output: str, error: str) -> None:
    """Output and error texts, to the letter."""
    assert run(template, RECORDED["data"]) == (output, error)


@pytest.mark.parametrize(("name", "chat", "with_tools", "think", "output", "error"), RECORDED["chats"])
def test_chats_are_rendered_as_ollama_renders_them(
    name: str, chat: Any, with_tools: int, think: Any, output: str, error: str
) -> None:
    """Old templates and new ones, with every kind of message, tools, reasoning and gaps."""
    template = GoTemplate(RECORDED["templates"][name])

    def rendered() -> str:
        if chat == "infill":
            return template.render_infill("def f():", "return 1", think=think)
        return template.render_chat(CHATS[chat], tools=TOOLS if with_tools else [], think=think).text

    if error:
        with pytest.raises(GoTemplateError) as failed:
            rendered()
        assert failed.value.message == error
    else:
        assert rendered() == output


@pytest.mark.parametrize(("name", "markers"), RECORDED["tags"].items())
def test_markers_are_found_where_ollama_finds_them(name: str, markers: list[str]) -> None:
    """What opens and closes reasoning, and what comes before a call."""
    opening, closing, tag = markers
    thinking = (opening, closing) if opening and closing else None
    assert GoTemplate(RECORDED["templates"][name]).reply_format(think=True) == ReplyFormat(thinking, tool_tag=tag)


def render(template: str, *messages: Message, **options: Any) -> str:
    """The text of a chat."""
    return GoTemplate(template, now=lambda: NOW).render_chat(messages, **options).text


USER = Message("user", "Hi")


def test_a_tool_s_function_prints_as_json() -> None:
    """Where Go's own form would be of no use; published templates count on it."""
    tool = Tool("f", "d", {"type": "object", "properties": {"b": {"type": "string"}, "a": {}}, "required": ["b"]})
    parameters = '{"type":"object","required":["b"],"properties":{"a":{},"b":{"type":"string"}}}'
    function = f'{{"name":"f","description":"d","parameters":{parameters}}}'
    template = "{{ range .Tools }}{{ .Function }}|{{ .Function.Parameters }}{{ end }}{{ if .Messages }}{{ end }}"
    assert render(template, USER, tools=[tool]) == f"{function}|{parameters}"


def test_models_that_show_reasoning_think_unless_told_otherwise() -> None:
    """What is not said is yes to a template with markers for it, and nothing to others."""
    shown = "{{ .Think }} {{ .ThinkLevel }} {{ .IsThinkSet }}"
    thinking = "{{ range .Messages }}{{ if .Thinking }}<r>{{ .Thinking }}</r>{{ end }}{{ end }}" + shown
    assert render(thinking, USER) == "true medium true"
    assert render(thinking, USER, think=False) == "false  true"
    assert render(thinking, USER, think="low") == "true low true"
    assert render("{{ range .Messages }}{{ end }}" + shown, USER) == "false  false"


def test_reasoning_is_looked_for_where_it_may_be() -> None:
    """A prompt that ends in the opening marker leaves it open; without thinking nothing is looked for."""
    template = GoTemplate("{{ range .Messages }}{{ if .Thinking }}<r>{{ .Thinking }}</r>{{ end }}{{ end }}<r>\n")
    assert template.render_chat([USER]).in_thinking
    assert not template.render_chat([USER], think=False).in_thinking
    assert template.reply_format(think=False) == ReplyFormat(None, tool_tag="{")
    assert template.reply_format(think=None) == ReplyFormat(("<r>", "</r>"), tool_tag="{")


def test_images_are_named_in_order() -> None:
    """Where the message says so, else before its text."""
    pictures = (Message("user", "a [img] b", images=(b"1", b"2")), Message("assistant", "ok"), USER)
    several = [*pictures, Message("user", "[img][img]", images=(b"3",))]
    template = "{{ range .Messages }}{{ .Content }}/{{ len .Images }};{{ end }}"
    assert render(template, *several) == "[img-1]a [img-0] b/2;ok/0;Hi\n\n[img-2][img]/0;"


def test_dates_come_from_the_clock() -> None:
    """Whatever format is asked for."""
    assert render('{{ currentDate }} {{ yesterdayDate "x" }}{{ .Response }}', USER) == "2026-03-01 2026-02-28"


def test_large_numbers_stay_exact() -> None:
    """Go would make a float of an account number."""
    call = ToolCall("", "f", {"n": 12345678901234567890, "m": 1000000})
    template = "{{ range .Messages }}{{ range .ToolCalls }}{{ .Function.Arguments }}{{ end }}{{ end }}"
    assert render(template, Message("assistant", tool_calls=(call,))) == '{"m":1000000,"n":12345678901234567890}'


def test_broken_arguments_are_given_as_text() -> None:
    """A call whose arguments were no JSON still has an object."""
    call = ToolCall("", "f", "{broken")
    template = "{{ range .Messages }}{{ range .ToolCalls }}{{ .Function.Arguments }}{{ end }}{{ end }}"
    assert render(template, Message("assistant", tool_calls=(call,))) == '{"input":"{broken"}'


def test_the_default_template_is_the_prompt() -> None:
    """Without the system text, and going on after an answer."""
    assert render(DEFAULT, Message("system", "S"), USER) == "Hi"
    assert render(DEFAULT, USER, Message("assistant", "Hel")) == "HiHel"


def test_a_response_behind_an_else_is_where_the_prompt_ends() -> None:
    """Ollama falls over an else that comes after the response it cuts at."""
    assert render("{{ if .Prompt }}{{ .Prompt }} {{ .Response }}{{ else }}x{{ end }}y", USER) == "Hi "


def test_bytes_that_are_no_text_become_the_replacement_character() -> None:
    """Half a character is all that slicing may leave."""
    assert run('{{ slice "é" 0 1 }}{{ "\\xff" }}', {}) == ("\ufffd\ufffd", "")
