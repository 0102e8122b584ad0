"""What goes in: one kind of request for every dialect.

Wire words end where these objects begin. Everything here is plain data from the standard library, so that every floor
and every process may import it. Durations are float seconds, sizes are bytes, tokens are counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

JSON = Any
"""A decoded JSON value: None, bool, int, float, str, list or dict of the same."""

FOREVER = float("inf")
"""The keep-alive, in seconds, of a model that is never unloaded for being idle."""


class Mode(StrEnum):
    """What a worker serves (`spec/model-runner.md` section 2.5)."""

    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RERANKING = "reranking"


class Priority(StrEnum):
    """Whose turn comes first when there is not enough for all, from first to last."""

    INTERACTIVE = "interactive"  # somebody reads along
    NORMAL = "normal"
    BATCH = "batch"  # nobody waits for it

    @property
    def rank(self) -> int:
        """0 for who goes first."""
        return tuple(Priority).index(self)


class Trust(StrEnum):
    """How sure we are of an origin's caller, from best to least."""

    VERIFIED = "verified"  # one of our own keys
    VOUCHED = "vouched"  # asserted by a proxy or key that we trust to assert
    CLAIMED = "claimed"  # said by the client itself
    DERIVED = "derived"  # worked out from the peer's address and its software


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request came from (`design.md` section 4).

    Attributes:
        surface: the route family, set by the gateway alone, such as `ollama/completion`.
        caller: who asks: a key's name, a vouched name, or `<client>@<address>`.
        client: software family from a closed list, or `unknown`.
        user: the person behind a user interface, when a trusted upstream names one; else empty.
        trust: how sure we are of `caller`.
    """

    surface: str
    caller: str
    client: str = "unknown"
    user: str = ""
    trust: Trust = Trust.DERIVED


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the model made: `arguments` is an object, or text where the model's JSON was broken."""

    id: str
    name: str
    arguments: dict[str, JSON] | str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. `images` are undecoded file bytes.

    `role` is `system`, `user`, `assistant` or `tool`; which others there are is up to the model's template.
    """

    role: str
    content: str = ""
    thinking: str = ""
    images: tuple[bytes, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_name: str = ""
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON Schema with the client's key order."""

    name: str
    description: str = ""
    parameters: Mapping[str, JSON] = field(default_factory=lambda: {"type": "object", "properties": {}})


class Syntax(StrEnum):
    """The language that an output format is written in."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"  # the answer as a whole must match
    GBNF = "gbnf"  # llama.cpp's grammars
    LARK = "lark"  # llguidance's dialect of Lark


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """A constraint on the answer. It begins where the reasoning ends.

    Attributes:
        schema: a JSON Schema; None allows any JSON object. Only for `JSON_SCHEMA`.
        grammar: the text in any other syntax.
        triggers: strings in the answer after any of which the constraint begins; without any it holds from the start.
    """

    schema: JSON | None = None
    syntax: Syntax = Syntax.JSON_SCHEMA
    grammar: str = ""
    triggers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. `None` means "not said"; `over` fills the gaps, so precedence is a chain of these.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 or less is off. top_p, min_p, typical_p: 1, 0 and 1 are off.
        repeat_last_n: window of the penalties in tokens; 0 is off, -1 the whole context.
        seed: any integer; negative means random. Engines fold it to 32 bits (llama.h, llama_sampler_init_dist).
        stop: strings that end the answer and are not part of it.
        max_tokens: limit of generated tokens; negative means until the end of turn or of the context.
        top_n_sigma: keeps what is within so many standard deviations of the best logit; 0 or less is off.
        xtc_probability, xtc_threshold: how often all but the last of the tokens above the threshold are left out.
        dry_*: the penalty on repeating a sequence; a multiplier of 0 is off, `dry_penalty_last_n` -1 the context.
        mirostat: 0 off, 1 or 2 the version, which takes the place of every filter. mirostat_tau, _eta: its target
            entropy and learning rate.
        dynatemp_range, dynatemp_exponent: the temperature varies by up to the range with the entropy; 0 is off.
        logit_bias: token ids, or texts whose every token is meant, and what is added to their logits; -inf bans.
        ignore_eos: the answer goes on until its limit.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_last_n: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    max_tokens: int | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: tuple[str, ...] | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    logit_bias: tuple[tuple[int | str, float], ...] | None = None
    ignore_eos: bool | None = None

    def over(self, defaults: Sampling) -> Sampling:
        """This sampling with its unsaid fields taken from `defaults`."""
        said = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        return dataclasses.replace(defaults, **said)


_SAMPLING_FIELDS = tuple(f.name for f in dataclasses.fields(Sampling))


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What is fixed when a model is loaded; a request that needs other values needs another runner.

    Attributes:
        num_ctx: context window of one request in tokens; None leaves it to the server.
        num_batch: prompt tokens per decode. num_gpu: layers offloaded, -1 all. num_thread: 0 chooses.
    """

    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    use_mmap: bool | None = None
    num_thread: int | None = None

    def over(self, defaults: LoadOptions) -> LoadOptions:
        """These options with their unsaid fields taken from `defaults`."""
        said = {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) is not None}
        return dataclasses.replace(defaults, **said)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A chat or a raw completion: exactly one of `messages`, `prompt` and `prompt_tokens` is given.

    Attributes:
        id: our request id, `req_` and 32 hex digits.
        model: the name as the client typed it.
        messages: rendered with the model's template. Mutually exclusive with `prompt` and `prompt_tokens`.
        prompt: text used as it is, special tokens recognised. prompt_tokens: the model's own token ids, nothing added.
        suffix: what comes after the answer to `prompt`, which then fills the gap; empty for nothing.
        template: Go's text/template, which renders `messages`, or `prompt` and `suffix`, and says how the reply is to
            be read; None for the Jinja template that the model's weights bring.
        context_tokens: ids placed before the rendered messages (Ollama's deprecated `context`).
        sampling, load: what the client asked for; `defaults` is what its dialect assumes where neither the client nor
            the model says anything.
        keep_alive_s: how long the model stays after this request; None leaves the runner's value alone.
        think: whether the model should think first: None is unsaid, a string is an effort.
        template_kwargs: further variables for the chat template.
        truncate: an over-long chat loses its oldest messages, an over-long prompt its middle, instead of being refused.
        shift: a full window loses the oldest half behind the first `num_keep` tokens and the answer goes on, instead of
            ending there. num_keep: also what a truncated prompt keeps of its beginning; negative is all of the prompt.
        logprobs: None for none, else how many likely alternatives to tell of each generated token.
        echo: the first event is the prompt itself, with its tokens' log-probabilities if `logprobs` is said.
        priority: who goes first, and whose cached prefixes stay, when there is not enough for all.
        num_choices: independent answers to the one prompt.
        return_tokens: the last event carries prompt and answer as token ids.
        stream: whether the client reads as it goes; recorded, nothing else.
    """

    id: str
    model: str
    origin: Origin
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    prompt_tokens: tuple[int, ...] | None = None
    suffix: str = ""
    template: str | None = None
    context_tokens: tuple[int, ...] = ()
    tools: tuple[Tool, ...] = ()
    format: OutputFormat | None = None
    sampling: Sampling = Sampling()
    defaults: Sampling = Sampling()
    load: LoadOptions = LoadOptions()
    keep_alive_s: float | None = None
    think: bool | str | None = None
    template_kwargs: Mapping[str, JSON] = field(default_factory=dict)
    truncate: bool = False
    shift: bool = False
    num_keep: int = 4
    num_choices: int = 1
    logprobs: int | None = None
    echo: bool = False
    return_tokens: bool = False
    stream: bool = False
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts, or token ids, to turn into one vector each.

    Attributes:
        truncate: an over-long input loses its end instead of being refused.
        dimensions: keeps the first so many numbers of each vector; None, 0 and more than there are keep all.
        normalize: vectors have length 1; without it they come as the model makes them; None does as Ollama's runner
            does for the model (`spec/ollama.md` section 5.5).
        inputs: none at all only loads the model.
    """

    id: str
    model: str
    origin: Origin
    inputs: tuple[str | tuple[int, ...], ...]
    truncate: bool = True
    dimensions: int | None = None
    normalize: bool | None = True
    priority: Priority = Priority.NORMAL
    load: LoadOptions = LoadOptions()
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A text to cut into the model's token ids, or token ids to join to a text: exactly one of the two is given.

    Attributes:
        add_special: adds the tokens that the model puts around every text. parse_special: reads markers such as
            `<|im_start|>` as control tokens and not as text. Both are for a text only.
    """

    id: str
    model: str
    origin: Origin
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    add_special: bool = False
    parse_special: bool = True
    load: LoadOptions = LoadOptions()
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """Documents to score against one query.

    Attributes:
        truncate: an over-long document loses its end instead of the request being refused.
        max_document_tokens: what each document keeps at most; None for all of it.
    """

    id: str
    model: str
    origin: Origin
    query: str
    documents: tuple[str, ...]
    truncate: bool = True
    max_document_tokens: int | None = None
    priority: Priority = Priority.NORMAL
    load: LoadOptions = LoadOptions()
    keep_alive_s: float | None = None


AnyRequest = GenerateRequest | EmbedRequest | RerankRequest | TokenizeRequest
