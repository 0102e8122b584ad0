"""What Ollama gives to a Go template: messages and tools as its structs (`spec/ollama.md` section 8.2). Pure.

Names and types are those of Ollama's template package, because its errors name them. The surprise: numbers out of JSON
are floats to Go, unless one is too large for that to be exact, which stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from engines.chat.gotemplate.values import Map, PropertyType, Slice, Struct, StructType, Value
from engines.request import JSON, Message, Tool, ToolCall


def _plain(name: str, *fields: str) -> StructType:
    return StructType(name, tuple((field, field, False) for field in fields))


MESSAGE = _plain(
    "*template.templateMessage", "Role", "Content", "Thinking", "Images", "ToolCalls", "ToolName", "ToolCallID"
)
TOOL_CALL = _plain("template.templateToolCall", "ID", "Function")
CALLED = _plain("template.templateToolCallFunction", "Index", "Name", "Arguments")
TOOL = StructType(
    "template.templateTool",
    (("Type", "type", False), ("Items", "items", True), ("Function", "function", False)),
    prints_json=True,
)
FUNCTION = StructType(
    "template.templateToolFunction",
    (("Name", "name", False), ("Description", "description", False), ("Parameters", "parameters", False)),
    prints_json=True,  # Go's own form would be of no use to a model; templates that print it were written for this
)
PARAMETERS = StructType(
    "template.templateToolFunctionParameters",
    (
        *(("Type", "type", False), ("Defs", "$defs", True), ("Items", "items", True)),
        *(("Required", "required", True), ("Properties", "properties", False)),
    ),
    prints_json=True,  # as above
)
PROPERTY = StructType(
    "api.ToolProperty",
    (
        *(("AnyOf", "anyOf", True), ("Type", "type", True), ("Items", "items", True)),
        *(("Description", "description", True), ("Enum", "enum", True)),
        *(("Properties", "properties", True), ("Required", "required", True)),
    ),
)


class Arguments(Map):
    """A call's arguments."""

    type = "template.templateArgs"


class Properties(Map):
    """A tool's parameters by name."""

    type = "template.templateProperties"


class NestedProperties(Map):
    """The fields of a parameter that is an object, which keep their order."""

    type = "*api.ToolPropertiesMap"
    keeps_order = True


def collate(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """The system text, and the messages with neighbours of one role made one, unless they are tools' results."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    collated: list[Message] = []
    texts: list[list[str]] = []
    for message in messages:
        if collated and collated[-1].role == message.role != "tool":
            texts[-1].append(message.content)
        else:
            collated.append(message)
            texts.append([message.content])
    return system, [
        replace(message, content="\n\n".join(parts)) for message, parts in zip(collated, texts, strict=True)
    ]


def tag_images(messages: Sequence[Message]) -> list[Message]:
    """Each image as `[img-0]`, `[img-1]`, ...: where its message says `[img]`, else before the text (section 8.5)."""
    tagged: list[Message] = []
    number = 0
    for message in messages:
        content, before = message.content, ""
        for _ in message.images:
            tag = f"[img-{number}]"
            number += 1
            if "[img]" in content:
                content = content.replace("[img]", tag, 1)
            else:
                before += tag
        tagged.append(replace(message, content=before + content) if message.images else message)
    return tagged


def message_values(messages: Sequence[Message]) -> Slice:
    """`.Messages`."""
    return Slice([_message(message) for message in messages], "[]*template.templateMessage")


def tool_values(tools: Sequence[Tool]) -> Slice:
    """`.Tools`."""
    return Slice([_tool(tool) for tool in tools], "template.templateTools", prints_json=True)


def _message(message: Message) -> Struct:
    calls = [_call(index, call) for index, call in enumerate(message.tool_calls)]
    return Struct(
        MESSAGE,
        {
            "Role": message.role,
            "Content": message.content,
            "Thinking": message.thinking,
            "Images": Slice(list(message.images), "[]api.ImageData"),
            "ToolCalls": Slice(calls, "[]template.templateToolCall"),
            "ToolName": message.tool_name,
            "ToolCallID": message.tool_call_id,
        },
    )


def _call(index: int, call: ToolCall) -> Struct:
    arguments = call.arguments if isinstance(call.arguments, dict) else {"input": call.arguments}
    values = Arguments({name: from_json(value) for name, value in arguments.items()})
    return Struct(TOOL_CALL, {"ID": call.id, "Function": Struct(CALLED, _called(index, call.name, values))})


def _called(index: int, name: str, arguments: Arguments) -> dict[str, Value]:
    return {"Index": index, "Name": name, "Arguments": arguments}


def _tool(tool: Tool) -> Struct:
    function = {"Name": tool.name, "Description": tool.description, "Parameters": _parameters(tool.parameters)}
    return Struct(TOOL, {"Type": "function", "Items": None, "Function": Struct(FUNCTION, function)})


def _parameters(schema: Mapping[str, JSON]) -> Struct:
    properties = Properties(_properties(schema))
    properties.zero = _property({})
    return Struct(
        PARAMETERS,
        {
            "Type": schema.get("type") if isinstance(schema.get("type"), str) else "",
            "Defs": from_json(schema.get("$defs")),
            "Items": from_json(schema.get("items")),
            "Required": _strings(schema.get("required")),
            "Properties": properties,
        },
    )


def _properties(schema: Mapping[str, JSON]) -> dict[str, Value]:
    found = schema.get("properties")
    return {name: _property(each) for name, each in found.items()} if isinstance(found, dict) else {}


def _property(schema: JSON) -> Struct:
    """A parameter, with those of JSON Schema's keywords that Ollama knows."""
    schema = schema if isinstance(schema, dict) else {}
    kinds, any_of, enum = (schema.get(name) for name in ("type", "anyOf", "enum"))
    return Struct(
        PROPERTY,
        {
            "AnyOf": Slice([_property(each) for each in _list(any_of)], "[]api.ToolProperty"),
            "Type": PropertyType([kinds] if isinstance(kinds, str) else list(_strings(kinds))),
            "Items": from_json(schema.get("items")),
            "Description": str(schema.get("description") or ""),
            "Enum": from_json(_list(enum)),
            "Properties": NestedProperties(_properties(schema)),
            "Required": _strings(schema.get("required")),
        },
    )


def _list(value: JSON) -> list[JSON]:
    return value if isinstance(value, list) else []


def _strings(value: JSON) -> Slice:
    return Slice([item for item in _list(value) if isinstance(item, str)], "[]string")


def from_json(value: JSON) -> Value:
    """A value out of JSON as Go has it."""
    match value:
        case dict():
            return {name: from_json(item) for name, item in value.items()}
        case list():
            return Slice([from_json(item) for item in value])
        case bool():
            return value
        case int() if abs(value) <= 2**53:
            return float(value)
    return value
