"""`tools` to the tools that a model may call (`spec/ollama.md` section 5.2)."""

from __future__ import annotations

import msgspec

from compat.ollama.schema import ToolBody
from engines.request import JSON, Tool


def parse_tool(body: ToolBody) -> Tool:
    """The tool, with as much of its JSON Schema as Ollama keeps, in the order in which Ollama writes it."""
    function = body.function
    return Tool(function.name, function.description, _parameters(function.parameters))


def _parameters(body: msgspec.Struct) -> dict[str, JSON]:
    """Type and properties are always there."""
    parameters: dict[str, JSON] = {"type": "object"} | msgspec.to_builtins(body)
    parameters.setdefault("properties", {})
    return parameters
