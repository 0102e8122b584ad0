"""Both ends of the protocol between gateway and worker: OpenAI's HTTP and SSE over a Unix socket.

Because it is OpenAI's, llama-server or another server can stand where our worker stands. Ours adds fields that others
ignore or leave out: running usage on every chunk, so that an aborted stream is counted truly; `timings` and token ids
on the last one; `num_ctx`, `truncate`, `shift`, `priority`, `context_tokens`, `chat_template` (Go's text/template) and
token prompts in the request. Durations are in milliseconds here, as in llama-server's `timings`, and nowhere else.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engines.errors import (
    BadRequest,
    GoTemplateError,
    HeadwaterError,
    PromptTooLong,
    ServerBusy,
    TemplateError,
    UnsupportedCapability,
    UnsupportedFeature,
    WorkerCrashed,
    WrongModel,
)
from engines.events import (
    ChoiceFinished,
    Event,
    Finished,
    FinishReason,
    PromptEcho,
    TextDelta,
    ThinkingDelta,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from engines.request import (
    JSON,
    GenerateRequest,
    Message,
    Origin,
    OutputFormat,
    Priority,
    Sampling,
    Syntax,
    Tool,
    ToolCall,
)

ORIGIN_HEADER = "X-Request-Origin"
REQUEST_ID_HEADER = "X-Request-Id"
RENDER_PATH = "/render"
DONE = b"[DONE]"
MAX_CHOICES = 128
_PLAIN_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_last_n",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "top_n_sigma",
    "xtc_probability",
    "xtc_threshold",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
    "dynatemp_range",
    "dynatemp_exponent",
    "ignore_eos",
)
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def path_of(request: GenerateRequest) -> str:
    """Where a request is posted."""
    return "/v1/chat/completions" if request.messages is not None else "/v1/completions"


def encode_request(request: GenerateRequest, model: str) -> bytes:
    """A request's body; `model` is the id that the worker was started with."""
    body: dict[str, JSON] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "n": request.num_choices,
        "num_ctx": request.load.num_ctx,
        "truncate": request.truncate,
        "shift": request.shift,
        "num_keep": request.num_keep,
        "logprobs": request.logprobs,
        "echo": request.echo,
        "priority": request.priority.value,
        "return_tokens": request.return_tokens,
        "context_tokens": list(request.context_tokens) or None,
        "think": request.think,
        "suffix": request.suffix or None,
        "chat_template": request.template,
        "chat_template_kwargs": dict(request.template_kwargs),
        **_encode_sampling(request.sampling),
    }
    if request.messages is not None:
        body["messages"] = [_encode_message(message) for message in request.messages]
    elif request.prompt_tokens is not None:
        body["prompt"] = list(request.prompt_tokens)
    else:
        body["prompt"] = request.prompt or ""
    if request.tools:
        body["tools"] = [_encode_tool(tool) for tool in request.tools]
    if request.format is not None:
        body["response_format"] = _encode_format(request.format)
    try:
        return _encode({name: value for name, value in body.items() if value is not None})
    except UnicodeEncodeError as error:
        raise BadRequest("the request holds half a surrogate pair, which is no text") from error


def decode_request(data: bytes, *, id: str, surface: str) -> GenerateRequest:  # noqa: A002  # the field's name
    """The request that `encode_request` wrote. Raises BadRequest for anything else."""
    try:
        fields = _decode_fields(_decode(data))
        origin = Origin(surface=surface, caller="gateway")
        return msgspec.convert(fields | {"id": id, "origin": origin, "stream": True}, GenerateRequest)
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # MsgspecError is a ValueError
        raise BadRequest(f"malformed worker request: {error}") from error


def _decode_fields(body: dict[str, Any]) -> dict[str, Any]:
    """A body as the fields of a GenerateRequest, shapes unchecked."""
    if ("messages" in body) == ("prompt" in body):
        raise ValueError("exactly one of `messages` and `prompt` must be given")
    if not 1 <= body.get("n", 1) <= MAX_CHOICES:
        raise ValueError(f"`n` must be between 1 and {MAX_CHOICES}")
    prompt = body.get("prompt")
    fields: dict[str, Any] = {
        "model": body["model"],
        "prompt_tokens" if isinstance(prompt, list) else "prompt": prompt,
        "context_tokens": body.get("context_tokens", ()),
        "tools": [_decode_tool(tool) for tool in body.get("tools", ())],
        "format": _decode_format(body.get("response_format")),
        "sampling": {name: body.get(name) for name in (*_PLAIN_SAMPLING, "stop", "dry_sequence_breakers")}
        | {"logit_bias": _decode_bias(body.get("logit_bias"))},
        "load": {"num_ctx": body.get("num_ctx")},
        "think": body.get("think"),
        "suffix": body.get("suffix", ""),
        "template": body.get("chat_template"),
        "template_kwargs": body.get("chat_template_kwargs", {}),
        "truncate": body.get("truncate", False),
        "shift": body.get("shift", False),
        "num_keep": body.get("num_keep", 0),
        "logprobs": body.get("logprobs"),
        "echo": body.get("echo", False),
        "priority": body.get("priority", Priority.NORMAL.value),
        "num_choices": body.get("n", 1),
        "return_tokens": body.get("return_tokens", False),
    }
    if "messages" in body:
        fields["messages"] = [_decode_message(message) for message in body["messages"]]
    return fields


def _encode_sampling(sampling: Sampling) -> dict[str, JSON]:
    return {name: getattr(sampling, name) for name in _PLAIN_SAMPLING} | {
        "stop": sampling.stop,
        "dry_sequence_breakers": sampling.dry_sequence_breakers,
        # JSON has no infinity: a banned token's bias is false, as in llama-server
        "logit_bias": sampling.logit_bias
        and [[token, False if bias == -math.inf else bias] for token, bias in sampling.logit_bias],
    }


def _decode_bias(plain: list[list[Any]] | None) -> list[tuple[int | str, float]] | None:
    return [(token, -math.inf if bias is False else bias) for token, bias in plain] if plain is not None else None


def _encode_message(message: Message) -> dict[str, JSON]:
    plain: dict[str, JSON] = {"role": message.role, "content": message.content}
    if message.images:
        urls = ["data:image/png;base64," + base64.b64encode(image).decode() for image in message.images]
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        plain["content"] = [{"type": "text", "text": message.content}, *pictures]
    if message.thinking:
        plain["reasoning_content"] = message.thinking
    if message.tool_calls:
        plain["tool_calls"] = [_encode_call(call) for call in message.tool_calls]
    if message.tool_name:
        plain["name"] = message.tool_name
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _decode_message(plain: Mapping[str, Any]) -> dict[str, Any]:
    content = plain.get("content") or ""
    images: tuple[bytes, ...] = ()
    if isinstance(content, list):
        images = tuple(_decode_image(part) for part in content if part["type"] == "image_url")
        content = "\n".join(part["text"] for part in content if part["type"] == "text")
    return {
        "role": plain["role"],
        "content": content,
        "thinking": plain.get("reasoning_content", ""),
        "images": images,
        "tool_calls": [_call_fields(call) for call in plain.get("tool_calls", ())],
        "tool_name": plain.get("name", ""),
        "tool_call_id": plain.get("tool_call_id", ""),
    }


def _decode_image(part: Mapping[str, Any]) -> bytes:
    return base64.b64decode(part["image_url"]["url"].partition(",")[2])


def _encode_call(call: ToolCall) -> dict[str, JSON]:
    arguments = call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _decode_call(plain: Mapping[str, Any]) -> ToolCall:
    return ToolCall(**_call_fields(plain))


def _call_fields(plain: Mapping[str, Any]) -> dict[str, Any]:
    arguments = plain["function"]["arguments"]
    try:
        parsed = json.loads(arguments)
    except ValueError:
        parsed = None
    return {
        "id": plain.get("id", ""),
        "name": plain["function"]["name"],
        "arguments": parsed if isinstance(parsed, dict) else str(arguments),
    }


def _encode_tool(tool: Tool) -> dict[str, JSON]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _decode_tool(plain: Mapping[str, Any]) -> dict[str, Any]:
    function = plain["function"]
    return {
        "name": function["name"],
        "description": function.get("description", ""),
        "parameters": function["parameters"],
    }


def _encode_format(output: OutputFormat) -> dict[str, JSON]:
    triggers = {"triggers": output.triggers} if output.triggers else {}
    if output.syntax is not Syntax.JSON_SCHEMA:
        return {"type": output.syntax.value, "grammar": output.grammar} | triggers
    if output.schema is None:
        return {"type": "json_object"} | triggers
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": output.schema}} | triggers


def _decode_format(plain: Mapping[str, Any] | None) -> OutputFormat | None:
    if plain is None or plain["type"] == "text":
        return None
    triggers = tuple(plain.get("triggers", ()))
    if plain["type"] == "json_object":
        return OutputFormat(triggers=triggers)
    if plain["type"] == "json_schema":
        return OutputFormat(plain["json_schema"]["schema"], triggers=triggers)
    return OutputFormat(syntax=Syntax(plain["type"]), grammar=plain["grammar"], triggers=triggers)


def encode_event(event: Event, usage: Usage) -> bytes:
    """One SSE frame; `usage` is what the request has cost up to it."""
    chunk: dict[str, JSON] = {"choices": [], "usage": encode_usage(usage)}
    match event:
        case TextDelta(text, index, logprobs):
            chunk["choices"] = [_choice(index, {"content": text}, logprobs=logprobs)]
        case ThinkingDelta(text, index, logprobs):
            chunk["choices"] = [_choice(index, {"reasoning_content": text}, logprobs=logprobs)]
        case PromptEcho(text, logprobs):
            chunk["prompt"] = {"text": text, "logprobs": _encode_logprobs(logprobs)}
        case ToolCallDelta(call, index):
            chunk["choices"] = [_choice(index, {"tool_calls": [{"index": 0, **_encode_call(call)}]})]
        case ChoiceFinished(reason, index):
            chunk["choices"] = [_choice(index, {}, reason.value)]
        case Finished(reason, usage, timings, tokens):
            chunk |= {"usage": encode_usage(usage), "timings": encode_timings(timings, usage)}
            chunk |= {"reason": reason.value, "tokens": list(tokens)}
    return b"data: " + _encode(chunk) + b"\n\n"


def _choice(
    index: int, delta: dict[str, JSON], reason: str | None = None, logprobs: Sequence[TokenLogprob] = ()
) -> dict[str, JSON]:
    choice: dict[str, JSON] = {"index": index, "delta": delta, "finish_reason": reason}
    if logprobs:
        choice["logprobs"] = {"content": _encode_logprobs(logprobs)}
    return choice


def _encode_logprobs(logprobs: Sequence[TokenLogprob]) -> list[dict[str, JSON]]:
    """llama-server's form: `id` and `bytes`, and no `token` text, which those who render make from the bytes."""
    return [
        {"id": each.token, "bytes": list(each.data), "logprob": each.logprob}
        | ({"top_logprobs": _encode_logprobs(each.top)} if each.top else {})
        for each in logprobs
    ]


def _decode_logprobs(plain: Sequence[Mapping[str, Any]]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            each.get("id", -1),
            bytes(each["bytes"] if each.get("bytes") is not None else each.get("token", "").encode()),
            each["logprob"],
            _decode_logprobs(each.get("top_logprobs") or ()),
        )
        for each in plain
    )


def encode_usage(usage: Usage) -> dict[str, JSON]:
    """Usage as a chunk, a reply or a cancel reply carries it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
        "truncated_tokens": usage.truncated_tokens,
        "shifted_tokens": usage.shifted_tokens,
    }


def decode_usage(plain: Mapping[str, Any]) -> Usage:
    """Usage as a chunk or a cancel reply carries it; details may be missing."""
    return Usage(
        prompt_tokens=plain.get("prompt_tokens", 0),
        cached_tokens=(plain.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        completion_tokens=plain.get("completion_tokens", 0),
        thinking_tokens=(plain.get("completion_tokens_details") or {}).get("reasoning_tokens", 0),
        truncated_tokens=plain.get("truncated_tokens", 0),
        shifted_tokens=plain.get("shifted_tokens", 0),
    )


def encode_timings(timings: Timings, usage: Usage) -> dict[str, JSON]:
    """Timings in llama-server's form."""
    return {
        "prompt_n": usage.prompt_tokens - usage.cached_tokens,
        "cached_n": usage.cached_tokens,
        "prompt_ms": timings.prefill_s * 1e3,
        "predicted_n": usage.completion_tokens,
        "predicted_ms": timings.decode_s * 1e3,
        "queue_ms": timings.queue_s * 1e3,
        "draft_n": 0,
        "draft_accepted_n": 0,
    }


def decode_timings(plain: Mapping[str, Any]) -> Timings:
    """The worker's part of the timings; the gateway adds its own."""
    return Timings(
        queue_s=plain.get("queue_ms", 0.0) / 1e3,
        prefill_s=plain.get("prompt_ms", 0.0) / 1e3,
        decode_s=plain.get("predicted_ms", 0.0) / 1e3,
    )


def encode_prompt(text: str) -> bytes:
    """The reply to a request that is only rendered."""
    return _encode({"prompt": text})


def decode_prompt(data: bytes) -> str:
    """What `encode_prompt` wrote."""
    return str(_decode(data)["prompt"])


def encode_cost(usage: Usage, timings: Timings) -> bytes:
    """The reply to a cancel: what the request has cost."""
    return _encode({"usage": encode_usage(usage), "timings": encode_timings(timings, usage)})


def decode_cost(data: bytes) -> tuple[Usage, Timings]:
    """What `encode_cost` wrote."""
    plain = _decode(data)
    return decode_usage(plain["usage"]), decode_timings(plain["timings"])


class EventDecoder:
    """Turns the chunks of one answer into events and remembers the usage seen last.

    OpenAI servers that are not ours send no `reason` with the last chunk; then it is the first choice's.
    """

    def __init__(self) -> None:
        self.usage = Usage()
        self._reasons: dict[int, FinishReason] = {}

    def decode(self, data: bytes) -> list[Event]:
        """The events of one `data:` line. Raises the error that the worker sent, if it is one."""
        chunk = _decode(data)
        if error := chunk.get("error"):
            raise decode_error(error)
        if usage := chunk.get("usage"):
            self.usage = decode_usage(usage)
        if prompt := chunk.get("prompt"):
            return [PromptEcho(prompt["text"], _decode_logprobs(prompt["logprobs"]))]
        events: list[Event] = []
        for choice in chunk["choices"]:
            events += self._decode_choice(choice)
        if not chunk["choices"] and usage:
            reason = FinishReason(chunk["reason"]) if "reason" in chunk else self._reasons.get(0, FinishReason.STOP)
            timings = decode_timings(chunk.get("timings") or {})
            events.append(Finished(reason, self.usage, timings, tuple(chunk.get("tokens") or ())))
        return events

    def _decode_choice(self, choice: Mapping[str, Any]) -> list[Event]:
        index, delta = choice["index"], choice.get("delta") or {}
        logprobs = _decode_logprobs((choice.get("logprobs") or {}).get("content") or ())
        events: list[Event] = []
        thought, text = delta.get("reasoning_content"), delta.get("content")
        if thought or (thought is not None and logprobs):
            events.append(ThinkingDelta(thought, index, logprobs))
        elif text or logprobs:
            events.append(TextDelta(text or "", index, logprobs))
        events += [ToolCallDelta(_decode_call(call), index) for call in delta.get("tool_calls") or ()]
        if reason := choice.get("finish_reason"):
            self._reasons[index] = FinishReason(reason)
            events.append(ChoiceFinished(self._reasons[index], index))
        return events


def encode_error(error: HeadwaterError) -> bytes:
    """An error's body, in OpenAI's envelope with our stable code."""
    detail: dict[str, JSON] = {"message": error.message, "type": "worker_error", "param": None, "code": error.code}
    if isinstance(error, BadRequest):
        detail |= {"param": error.param, "reason": error.reason}
    if isinstance(error, UnsupportedCapability):
        detail |= {"model": error.model, "capabilities": error.capabilities}
    if isinstance(error, PromptTooLong):
        detail |= {"n_prompt_tokens": error.prompt_tokens, "n_ctx": error.num_ctx}
    return _encode({"error": detail})


def decode_error(detail: Mapping[str, Any]) -> HeadwaterError:
    """The error that a worker meant."""
    message = str(detail.get("message", "the worker failed without a word"))
    param = detail.get("param")
    match detail.get("code"):
        case PromptTooLong.code:
            return PromptTooLong(int(detail["n_prompt_tokens"]), int(detail["n_ctx"]))
        case UnsupportedCapability.code:
            return UnsupportedCapability(detail["model"], *detail["capabilities"])
        case UnsupportedFeature.code:
            return UnsupportedFeature(message, param=param)
        case TemplateError.code:
            return TemplateError(message)
        case GoTemplateError.code:
            return GoTemplateError(message)
        case BadRequest.code:
            return BadRequest(message, param=param, reason=detail.get("reason"))
        case WorkerCrashed.code:
            return WorkerCrashed(message)
        case ServerBusy.code:
            return ServerBusy(message)
        case WrongModel.code:
            return HeadwaterError(message)
    return HeadwaterError(message)
