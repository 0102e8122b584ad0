from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.chat.jinja import CHATML, ChatTemplate
from engines.errors import TemplateError
from engines.request import Message, Tool, ToolCall
from engines.store.gguf import read_header

USER = Message("user", "Hi")
WEATHER = Tool("get_weather", "Tells the weather", {"type": "object", "properties": {"z": {}, "a": {}}})
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def render(source: str, *messages: Message, **options: Any) -> str:
    """What a template makes of some messages."""
    return ChatTemplate(source).render(messages, **options)


@given(value=json_values)
def test_tojson_is_plain_json(value: Any) -> None:
    """Any value is written as `json.dumps` does it: key order kept, no character escaped."""
    assert render("{{ v | tojson }}", variables={"v": value}) == json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("{'z': 1, 'a': '<b> & \\'é\\''} | tojson", '{"z": 1, "a": "<b> & \'é\'"}'),
        ("{'z': 1, 'a': 2} | tojson(sort_keys=true)", '{"a": 2, "z": 1}'),
        ("[1, 2] | tojson(separators=(',', ':'))", "[1,2]"),
        ("[1] | tojson(indent=2)", "[\n  1\n]"),
        ("'é' | tojson(ensure_ascii=true)", '"\\u00e9"'),
        ("('a', 'b') | tojson", '["a", "b"]'),
        ("['a'] | map('upper') | tojson", '["A"]'),
        ("'{\"a\": [1]}' | from_json", "{'a': [1]}"),
    ],
)
def test_json_filters(expression: str, text: str) -> None:
    """`tojson` takes Hugging Face's arguments and any iterable; `from_json` reads text."""
    assert render("{{ " + expression + " }}") == text


def test_tools_are_undefined_without_tools() -> None:
    """Neither None nor an empty list: both break published templates."""
    source = "{{ tools is defined }} {{ functions is defined }} {{ documents is defined }}"
    assert render(source) == "False False False"
    assert render(source, tools=[WEATHER]) == "True True False"


def test_tools_keep_their_shape_and_key_order() -> None:
    """A tool is OpenAI's object, its schema in the client's order; `functions` is the same as JSON text."""
    expected = [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "Tells the weather",
                "parameters": {"type": "object", "properties": {"z": {}, "a": {}}},
            },
        }
    ]
    assert render("{{ tools | tojson }}", tools=[WEATHER]) == json.dumps(expected)
    assert render("{{ functions }}", tools=[WEATHER]) == json.dumps(expected)


def test_a_template_can_refuse_the_messages_in_its_own_words() -> None:
    """`raise_exception` becomes our error with the template's message."""
    with pytest.raises(TemplateError, match=r"^roles must alternate$") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.status == 400


@pytest.mark.parametrize("source", ["{{ messages[0].nothing.more }}", "{{ 1 / 0 }}", "{{ [] + 1 }}", "{{ nothing() }}"])
def test_a_template_that_breaks_is_a_bad_request(source: str) -> None:
    """Whatever goes wrong inside a template is told as ours."""
    with pytest.raises(TemplateError, match="the chat template failed"):
        render(source, USER)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | no_such_filter }}", "{% endif %}", "{{ 'open"])
def test_a_template_that_does_not_compile_is_refused_at_once(source: str) -> None:
    """A broken template is found when the model is loaded, not at the first request."""
    with pytest.raises(TemplateError, match="does not compile"):
        ChatTemplate(source)


def test_missing_names_are_empty() -> None:
    """Templates test missing keys by truthiness."""
    assert render("[{{ nothing }}{% if messages[0].tool_calls %}x{% endif %}]", USER) == "[]"


def test_generation_tags_render_their_body() -> None:
    """`{% generation %}` marks training targets and changes nothing."""
    source = "{% for m in messages %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endfor %}"
    assert render(source, USER, USER) == "<Hi><Hi>"


def test_loop_controls_work() -> None:
    """`break` and `continue` are part of the dialect."""
    source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}"
    assert render(source + "{{ i }}{% endfor %}") == "023"


def test_blocks_leave_no_blank_lines() -> None:
    """`trim_blocks` and `lstrip_blocks` are on, and a trailing newline of the source is dropped."""
    assert render("  {% if true %}\n{{ bos_token }}a\n  {% endif %}\nb\n") == "a\nb"


def test_nothing_is_escaped() -> None:
    """Prompts are no HTML."""
    assert render("{{ messages[0].content }}", Message("user", "<a href='x'>&</a>")) == "<a href='x'>&</a>"


def test_time_comes_from_the_given_clock() -> None:
    """`strftime_now`, `datetime` and `date_string` agree with the clock."""
    template = ChatTemplate(
        "{{ strftime_now('%Y-%m-%d') }}|{{ datetime }}|{{ date_string }}",
        now=lambda: datetime(2026, 3, 7),  # noqa: DTZ001  # local time, as templates want it
    )
    assert template.render([]) == "2026-03-07|Mar 07 2026|07 Mar 2026"


def test_special_tokens_and_flags_are_told() -> None:
    """BOS and EOS by their text, and whether the prompt ends with the assistant's turn."""
    template = ChatTemplate("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}", bos="<s>", eos="</s>")
    assert template.render([]) == "<s></s>True"
    assert template.render([], add_generation_prompt=False) == "<s></s>False"


def test_variables_reach_the_template_but_cannot_replace_the_messages() -> None:
    """A client's `chat_template_kwargs` add to what we say."""
    variables = {"enable_thinking": True, "messages": []}
    assert render("{{ enable_thinking }}{{ messages | length }}", USER, variables=variables) == "True1"


def test_messages_have_no_missing_content_and_both_names_of_thinking() -> None:
    """Content is always text; reasoning has the two names that templates know."""
    source = "{% for m in messages %}{{ [m.content, m.reasoning_content, m.thinking] | tojson }}{% endfor %}"
    assert render(source, Message("assistant", thinking="why")) == '["", "why", "why"]'


def test_tool_calls_and_results_have_their_ids_and_names() -> None:
    """A call is OpenAI's object with its arguments as one; a result names its call and its tool."""
    call = ToolCall("call_1", "get_weather", {"city": "Paris"})
    source = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
    text = render(
        source,
        Message("assistant", tool_calls=(call,)),
        Message("tool", "rain", tool_name="get_weather", tool_call_id="call_1"),
    )
    made, result = (json.loads(line) for line in text.splitlines())
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert made == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }
    assert result == {
        "role": "tool",
        "content": "rain",
        "name": "get_weather",
        "tool_name": "get_weather",
        "tool_call_id": "call_1",
    }


def test_broken_arguments_are_wrapped() -> None:
    """Templates that want an object get one even where a model once wrote broken JSON."""
    call = ToolCall("call_1", "f", '{"a": ')
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert render(source, Message("assistant", tool_calls=(call,))) == '{"input": "{\\"a\\": "}'


def test_a_template_cannot_change_what_it_was_given() -> None:
    """Templates pop from messages and tools; the next render of the same request must not notice."""
    arguments = {"a": [1]}
    message = Message("assistant", tool_calls=(ToolCall("1", "f", arguments),))
    source = (
        "{% set a = messages[0].tool_calls[0].function.arguments %}{{ a.a.pop() }}"
        "{% set _ = tools[0].function.parameters.pop('type') %}"
    )
    template = ChatTemplate(source)
    assert [template.render([message], tools=[WEATHER]) for _ in range(2)] == ["1", "1"]
    assert arguments == {"a": [1]}


def test_the_fallback_is_chatml() -> None:
    """A model without a template gets plain ChatML."""
    text = render(CHATML, Message("system", "Be kind"), USER)
    assert text == "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def demo() -> ChatTemplate:
    """The demo model's own template."""
    header = read_header(Path(__file__).parents[3] / "engines/store/demo/demo.gguf")
    return ChatTemplate(header.metadata["tokenizer.chat_template"], bos="<|endoftext|>", eos="<|im_end|>")


def test_the_demo_template_closes_thinking_unless_asked(demo: ChatTemplate) -> None:
    """Without `enable_thinking` the prompt holds an empty reasoning block."""
    plain = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert demo.render([USER]) == plain + "<think>\n\n</think>\n\n"
    assert demo.render([USER], variables={"enable_thinking": True}) == plain


def test_the_demo_template_writes_tools_calls_and_results(demo: ChatTemplate) -> None:
    """A whole tool dialogue renders as the model was trained on it."""
    call = ToolCall("1", "get_weather", {"city": "Paris"})
    text = demo.render(
        [USER, Message("assistant", tool_calls=(call,)), Message("tool", "rain", tool_call_id="1")], tools=[WEATHER]
    )
    assert text.startswith("<|im_start|>system\nYou may call these tools with <tool_call>:\n{")
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>' in text
    assert "<|im_start|>tool\n<tool_response>\nrain\n</tool_response><|im_end|>\n" in text
