"""Wire shapes of the OpenAI dialect (`spec/openai.md` sections 1 to 5 and 7): a struct per object, in wire order.

Request fields that may be absent may also be null, which means the same; unknown fields are ignored. Fields that are
understood only to be refused, or checked elsewhere, are typed `Any`. A reply's field that is UNSET does not appear.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_TRIGGERS = 64

_FLOAT32_MAX = 3.4028234663852886e38
_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1

Int32 = Annotated[int, Meta(ge=_INT32_MIN, le=_INT32_MAX)]
Token = Annotated[int, Meta(ge=0, le=_INT32_MAX)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Pattern = Annotated[str, Meta(min_length=1, max_length=2**18)]
Choices = Annotated[list[Annotated[str, Meta(max_length=2**12)]], Meta(min_length=1, max_length=1024)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"]


# --- requests ---------------------------------------------------------------------------------------------------------


class StreamOptions(Struct):
    """`stream_options`; accepted without `stream`, where it has no effect."""

    include_usage: bool | None = None


class ResponseFormatSchema(Struct):
    """`response_format.json_schema`."""

    schema: dict[str, Any] | None = None


class ResponseFormat(Struct):
    """`response_format`. `schema` beside `type` is llama.cpp's spelling; `regex` and `grammar` are ours.

    `pattern` is another word for `regex`; `syntax` is the grammar's.
    """

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: ResponseFormatSchema | None = None
    schema: dict[str, Any] | None = None
    regex: Pattern | None = None
    pattern: Pattern | None = None
    grammar: Pattern | None = None
    syntax: Literal["gbnf", "lark"] | None = None


class StructuredOutputs(Struct):
    """vLLM's `structured_outputs`: one of these."""

    json: dict[str, Any] | str | None = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None


class GrammarTrigger(Struct):
    """One of llama.cpp's `grammar_triggers`; `type` is a word, or its number there."""

    type: str | int
    value: str


class GenerateBody(Struct, kw_only=True):
    """What chat and completion bodies have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    n_predict: int | None = None
    temperature: Annotated[float, Meta(ge=0, le=_FLOAT32_MAX)] | None = None
    top_p: Fraction | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    response_format: ResponseFormat | None = None
    top_k: Int32 | None = None
    min_p: Fraction | None = None
    typical_p: Fraction | None = None
    repeat_penalty: Annotated[float, Meta(ge=1e-6, le=_INT32_MAX)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=_INT32_MAX)] | None = None
    json_schema: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    keep_alive: Any = None
    grammar: Annotated[str, Meta(max_length=2**18)] | None = None
    grammar_lazy: bool | None = None
    grammar_triggers: Annotated[list[str | GrammarTrigger], Meta(max_length=MAX_TRIGGERS)] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None
    structured_outputs: StructuredOutputs | None = None
    n_probs: TopLogprobs | None = None
    truncate: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: Any = None
    top_n_sigma: Any = None
    xtc_probability: Any = None
    xtc_threshold: Any = None
    dry_multiplier: Any = None
    dry_base: Any = None
    dry_allowed_length: Any = None
    dry_penalty_last_n: Any = None
    dry_sequence_breakers: Any = None
    mirostat: Any = None
    mirostat_tau: Any = None
    mirostat_eta: Any = None
    dynatemp_range: Any = None
    dynatemp_exponent: Any = None
    ignore_eos: Any = None
    logit_bias: Any = None


class ImageURL(Struct):
    """The object form of `image_url`; `detail` is ignored."""

    url: str


class ContentPart(Struct):
    """One part of a message's content, in Chat's or in Responses' spelling."""

    type: str
    text: str | None = None
    image_url: str | ImageURL | None = None
    refusal: str | None = None


class FunctionCall(Struct):
    """A function call in an earlier assistant message."""

    name: str
    arguments: str | dict[str, Any] | None = None


class CustomCall(Struct):
    """A call of a custom tool in an earlier assistant message."""

    name: str
    input: str | None = None


class ToolCallBody(Struct):
    """One element of an assistant message's `tool_calls`."""

    id: str | None = None
    function: FunctionCall | None = None
    custom: CustomCall | None = None


class MessageBody(Struct):
    """One message of a chat body."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None


class FunctionBody(Struct):
    """A function that the model may call."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolBody(Struct):
    """One element of `tools`."""

    type: str | None = None
    function: FunctionBody | None = None


class Reasoning(Struct):
    """OpenRouter's and Ollama's `reasoning`."""

    effort: Effort | None = None
    enabled: bool | None = None


class ChatBody(GenerateBody, kw_only=True):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[MessageBody], Meta(min_length=1)]
    tools: list[ToolBody] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None


class CompletionBody(GenerateBody, kw_only=True):
    """The body of `POST /v1/completions`. `prompt` is one prompt as text or token ids, or a list of such."""

    prompt: str | list[str | Token | list[Token]] | None = None
    suffix: str | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: bool | TopLogprobs | None = None


# --- replies ----------------------------------------------------------------------------------------------------------


class PromptDetails(Struct):
    """`usage.prompt_tokens_details`."""

    cached_tokens: int


class CompletionDetails(Struct):
    """`usage.completion_tokens_details`."""

    reasoning_tokens: int


class UsageBody(Struct):
    """`usage`; both details are always present. `truncated_tokens`, our own, is there when the prompt was cut."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    truncated_tokens: int | UnsetType = UNSET


class TopTokenBody(Struct):
    """A likely token; `bytes` tells what `token` cannot where it is half a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenBody(Struct):
    """A generated token of a chat, and the likeliest ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopTokenBody]


class ChatLogprobs(Struct):
    """`logprobs` of a chat choice."""

    content: list[TokenBody]
    refusal: None = None


class CompletionLogprobs(Struct):
    """`logprobs` of a completion choice: parallel arrays; offsets count characters of its text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CalledFunction(Struct):
    """A function call in a reply; `arguments` is JSON text, and `{}` when there are none."""

    name: str
    arguments: str


class CallReply(Struct):
    """One element of a whole reply's `tool_calls`."""

    id: str
    type: str
    function: CalledFunction


class CallChunk(Struct):
    """One whole tool call in a stream; `index` counts the calls of its choice."""

    index: int
    id: str
    type: str
    function: CalledFunction


class MessageReply(Struct):
    """The message of a whole reply."""

    role: str
    content: str | None
    refusal: None = None
    annotations: tuple[()] = ()
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[CallReply] | UnsetType = UNSET


class ChatChoice(Struct):
    """One choice of a whole chat reply."""

    index: int
    message: MessageReply
    logprobs: ChatLogprobs | None = None
    finish_reason: str = "stop"


class Delta(Struct):
    """What one chunk adds to its choice; exactly one kind of thing."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: tuple[CallChunk, ...] | UnsetType = UNSET


class ChunkChoice(Struct):
    """The choice of a chat chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class CompletionChoice(Struct):
    """One choice of a completion, whole or chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


Choice = ChatChoice | ChunkChoice | CompletionChoice


class CompletionReply(Struct):
    """The frame around choices of all four kinds: chat or completion, whole or chunk."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: UsageBody | UnsetType | None = UNSET


class ModelBody(Struct):
    """One model; the extra keys let clients size their context."""

    id: str
    created: int
    owned_by: str
    object: str = "model"
    context_length: int | UnsetType = UNSET
    max_model_len: int | UnsetType = UNSET
    capabilities: tuple[str, ...] = ()


class ModelList(Struct):
    """The reply of `GET /v1/models`."""

    object: str
    data: list[Any]


class ErrorDetail(Struct):
    """`error`: the first four keys are always present, the last two only when the prompt is too long."""

    message: str
    type: str
    param: str | None
    code: str | None
    n_prompt_tokens: int | UnsetType = UNSET
    n_ctx: int | UnsetType = UNSET


class ErrorBody(Struct):
    """The error envelope, as a whole body and as the last frame of a broken stream."""

    error: ErrorDetail
