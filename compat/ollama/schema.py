"""Wire shapes of the Ollama dialect (`spec/ollama.md` sections 4 and 5): a struct per object, in wire order.

A request's field that may be absent has the default that absence means; null is taken for absent before these structs
are filled. A reply's field that is UNSET does not appear.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

ThinkLevel = Literal["high", "medium", "low", "max"]
Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]


# --- requests ---------------------------------------------------------------------------------------------------------


class KeepAlive(float):
    """Seconds, read from any of the forms of section 2; infinity for ever."""


class Image(bytes):
    """A file, read from base64."""


class GenerationBody(Struct, kw_only=True):
    """What chat and generate bodies have in common."""

    model: str = ""
    stream: bool = True
    format: Any = None
    keep_alive: KeepAlive | None = None
    options: dict[str, Any] = {}
    think: bool | ThinkLevel | None = None
    truncate: bool = True
    shift: bool | None = None
    debug_render_only: bool = msgspec.field(default=False, name="_debug_render_only")
    logprobs: bool = False
    top_logprobs: int = 0


class GenerateBody(GenerationBody, kw_only=True):
    """`POST /api/generate`. A `context` that is there, even empty, continues an earlier answer."""

    prompt: str = ""
    suffix: str = ""
    system: str = ""
    template: str = ""
    context: list[Token] | None = None
    raw: bool = False
    images: list[Image] = []


class FunctionCallBody(Struct):
    """The function of a call in an earlier assistant message."""

    name: str = ""
    arguments: dict[str, Any] = {}


class ToolCallBody(Struct):
    """A call in an earlier assistant message."""

    id: str = ""
    function: FunctionCallBody = msgspec.field(default_factory=FunctionCallBody)


class MessageBody(Struct):
    """One message of a chat."""

    role: str = ""
    content: str = ""
    thinking: str = ""
    images: list[Image] = []
    tool_calls: list[ToolCallBody] = []
    tool_name: str = ""
    tool_call_id: str = ""


class PropertyBody(Struct, omit_defaults=True):
    """One parameter of a tool; JSON Schema's other keywords are dropped, and the order is the one written here."""

    anyOf: list[PropertyBody] = []  # noqa: N815  JSON Schema's name
    type: str | list[str] = ""
    items: Any = None
    description: str = ""
    enum: list[Any] = []
    properties: dict[str, PropertyBody] = {}
    required: list[str] = []


class ParametersBody(Struct, omit_defaults=True):
    """The parameters of a tool."""

    type: str = ""
    defs: Any = msgspec.field(default=None, name="$defs")
    items: Any = None
    required: list[str] = []
    properties: dict[str, PropertyBody] = {}


class FunctionBody(Struct):
    """The function that a tool is."""

    name: str = ""
    description: str = ""
    parameters: ParametersBody = msgspec.field(default_factory=ParametersBody)


class ToolBody(Struct):
    """One element of `tools`."""

    function: FunctionBody = msgspec.field(default_factory=FunctionBody)


class ChatBody(GenerationBody, kw_only=True):
    """`POST /api/chat`."""

    messages: list[MessageBody] = []
    tools: list[ToolBody] = []


class ShowBody(Struct):
    """`POST /api/show`; `template` is ignored."""

    model: str = ""
    name: str = ""
    verbose: bool = False
    system: str = ""
    options: dict[str, Any] = {}


# --- replies ----------------------------------------------------------------------------------------------------------


class ErrorBody(Struct):
    """An error, also as the last line of a stream."""

    error: str


class TopTokenBody(Struct):
    """A likely token; `bytes` tells what `token` cannot where it is half a character."""

    token: str
    logprob: float
    bytes: list[int] | UnsetType


class TokenBody(Struct):
    """A generated token, and the likeliest ones in its place."""

    token: str
    logprob: float
    bytes: list[int] | UnsetType
    top_logprobs: list[TopTokenBody] | UnsetType


class CalledFunction(Struct):
    """The function that the model calls; `index` counts from 0."""

    index: int
    name: str
    arguments: dict[str, Any]


class CallReply(Struct):
    """One tool call."""

    id: str
    function: CalledFunction


class MessageReply(Struct):
    """The assistant's message, whole."""

    role: str
    content: str
    thinking: str | UnsetType = UNSET
    tool_calls: list[CallReply] | UnsetType = UNSET


class ChatReply(Struct):
    """The last object of a chat, or the only one. Durations are nanoseconds; the last two fields are our own."""

    model: str
    created_at: str
    message: MessageReply
    done: bool
    done_reason: str
    logprobs: list[TokenBody] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    prompt_tokens_sent: int | UnsetType = UNSET
    truncated: bool | UnsetType = UNSET


class GenerateReply(Struct):
    """The last object of a generation, or the only one. Durations are nanoseconds; the last two fields are our own."""

    model: str
    created_at: str
    response: str
    thinking: str | UnsetType
    done: bool
    done_reason: str
    context: tuple[int, ...] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    logprobs: list[TokenBody] | UnsetType = UNSET
    prompt_tokens_sent: int | UnsetType = UNSET
    truncated: bool | UnsetType = UNSET


class DebugInfo(Struct):
    """What the model would have been given."""

    rendered_template: str
    image_count: int | UnsetType


class ChatDebugReply(Struct):
    """The only object of a chat with `_debug_render_only`."""

    model: str
    created_at: str
    message: MessageReply
    done: bool
    debug_info: DebugInfo = msgspec.field(name="_debug_info")


class GenerateDebugReply(Struct):
    """The only object of a generation with `_debug_render_only`."""

    model: str
    created_at: str
    response: str
    done: bool
    debug_info: DebugInfo = msgspec.field(name="_debug_info")


class VersionReply(Struct):
    """`GET /api/version`."""

    version: str


class Details(Struct):
    """`details` of a model; the two lengths appear in tags only."""

    parent_model: str
    format: str
    family: str
    families: tuple[str, ...] | None
    parameter_size: str
    quantization_level: str
    context_length: int | UnsetType = UNSET
    embedding_length: int | UnsetType = UNSET


class TagsModel(Struct):
    """One installed model."""

    name: str
    model: str
    remote_model: str | UnsetType
    remote_host: str | UnsetType
    modified_at: str
    size: int
    digest: str
    details: Details
    capabilities: tuple[str, ...] | UnsetType


class Tags(Struct):
    """`GET /api/tags`."""

    models: list[TagsModel]


class ProcessModel(Struct):
    """One loaded model. `load_progress`, from 0 to 1, is there while it is being loaded, and beyond Ollama's fields."""

    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int
    load_progress: float | UnsetType = UNSET


class Processes(Struct):
    """`GET /api/ps`."""

    models: list[ProcessModel]


class StoredMessage(Struct):
    """A MESSAGE of a model."""

    role: str
    content: str


class TensorBody(Struct):
    """One tensor."""

    name: str
    type: str
    shape: tuple[int, ...]


class ShowReply(Struct):
    """The reply to `POST /api/show`. The two infos are written as Go writes maps: sorted, floats in its form."""

    license: str | UnsetType
    modelfile: str
    parameters: str | UnsetType
    template: str | UnsetType
    system: str | UnsetType
    details: Details
    messages: list[StoredMessage] | UnsetType
    remote_model: str | UnsetType
    remote_host: str | UnsetType
    model_info: msgspec.Raw
    projector_info: msgspec.Raw | UnsetType
    tensors: list[TensorBody] | UnsetType
    capabilities: tuple[str, ...] | UnsetType
    modified_at: str
    requires: str | UnsetType
