"""Chat messages in OpenAI's many spellings to plain `Message`s (`spec/openai.md` section 4.2).

Keeps the number and order of messages; merging and prefilling are decided by the chat template's side of the house.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from compat.openai.images import decode_image
from compat.openai.refusals import invalid, invalid_type, missing, unsupported_value
from compat.openai.schema import ContentPart, FunctionCall, MessageBody, ToolCallBody
from engines.errors import UnsupportedCapability
from engines.model import ModelCard
from engines.request import JSON, Message, ToolCall

T = TypeVar("T")

_ROLES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def parse_messages(bodies: list[MessageBody], card: ModelCard) -> tuple[Message, ...]:
    """The messages in order.

    Raises:
        BadRequest: a message is malformed; `param` is its path.
        UnsupportedCapability: there is an image and the model has no eyes.
    """
    messages: list[Message] = []
    names: dict[str, str] = {}  # of functions by call id: a tool's answer carries only the id
    for number, body in enumerate(bodies):
        message = _message(body, f"messages[{number}]", names)
        if message.images and "vision" not in card.capabilities:
            raise UnsupportedCapability(card.name, "vision")
        names.update((call.id, call.name) for call in message.tool_calls)
        messages.append(message)
    return tuple(messages)


def _message(body: MessageBody, path: str, names: dict[str, str]) -> Message:
    content, images = _content(body, path)
    if body.role == "assistant":
        return Message(
            role="assistant",
            content=content,
            thinking=body.reasoning_content or body.reasoning or body.thinking or "",
            images=images,
            tool_calls=_tool_calls(body, path),
        )
    if body.role == "tool" and body.tool_call_id is None:
        raise missing(f"{path}.tool_call_id")
    call_id = body.tool_call_id or ""
    is_result = body.role in ("tool", "function")
    return Message(
        role=_ROLES[body.role],
        content=content,
        images=images,
        tool_name=names.get(call_id) or body.name or "" if is_result else "",
        tool_call_id=call_id if is_result else "",
    )


def _content(body: MessageBody, path: str) -> tuple[str, tuple[bytes, ...]]:
    where = f"{path}.content"
    if body.content is None:
        if body.role == "assistant" and (body.tool_calls or body.function_call or body.refusal):
            return body.refusal or "", ()
        raise invalid_type(where, "str or array", "null")
    if isinstance(body.content, str):
        return body.content or body.refusal or "", ()
    texts: list[str] = []
    images: list[bytes] = []
    for number, part in enumerate(body.content):
        piece = _part(part, f"{where}[{number}]")
        if isinstance(piece, str):
            texts.append(piece)
        else:
            images.append(piece)
    # Clients send task and surroundings as separate parts; glued together without a line break their tags break.
    return "\n".join(texts) or body.refusal or "", tuple(images)


def _part(part: ContentPart, path: str) -> str | bytes:
    match part.type:
        case "text" | "input_text" | "output_text":
            return _present(part.text, f"{path}.text")
        case "refusal":
            return _present(part.refusal, f"{path}.refusal")
        case "image_url" | "input_image":
            if isinstance(part.image_url, str):
                return decode_image(part.image_url, f"{path}.image_url")
            return decode_image(_present(part.image_url, f"{path}.image_url").url, f"{path}.image_url.url")
        case "input_audio" | "file" | "input_file":
            raise unsupported_value(f"{path}.type", f"{part.type!r} is not offered here")
        case _:
            raise invalid(f"{path}.type", f"{part.type!r} is no kind of content")


def _present(value: T | None, path: str) -> T:
    if value is None:
        raise missing(path)
    return value


def _tool_calls(body: MessageBody, path: str) -> tuple[ToolCall, ...]:
    calls = [
        _tool_call(call, f"{path}.tool_calls[{number}].function") for number, call in enumerate(body.tool_calls or ())
    ]
    if body.function_call is not None:
        calls.append(ToolCall("", body.function_call.name, _arguments(body.function_call)))
    return tuple(calls)


def _tool_call(call: ToolCallBody, path: str) -> ToolCall:
    if call.custom is not None:
        return ToolCall(call.id or "", call.custom.name, call.custom.input or "")
    function = _present(call.function, path)
    return ToolCall(call.id or "", function.name, _arguments(function))


def _arguments(call: FunctionCall) -> dict[str, JSON] | str:
    """Arguments as an object. Text that is none stays text: a call once cut short must not ruin its conversation."""
    if not isinstance(call.arguments, str):
        return call.arguments or {}
    try:
        return msgspec.json.decode(call.arguments or "{}", type=dict[str, JSON])
    except (msgspec.DecodeError, RecursionError):
        return call.arguments
