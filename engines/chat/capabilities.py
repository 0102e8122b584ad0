"""What a model can do, worked out from its files (`spec/ollama.md` sections 8.1 and 9).

Go templates are parsed for what they mention, Jinja templates searched for the words that give a capability away: one
that mentions tools in any branch counts as able. Its surprise: a model may bring two templates, and only the one in use
counts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache

from engines.chat.gotemplate.template import GoTemplate
from engines.errors import TemplateError
from engines.request import JSON

ORDER = ("completion", "tools", "insert", "vision", "embedding", "rerank", "thinking")
"""All capabilities that we know, in the order in which they are told. Ollama has no word for `rerank`."""

_JINJA_CALLS = ("tool_calls", "assistant_tool_call")
_JINJA_RESULTS = re.compile(
    r"""tool_response|tool_results|ipython|role["']\] == ["']tool["']|message\.role == ["']tool["']"""
)
_GO_RESULTS = ('eq .Role "tool"', "tool_response", "TOOL_RESULTS")
_SPLITS_THINKING = re.compile(r"""split\(\s*["']</think>""")
_INFILL_TOKENS = (("fim_pre", "prefix"), ("fim_suf", "suffix"), ("fim_mid", "middle"))  # new and old names
_THINKING_ARCHITECTURES = ("gptoss", "gpt-oss")  # harmony: thinking has a channel of its own, not tags


def detect_capabilities(
    metadata: Mapping[str, JSON],
    *,
    go_template: str,
    chat_template: str,
    has_projector: bool,
    is_reranker: bool = False,
    declared: Collection[str] = (),
) -> tuple[str, ...]:
    """The capabilities of a model in the order of `ORDER`.

    `metadata` is the weights' GGUF header, `go_template` the Go template in use, `chat_template` the GGUF's Jinja
    template, which counts where no other is in use, and `declared` what the model's config claims. A reranker pools
    into one score and makes no vectors.
    """
    architecture = metadata.get("general.architecture")
    is_embedding = f"{architecture}.pooling_type" in metadata
    found = {"rerank" if is_reranker else "embedding" if is_embedding else "completion", *declared}
    if has_projector or f"{architecture}.vision.block_count" in metadata:
        found.add("vision")
    found |= _go_capabilities(go_template) if go_template else _jinja_capabilities(chat_template)
    if "completion" in found and _has_infill_tokens(metadata):
        found.add("insert")
    if architecture in _THINKING_ARCHITECTURES:
        found.add("thinking")
    return tuple(capability for capability in ORDER if capability in found)


def prefers_chat_template(
    template: str, chat_template: str, *, renderer: str = "", go_templates: bool | None = None
) -> bool:
    """Whether the GGUF's Jinja template is used rather than the model's Go template (section 8.1).

    It is where it is the only one, and where it offers more, unless only the Go template takes calls and results. With
    as much on both sides, tools among it, it is where it alone takes them. Of a model that is made for a `renderer` of
    Ollama's own, the Go template says nothing, and the other is nearest to what is meant.

    Args:
        template: the Go template, empty without one.
        chat_template: the Jinja template, empty without one.
        renderer: the one that the model's config names.
        go_templates: what the operator says of all models; None leaves it to the templates.
    """
    if not template or not chat_template:
        return not template
    if go_templates is not None or renderer:
        return not go_templates
    go, jinja = _go_capabilities(template), _jinja_capabilities(chat_template)
    if len(jinja) > len(go):
        return not _go_returns_tools(template) or _jinja_returns_tools(chat_template)
    if go == jinja and "tools" in go:
        return _jinja_returns_tools(chat_template) and not _go_returns_tools(template)
    return False


def _has_infill_tokens(metadata: Mapping[str, JSON]) -> bool:
    """Whether the vocabulary says how a gap is filled; Ollama asks its Go templates alone."""
    return all(any(f"tokenizer.ggml.{name}_token_id" in metadata for name in names) for names in _INFILL_TOKENS)


def _jinja_capabilities(template: str) -> set[str]:
    found = set()
    if "tools" in template or "tool_call" in template:
        found.add("tools")
    if "</think>" in template and (
        "<think>" in template or (_SPLITS_THINKING.search(template) and "reasoning_content" not in template)
    ):
        found.add("thinking")
    return found


def _jinja_returns_tools(template: str) -> bool:
    """Whether calls and their results both have a place in it."""
    return any(word in template for word in _JINJA_CALLS) and _JINJA_RESULTS.search(template) is not None


@lru_cache(maxsize=256)
def _parse(template: str) -> GoTemplate | None:
    """The template; None when it is none."""
    try:
        return GoTemplate(template)
    except TemplateError:
        return None


def _go_capabilities(template: str) -> set[str]:
    parsed = _parse(template)
    if parsed is None:
        return set()
    words = {"tools": "tools", "suffix": "insert"}
    found = {capability for field, capability in words.items() if field in parsed.identifiers}
    return found | ({"thinking"} if parsed.thinking else set())


def _go_returns_tools(template: str) -> bool:
    """As `_jinja_returns_tools`."""
    parsed = _parse(template)
    if parsed is None or not {"tools", "toolcalls"} <= parsed.identifiers:
        return False
    return any(word in template for word in _GO_RESULTS)
