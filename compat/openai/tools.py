"""`tools` and `tool_choice` to the tools that a model may, or must, call (`spec/openai.md` section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping

from compat.openai.refusals import invalid, missing, unsupported_value
from compat.openai.schema import ChatBody, ToolBody
from engines.request import JSON, Tool


def parse_tools(body: ChatBody) -> tuple[Tool, ...]:
    """The tools that the model may call, by name: of two with one name the last counts. Raises BadRequest."""
    tools: dict[str, Tool] = {}
    for position, tool in enumerate(body.tools or ()):
        if parsed := _tool(tool, f"tools[{position}]"):
            tools[parsed.name] = parsed
    allowed = _allowed(body.tool_choice, tools)
    if must_call(body) and not allowed & tools.keys():
        raise invalid("tool_choice", "there is no such tool to call")
    return tuple(tool for tool in tools.values() if tool.name in allowed)


def must_call(body: ChatBody) -> bool:
    """Whether `tool_choice` leaves the model no other answer than a call."""
    match body.tool_choice:
        case "required" | "any" | {"type": "function"} | {"allowed_tools": {"mode": "required"}}:
            return True
        case _:
            return False


def _tool(tool: ToolBody, path: str) -> Tool | None:
    """The function; None for tools that OpenAI hosts, which clients list without needing them."""
    if tool.type == "custom":
        raise unsupported_value(f"{path}.type", "custom tools are not offered here")
    if tool.type not in (None, "function"):
        return None
    if tool.function is None:
        raise missing(f"{path}.function")
    function = tool.function
    if function.parameters is None:
        return Tool(function.name, function.description or "")
    return Tool(function.name, function.description or "", function.parameters)


def _allowed(choice: str | dict[str, JSON] | None, tools: Mapping[str, Tool]) -> set[str]:
    """The names of the tools that `tool_choice` leaves to the model."""
    match choice:
        case None | "auto" | "required" | "any":
            return set(tools)
        case "none":
            return set()
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required", "tools": [*listed]}}:
            return {name for item in listed if isinstance(name := _function_name(item), str)}
        case {"type": "function"} if isinstance(name := _function_name(choice), str):
            return {name}
        case {"type": "custom"}:
            raise unsupported_value("tool_choice", "custom tools are not offered here")
        case _:
            raise invalid("tool_choice", "expected 'auto', 'none', 'required' or an object that chooses tools")


def _function_name(item: JSON) -> JSON:
    match item:
        case {"function": {"name": name}} | {"name": name}:
            return name
        case _:
            return None
