"""Chat and generate bodies to `GenerateRequest`s: Ollama's words end here (`spec/ollama.md` sections 5.1 and 5.2).

Checks come in Ollama's order, since the first that fails is what a client sees: thinking, what the model can do,
options, and only then what is needed to generate. A body without messages or prompt asks for the model and nothing
else, so its request stops there and has no messages.
"""

from __future__ import annotations

from dataclasses import replace

from compat.ollama.errors import InvalidFormat
from compat.ollama.gojson import encode, quote
from compat.ollama.options import parse_options
from compat.ollama.schema import ChatBody, GenerateBody, GenerationBody, MessageBody
from compat.ollama.tools import parse_tool
from engines.errors import BadRequest, UnsupportedFeature
from engines.model import ModelCard
from engines.options import parse_num_keep
from engines.request import JSON, GenerateRequest, Message, Origin, OutputFormat, Priority, ToolCall

_NO_TEMPLATE = "{{ .Prompt }}"
_UNSHIFTED = "deepseek2"
"""The family whose window is not shifted unless the client asks for it, as in Ollama."""


def parse_unload(body: GenerationBody, *, request_id: str, origin: Origin) -> GenerateRequest:
    """The request that sends a model away."""
    return GenerateRequest(id=request_id, model=body.model, origin=origin, messages=(), keep_alive_s=0.0)


def parse_chat(body: ChatBody, card: ModelCard, *, request_id: str, origin: Origin) -> GenerateRequest:
    """The request of a chat with the model of `card`.

    Raises:
        BadRequest: the model cannot do it, or it is not offered here.
        OptionTypeError, InvalidFormat: they answer 500, as in Ollama.
    """
    wanted = ("completion", "tools") if body.tools else ("completion",)
    request = _parse_load(body, card, "chat", wanted, request_id, origin)
    if not body.messages:
        return request
    messages = card.introduce(tuple(map(parse_message, body.messages)))
    return replace(
        request,
        messages=_without_old_thoughts(messages) if _writes_thoughts(card) else messages,
        tools=tuple(parse_tool(tool) for tool in body.tools),
        format=_parse_format(body.format),
    )


def parse_generate(body: GenerateBody, card: ModelCard, *, request_id: str, origin: Origin) -> GenerateRequest:
    """The request of a generation by the model of `card`. Raises as `parse_chat` does."""
    if body.raw and (body.template or body.system or body.context):
        raise BadRequest("raw mode does not support template, system, or context", param="raw")
    wanted = ("completion", "insert") if body.suffix else ("completion",)
    request = _parse_load(body, card, "generate", wanted, request_id, origin)
    if not body.prompt:
        return request
    output_format = _parse_format(body.format)
    if body.raw:
        if body.images:
            raise UnsupportedFeature("images in raw mode are not supported yet", param="images")
        return replace(request, messages=None, prompt=body.prompt, format=output_format)
    request = replace(
        request,
        template=body.template or (None if card.go_template or card.chat_template else _NO_TEMPLATE),
        context_tokens=tuple(body.context or ()),
        format=output_format,
        return_tokens=True,
    )
    if body.suffix:
        return replace(request, messages=None, prompt=body.prompt, suffix=body.suffix)
    return replace(request, messages=_generate_messages(body, card))


def _parse_load(
    body: GenerationBody, card: ModelCard, task: str, wanted: tuple[str, ...], request_id: str, origin: Origin
) -> GenerateRequest:
    """What the request needs of the model, and nothing to generate yet."""
    think = _parse_think(body, card)
    _require(card, body.model, task, wanted)
    sampling, load = parse_options(body.options)
    return GenerateRequest(
        id=request_id,
        model=body.model,
        origin=origin,
        messages=(),
        sampling=sampling,
        load=load,
        keep_alive_s=body.keep_alive,
        think=think,
        truncate=body.truncate,
        shift=card.family != _UNSHIFTED if body.shift is None else body.shift,
        num_keep=parse_num_keep(body.options, card.parameters),
        logprobs=body.top_logprobs if body.logprobs else None,
        stream=body.stream,
        priority=Priority.INTERACTIVE if body.stream else Priority.NORMAL,
    )


def _parse_think(body: GenerationBody, card: ModelCard) -> bool | str | None:
    """Models that can think do, unless they are told not to."""
    if "thinking" in card.capabilities:
        return True if body.think is None else body.think
    if body.think:
        raise UnsupportedFeature(f"{quote(body.model)} does not support thinking", param="think")
    return body.think


def _require(card: ModelCard, name: str, task: str, wanted: tuple[str, ...]) -> None:
    missing = [capability for capability in wanted if capability not in card.capabilities]
    if "completion" in missing:
        raise UnsupportedFeature(f"{quote(name)} does not support {task}", param="model")
    if missing:
        raise UnsupportedFeature(f"{card.full_name} does not support " + "\n".join(missing), param="model")


def _generate_messages(body: GenerateBody, card: ModelCard) -> tuple[Message, ...]:
    """The prompt as a chat; one that continues a `context`, even an empty one, has had the model's own messages."""
    system = body.system or card.system
    return (
        *((Message("system", system),) if system else ()),
        *(card.messages if body.context is None else ()),
        Message("user", body.prompt, images=tuple(body.images)),
    )


def _writes_thoughts(card: ModelCard) -> bool:
    """Whether a client may send back reasoning inside the answer, as these models' first templates had it."""
    return card.family == "qwen3" or card.name.partition(":")[0].rpartition("/")[2] == "deepseek-r1"


def _without_old_thoughts(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The chat without the reasoning at the head of answers that come before the last question (section 5.2)."""
    last = max((place for place, message in enumerate(messages) if message.role == "user"), default=0)
    return tuple(
        replace(message, content=_answer_of(message.content))
        if message.role == "assistant" and place < last
        else message
        for place, message in enumerate(messages)
    )


def _answer_of(content: str) -> str:
    """What follows a leading block of reasoning; one that is not closed has no answer."""
    text = content.lstrip()
    return text.partition("</think>")[2].lstrip() if text.startswith("<think>") else content


def parse_message(body: MessageBody) -> Message:
    """One message. As in Ollama, which roles there are is up to the model's template."""
    return Message(
        role=body.role.lower(),
        content=body.content,
        thinking=body.thinking,
        images=tuple(body.images),
        tool_calls=tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in body.tool_calls),
        tool_name=body.tool_name,
        tool_call_id=body.tool_call_id,
    )


def _parse_format(value: JSON) -> OutputFormat | None:
    match value:
        case None | "":
            return None
        case "json":
            return OutputFormat()
        case dict():
            return OutputFormat(value)
        case _:
            raise InvalidFormat(quote(encode(value).decode()))
