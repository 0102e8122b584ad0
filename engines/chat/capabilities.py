"""What a model can do, worked out from its files (`spec/ollama.md` sections 8.1 and 9).

Templates are searched for the words that give a capability away, not parsed: a template that mentions tools in any
branch counts as able. Its surprise: a model may bring two templates, and only the one in use counts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from engines.request import JSON

ORDER = ("completion", "tools", "insert", "vision", "embedding", "rerank", "thinking")
"""All capabilities that we know, in the order in which they are told. Ollama has no word for `rerank`."""

_GO_FIELD = re.compile(r"\.(\w+)")
_GO_TOOL_ROLE = re.compile(r"""["`]tool["`]""")
_JINJA_TOOL_ROLE = re.compile(r"""["']tool["']""")
_SPLITS_THINKING = re.compile(r"""split\(\s*["']</think>""")
_THINKING_ARCHITECTURES = ("gptoss", "gpt-oss")  # harmony: thinking has a channel of its own, not tags


def detect_capabilities(
    metadata: Mapping[str, JSON],
    *,
    template: str,
    chat_template: str,
    has_projector: bool,
    is_reranker: bool = False,
    declared: Collection[str] = (),
) -> tuple[str, ...]:
    """The capabilities of a model in the order of `ORDER`.

    `metadata` is the weights' GGUF header, `template` the Go template (empty without one), `chat_template` the GGUF's
    Jinja template, and `declared` what the model's config claims. A reranker pools into one score and makes no vectors.
    """
    architecture = metadata.get("general.architecture")
    is_embedding = f"{architecture}.pooling_type" in metadata
    found = {"rerank" if is_reranker else "embedding" if is_embedding else "completion", *declared}
    if has_projector or f"{architecture}.vision.block_count" in metadata:
        found.add("vision")
    if prefers_chat_template(template, chat_template):
        found |= _jinja_capabilities(chat_template)
    else:
        found |= _go_capabilities(template)
    if architecture in _THINKING_ARCHITECTURES:
        found.add("thinking")
    return tuple(capability for capability in ORDER if capability in found)


def prefers_chat_template(template: str, chat_template: str) -> bool:
    """Whether the GGUF's Jinja template is used rather than the model's Go template.

    It is where it is the only one, where it can do strictly more, and where both can do the same, tools among it, but
    it alone knows what to do with a tool's result.
    """
    if not template or not chat_template:
        return not template
    go, jinja = _go_capabilities(template), _jinja_capabilities(chat_template)
    if go == jinja and "tools" in go:
        return bool(_JINJA_TOOL_ROLE.search(chat_template)) and not _takes_tool_results(template)
    return jinja > go


def _jinja_capabilities(template: str) -> set[str]:
    found = set()
    if "tools" in template or "tool_call" in template:
        found.add("tools")
    if "</think>" in template and (
        "<think>" in template or (_SPLITS_THINKING.search(template) and "reasoning_content" not in template)
    ):
        found.add("thinking")
    return found


def _go_capabilities(template: str) -> set[str]:
    fields = {field.lower() for action in _go_actions(template) for field in _GO_FIELD.findall(action)}
    words = {"tools": "tools", "suffix": "insert", "thinking": "thinking"}
    return {capability for field, capability in words.items() if field in fields}


def _takes_tool_results(template: str) -> bool:
    return any(_GO_TOOL_ROLE.search(action) for action in _go_actions(template))


def _go_actions(template: str) -> list[str]:
    """What stands between `{{` and `}}`, comments left out."""
    actions = (piece.partition("}}")[0] for piece in template.split("{{")[1:])
    return [action for action in actions if not action.lstrip("- ").startswith("/*")]
