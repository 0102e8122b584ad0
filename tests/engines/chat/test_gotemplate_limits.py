"""Go templates are untrusted code: rendering any of them ends soon, and in nothing but a text or an error."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.chat.gotemplate.template import GoTemplate
from engines.chat.meter import MAX_OUTPUT_CHARS, MAX_SOURCE_CHARS
from engines.errors import TemplateError
from engines.request import Message, Tool, ToolCall

CHAT = [
    Message("system", "S"),
    Message("user", "Hé 'there' <b>"),
    Message("assistant", "A", thinking="hm", tool_calls=(ToolCall("c", "f", {"a": [1, {"b": None}]}),)),
    Message("tool", "1", tool_name="f", images=(b"\x00\xff",)),
]
TOOLS = [Tool("f", "d", {"type": "object", "properties": {"a": {"type": ["string", "null"], "enum": [1, "x"]}}})]

DOUBLING = '{{ $x := "12345678" }}' + "{{ range 60 }}{{ $x = print $x $x }}{{ end }}"
HOSTILE = {
    "a long loop": "{{ range 1000000000000 }}{{ end }}",
    "loops in loops": "{{ range 99999 }}{{ range 99999 }}{{ range 99999 }}{{ end }}{{ end }}{{ end }}",
    "a loop that writes": "{{ range 999999999 }}xxxxxxxxxxxxxxxx{{ end }}",
    "a loop that writes much": "{{ range 9999 }}" + "x" * 99999 + "{{ end }}",
    "a loop over a loop's work": "{{ range 999999999 }}{{ json $ }}{{ end }}",
    "doubling": DOUBLING,
    "doubling by printf": DOUBLING.replace("print $x $x", 'printf "%s%s" $x $x'),
    "doubling by quoting": DOUBLING.replace("print $x $x", 'printf "%q" $x'),
    "doubling by js": '{{ $x := "\\\\" }}{{ range 60 }}{{ $x = js $x }}{{ end }}',
    "doubling by urlquery": '{{ $x := "%" }}{{ range 60 }}{{ $x = urlquery $x $x }}{{ end }}',
    "doubling by json": '{{ $x := "\\"" }}{{ range 60 }}{{ $x = json $x }}{{ end }}',
    "a wide number": '{{ range 99 }}{{ printf "%999999d" 1 }}{{ end }}',
    "a precise number": '{{ range 99 }}{{ printf "%.999999f" 1.5 }}{{ end }}',
    "a width that is computed": '{{ range 99 }}{{ printf "%*d" 1000000 1 }}{{ end }}',
    "many wide numbers": '{{ printf "' + "%999999d" * 9999 + '" }}{{ range 99 }}{{ printf "%999999d" 1 }}{{ end }}',
    "a template that calls itself": '{{ define "x" }}{{ template "x" . }}{{ end }}{{ template "x" . }}',
    "two that call each other twice": '{{ define "a" }}{{ template "b" . }}{{ template "b" . }}{{ end }}'
    '{{ define "b" }}{{ template "a" . }}{{ template "a" . }}{{ end }}{{ template "a" . }}',
    "nested blocks": "{{ if true }}" * 5000 + "{{ end }}" * 5000,
    "nested parentheses": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
    "nested else": "{{ if .A }}" + "{{ else }}{{ if .A }}" * 5000 + "{{ end }}" * 5001,
    "unknown function": "{{ open }}",
    "a method": "{{ .__class__ }}{{ range .Messages }}{{ .__init__ }}{{ end }}",
    "too large": "x" * (MAX_SOURCE_CHARS + 1),
    "one open brace more": "{{" * 50000,
    "strings without end": '{{ "' * 50000,
    "comments without end": "{{/*" * 50000,
    "digits": "{{ " + "1" * 200000 + " }}",
    "an exponent": "{{ 1e999999999 }}",
    "underscores": "{{ " + "1_" * 100000 + " }}",
}


def render(source: str) -> str:
    """A chat through the template."""
    return GoTemplate(source).render_chat(CHAT, tools=TOOLS, think=True).text


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_go_templates_are_refused_quickly(source: str) -> None:
    """A template that would hang, fill the memory or fall through the stack is an error within seconds."""
    started = time.monotonic()
    with pytest.raises(TemplateError):
        render(source)
    assert time.monotonic() - started < 8


@pytest.mark.parametrize(
    "source",
    [
        "{{ if .A }}" + "{{ else if .A }}" * 200 + "{{ else }}x{{ end }}",
        "{{ if .A }}" * 50 + "x" + "{{ end }}" * 50 + "{{ .Messages }}",
        "{{ range .Messages }}" + "{{ .Content }}" * 10000 + "{{ end }}",
        "{{ " + "(" * 50 + "1" + ")" * 50 + " }}",
        "{{ $x := slice .Messages 1 }}" * 2000 + "{{ len $x }}",
        "a" * MAX_SOURCE_CHARS,
    ],
)
def test_large_but_honest_templates_are_rendered(source: str) -> None:
    """Chains of `else if`, long lists and some depth."""
    assert len(render(source)) <= MAX_OUTPUT_CHARS


PIECES = st.sampled_from(
    [
        *(
            "{{",
            "}}",
            "{{-",
            "-}}",
            "{{ ",
            " }}",
            "{{- ",
            " -}}",
            "{{/*",
            "*/}}",
            "(",
            ")",
            "|",
            ",",
            ":=",
            "=",
            " ",
            "\n",
        ),
        *(".", "$", "$x", "$i, $x", "$.", ".Messages", ".Content", ".Role", ".ToolCalls", ".Function", ".Arguments"),
        *(".Tools", ".Response", ".Prompt", ".Images", ".Type", ".Nope", "nil", "true", "1", "-1", "1.5", "1i", "'a'"),
        *('"a"', '"%d%v%q"', "`b`", '"', "'", "`", "0x", "1e9", "é", "\ud800", "\x00", "%"),
        *("if", "else", "else if", "end", "range", "with", "define", "template", "block", "break", "continue"),
        *(
            "and",
            "or",
            "not",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "len",
            "index",
            "slice",
            "print",
            "printf",
            "println",
        ),
        *("html", "js", "urlquery", "call", "json", "currentDate", "toTypeScriptType"),
        *(
            "{{ end }}",
            "{{ else }}",
            "{{ range .Messages }}",
            "{{ range 3 }}",
            "{{ with . }}",
            "{{ if . }}",
            "{{ $x := . }}",
        ),
    ]
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow], deadline=10_000)
@given(st.lists(PIECES, max_size=30).map("".join))
def test_any_pieces_end_in_a_text_or_an_error(source: str) -> None:
    """Nothing else ever leaves a template."""
    with suppress(TemplateError):
        render(source).encode()


EXPRESSIONS = st.recursive(
    st.sampled_from(
        [
            *(
                ".",
                "$",
                ".Messages",
                ".System",
                ".Tools",
                "nil",
                "true",
                "0",
                "1",
                "7",
                "2.5",
                "1i",
                '"x"',
                '"%s %5.1f"',
            ),
            *("(index .Messages 1)", "(index .Messages 2).ToolCalls", "(index .Messages 3).Images", "$.Nope"),
            *("(index .Tools 0).Function.Parameters.Properties", '"é"', "(index (index .Messages 2).ToolCalls 0)"),
        ]
    ),
    lambda inner: st.builds(
        lambda function, args: f"({function} {' '.join(args)})",
        st.sampled_from(
            [
                *("and", "or", "not", "eq", "ne", "lt", "gt", "len", "index", "slice", "print", "printf", "println"),
                *("html", "js", "urlquery", "json", "toTypeScriptType", "call"),
            ]
        ),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow], deadline=10_000)
@given(
    EXPRESSIONS, st.sampled_from(["{{ %s }}", "{{ range %s }}{{ . }}{{ end }}", "{{ with $x := %s }}{{ $x }}{{ end }}"])
)
def test_any_expression_ends_in_a_text_or_an_error(expression: str, around: str) -> None:
    """Every function with every kind of value."""
    with suppress(TemplateError):
        render(around.replace("%s", expression)).encode()
