import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.chat.capabilities import ORDER, detect_capabilities, prefers_chat_template
from engines.store.gguf import read_header

LLAMA = {"general.architecture": "llama"}
DEMO = Path(__file__).parents[3] / "engines/store/demo/demo.gguf"
GO_CHAT = "{{ range .Messages }}{{ .Content }}{{ end }}"
GO_TOOLS = "{{ if .Tools }}{{ .Tools }}{{ end }}{{ range .Messages }}{{ .Content }}{{ end }}"
GO_TOOLS_AND_RESULTS = GO_TOOLS + '{{ .ToolCalls }}{{ if eq .Role "tool" }}{{ .Content }}{{ end }}'
JINJA_TOOLS = "{% if tools %}{{ tools }}{% endif %}"
JINJA_TOOLS_AND_RESULTS = JINJA_TOOLS + "{% if message.role == 'tool' %}x{% endif %}tool_calls"
JINJA_THINKING = JINJA_TOOLS + "<think></think>"


def detect(
    metadata: dict[str, Any] = LLAMA,
    template: str = "",
    chat_template: str = "",
    *,
    has_projector: bool = False,
    declared: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """`detect_capabilities` with everything optional."""
    return detect_capabilities(
        metadata, go_template=template, chat_template=chat_template, has_projector=has_projector, declared=declared
    )


def test_the_demo_can_think_and_call_tools() -> None:
    """Its Jinja template says so."""
    metadata = read_header(DEMO).metadata
    assert detect(dict(metadata), chat_template=metadata["tokenizer.chat_template"]) == (
        *("completion", "tools", "insert", "thinking"),
    )


def test_a_reranker_gives_scores_and_no_vectors() -> None:
    """It pools, but into one number, so it is of no use for embedding."""
    metadata = {"general.architecture": "bert", "bert.pooling_type": 4}
    found = detect_capabilities(metadata, go_template="", chat_template="", has_projector=False, is_reranker=True)
    assert found == ("rerank",)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, ("completion",)),
        (LLAMA, ("completion",)),
        ({"general.architecture": "bert", "bert.pooling_type": 0}, ("embedding",)),
        (LLAMA | {"bert.pooling_type": 1}, ("completion",)),
        (LLAMA | {"llama.vision.block_count": 24}, ("completion", "vision")),
        ({"general.architecture": "gptoss"}, ("completion", "thinking")),
        ({"general.architecture": ["odd"]}, ("completion",)),
    ],
)
def test_weights_tell_what_they_are_for(metadata: dict[str, Any], expected: tuple[str, ...]) -> None:
    """Pooling makes an embedding model, vision layers make it see, and one family always thinks."""
    assert detect(metadata) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("fim_pre", "fim_suf", "fim_mid"), ("completion", "insert")),
        (("prefix", "suffix", "middle"), ("completion", "insert")),
        (("fim_pre", "fim_suf"), ("completion",)),
    ],
)
def test_a_vocabulary_may_know_how_to_fill_a_gap(names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    """It takes all three tokens, under their names of today or of old."""
    assert detect(LLAMA | {f"tokenizer.ggml.{name}_token_id": 1 for name in names}) == expected


def test_a_projector_gives_sight() -> None:
    """Whatever the metadata say."""
    assert detect(has_projector=True) == ("completion", "vision")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (GO_CHAT, ()),
        (GO_TOOLS, ("tools",)),
        ("{{- if $.Tools -}}x{{ end }}", ("tools",)),
        ("{{ .Prefix }}{{ .Suffix }}", ("insert",)),
        ("{{ range .Messages }}<think>{{ .Thinking }}</think>{{ end }}", ("thinking",)),
        ("{{ .ToolCalls }}", ()),
        ("Use .Tools and .Suffix", ()),
        ("{{/* .Tools */}}{{- /* .Suffix */ -}}", ()),
        ("{{ .Tools", ()),
        ("{{ .Thinking }}", ()),
        ("{{ range .Messages }}{{ .Thinking }}</think>{{ end }}", ()),
        ("{{ range .Messages }}{{ range .ToolCalls }}<think>{{ .Thinking }}</think>{{ end }}{{ end }}", ()),
    ],
)
def test_go_templates_tell_by_the_fields_they_use(template: str, expected: tuple[str, ...]) -> None:
    """Fields count inside actions, not in text, comments or as part of longer names."""
    assert detect(template=template) == ("completion", *expected)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", ()),
        ("{% for tool in tools %}", ("tools",)),
        ("<tool_call>", ("tools",)),
        ("<think>\n</think>", ("thinking",)),
        ("{{ content.split('</think>')[-1] }}", ("thinking",)),
        ('{{ content.split("</think>")|last }}{{ message.reasoning_content }}', ()),
        ("<think>", ()),
    ],
)
def test_jinja_templates_tell_by_their_text(template: str, expected: tuple[str, ...]) -> None:
    """Tools by their names, thinking by both of its tags or by splitting at the closing one."""
    assert detect(chat_template=template) == ("completion", *expected)


@pytest.mark.parametrize(
    ("template", "chat_template", "jinja"),
    [
        ("", "", True),
        ("", JINJA_TOOLS, True),
        (GO_CHAT, "", False),
        (GO_CHAT, "{{ messages }}", False),
        (GO_CHAT, JINJA_TOOLS, True),
        (GO_TOOLS, JINJA_THINKING, True),
        (GO_TOOLS, JINJA_TOOLS, False),
        (GO_TOOLS, JINJA_TOOLS_AND_RESULTS, True),
        (GO_TOOLS_AND_RESULTS, JINJA_TOOLS_AND_RESULTS, False),
        (GO_TOOLS_AND_RESULTS, JINJA_THINKING, False),
        (GO_TOOLS_AND_RESULTS, JINJA_TOOLS_AND_RESULTS + "<think></think>", True),
        ("{{ .Suffix }}", JINJA_TOOLS, False),
    ],
)
def test_the_abler_template_is_used(template: str, chat_template: str, jinja: bool) -> None:
    """The model's own Go template stays unless the Jinja one can do all of it and more."""
    assert prefers_chat_template(template, chat_template) is jinja


def test_only_the_template_in_use_counts() -> None:
    """What the other one could do is of no use to a client."""
    assert detect(template="{{ .Suffix }}", chat_template=JINJA_TOOLS) == ("completion", "insert")
    assert detect(chat_template=JINJA_THINKING) == ("completion", "tools", "thinking")


def test_who_says_so_decides_before_the_templates_do() -> None:
    """The operator, and a model made for a renderer; but a template that is missing cannot be used."""
    assert prefers_chat_template(GO_TOOLS, JINJA_THINKING, go_templates=True) is False
    assert prefers_chat_template(GO_TOOLS, "{{ messages }}", go_templates=False) is True
    assert prefers_chat_template(GO_TOOLS, "{{ messages }}", renderer="qwen3.5") is True
    assert prefers_chat_template(GO_TOOLS, "", renderer="qwen3.5", go_templates=False) is False
    assert prefers_chat_template("", JINJA_TOOLS, go_templates=True) is True


def test_what_the_config_declares_is_believed_if_it_is_known() -> None:
    """Unknown words are dropped, known ones are put in order."""
    declared = ("thinking", "vision", "flying", "tools")
    assert detect(declared=declared) == ("completion", "tools", "vision", "thinking")


@given(st.text(), st.text())
def test_any_templates_give_known_capabilities_in_order(template: str, chat_template: str) -> None:
    """No text makes the scan fail or the order change."""
    found = detect(template=template, chat_template=chat_template)
    assert found == tuple(capability for capability in ORDER if capability in found)


@pytest.mark.parametrize("piece", ["{{", "{{.", "{{/*", "split(", "split( ", "</think>", '"tool', "."])
def test_hostile_templates_take_linear_time(piece: str) -> None:
    """A megabyte of any beginning is scanned at once."""
    text = piece * ((1 << 20) // len(piece))
    start = time.perf_counter()
    detect(template=text, chat_template=text + "</think>tools")
    detect(chat_template=text + "</think>")
    assert time.perf_counter() - start < 5


def test_blank_space_does_not_slow_the_scan() -> None:
    """An endless gap after `split(` is read once."""
    start = time.perf_counter()
    detect(chat_template="split(" + " " * (1 << 20) + "</think>")
    assert time.perf_counter() - start < 5
