"""Chat and completion bodies to `GenerateRequest`s: OpenAI's words end here (`spec/openai.md` sections 4 and 5).

Refuses what is understood but not offered, naming the field, because silently ignoring it would change the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compat.keep_alive import parse_keep_alive
from compat.openai.messages import parse_messages
from compat.openai.refusals import invalid, invalid_type, unsupported_parameter, unsupported_value
from compat.openai.schema import MAX_PROMPTS, ChatBody, CompletionBody, GenerateBody
from compat.openai.tools import parse_tools
from engines.errors import BadRequest
from engines.model import ModelCard
from engines.options import OptionTypeError, parse_load_options, parse_sampling
from engines.request import JSON, GenerateRequest, LoadOptions, Origin, OutputFormat, Sampling

DEFAULTS = Sampling(temperature=1.0, top_p=1.0)

_INT32_MAX = 2**31 - 1
_EFFORTS: dict[str, bool | str] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "max",
    "ultra": "max",
    "max": "max",
}


def parse_chat(body: ChatBody, card: ModelCard, *, request_id: str, origin: Origin) -> GenerateRequest:
    """The request of a chat completion to the model of `card`.

    Raises:
        BadRequest: the body is malformed, or asks for what is not offered.
        UnsupportedCapability: there is an image and the model has no eyes.
    """
    _refuse_unsupported_chat(body)
    sampling, load = _options(body)
    return GenerateRequest(
        id=request_id,
        model=body.model,
        origin=origin,
        messages=card.introduce(parse_messages(body.messages, card)),
        tools=parse_tools(body),
        format=_format(body),
        sampling=sampling,
        defaults=DEFAULTS,
        load=load,
        keep_alive_s=parse_keep_alive(body.keep_alive),
        think=_think(body) if "thinking" in card.capabilities else None,
        template_kwargs=_template_kwargs(body),
        num_choices=body.n or 1,
        stream=bool(body.stream),
    )


def parse_completion(body: CompletionBody, *, request_id: str, origin: Origin) -> list[GenerateRequest]:
    """One request for each prompt of a completion; the first has `request_id`, the others `-1`, `-2`, ... after it.

    Raises:
        BadRequest: the body is malformed, or asks for what is not offered.
    """
    _refuse_unsupported_completion(body)
    sampling, load = _options(body)
    return [
        GenerateRequest(
            id=f"{request_id}-{position}" if position else request_id,
            model=body.model,
            origin=origin,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_tokens=None if isinstance(prompt, str) else prompt,
            format=_format(body),
            sampling=sampling,
            defaults=DEFAULTS,
            load=load,
            keep_alive_s=parse_keep_alive(body.keep_alive),
            num_choices=body.n or 1,
            stream=bool(body.stream),
        )
        for position, prompt in enumerate(_prompts(body))
    ]


def _refuse_unsupported_chat(body: ChatBody) -> None:
    _refuse(
        logit_bias=body.logit_bias,
        grammar=body.grammar,
        logprobs=body.logprobs,
        top_logprobs=body.top_logprobs,
        functions=body.functions,
        function_call=body.function_call,
        audio=body.audio,
    )
    if "audio" in (body.modalities or ()):
        raise unsupported_value("modalities", "audio output is not offered here")
    if body.add_generation_prompt and body.continue_final_message:
        raise invalid("continue_final_message", "cannot be true together with 'add_generation_prompt'")


def _refuse_unsupported_completion(body: CompletionBody) -> None:
    _refuse(
        logit_bias=body.logit_bias,
        grammar=body.grammar,
        logprobs=body.logprobs is not None and body.logprobs is not False,  # 0 asks for the sampled token's own
        echo=body.echo,
        suffix=body.suffix,
    )
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise invalid("best_of", "smaller than 'n'")
    if body.best_of is not None and body.best_of > 1:
        raise unsupported_value("best_of", "more than 1 is not offered here")


def _refuse(**fields: Any) -> None:
    """Raise for the first field that asks for something; false, zero and empty values ask for nothing."""
    for name, value in fields.items():
        if value:
            raise unsupported_parameter(name)


def _options(body: GenerateBody) -> tuple[Sampling, LoadOptions]:
    """Sampling and load options; a field of OpenAI's wins over the same one in Ollama's `options`."""
    options: Mapping[str, JSON] = body.options or {}
    try:
        sampling, load = parse_sampling(options), parse_load_options(options)
    except OptionTypeError as error:
        raise BadRequest(f"Invalid 'options': {error.message}.", param="options", reason="invalid_type") from None
    said = Sampling(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        typical_p=body.typical_p,
        repeat_last_n=body.repeat_last_n,
        repeat_penalty=body.repeat_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=_seed(body.seed),
        stop=_stop(body.stop),
        max_tokens=_max_tokens(body),
    )
    return said.over(sampling), load


def _seed(seed: int | None) -> int | None:
    """The seed modulo 2**32, except -1, which means random in llama.cpp."""
    return seed if seed is None or seed == -1 else seed % 2**32


def _stop(stop: str | list[str] | None) -> tuple[str, ...] | None:
    strings = [stop] if isinstance(stop, str) else stop or []
    return tuple(string for string in strings if string) or None


def _max_tokens(body: GenerateBody) -> int | None:
    """The token limit, clamped to what any context can hold; -1 means none."""
    limits = {
        "max_completion_tokens": body.max_completion_tokens,
        "max_tokens": body.max_tokens,
        "n_predict": body.n_predict,
    }
    for name, limit in limits.items():
        if limit is not None:
            if limit < 1 and limit != -1:
                raise invalid(name, "expected a value >= 1, or -1 for no limit", "integer_below_min_value")
            return min(limit, _INT32_MAX)
    return None


def _format(body: GenerateBody) -> OutputFormat | None:
    """The constraint on the output; an empty schema allows any object."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None if body.json_schema is None else OutputFormat(body.json_schema or None)
    schema = wanted.schema if wanted.json_schema is None else wanted.json_schema.schema
    return OutputFormat(schema or None)


def _think(body: ChatBody) -> bool | str | None:
    """Whether and how hard to think: the template's own switch wins over `reasoning`, which wins over the effort."""
    effort = None if body.reasoning_effort is None else _EFFORTS[body.reasoning_effort]
    if body.reasoning is not None and body.reasoning.effort is not None:
        effort = _EFFORTS[body.reasoning.effort]
    for switch in (body.reasoning and body.reasoning.enabled, _enable_thinking(body)):
        if switch is not None:
            effort = (effort or True) if switch else False
    return effort


def _enable_thinking(body: ChatBody) -> bool | None:
    """The template variable that most models' templates use as their switch."""
    switch = (body.chat_template_kwargs or {}).get("enable_thinking")
    if switch is not None and not isinstance(switch, bool):
        raise invalid_type("chat_template_kwargs.enable_thinking", "bool", type(switch).__name__)
    return switch


def _template_kwargs(body: ChatBody) -> dict[str, JSON]:
    _enable_thinking(body)
    kwargs = body.chat_template_kwargs or {}
    return kwargs if body.verbosity is None else {"verbosity": body.verbosity} | kwargs


def _prompts(body: CompletionBody) -> list[str | tuple[int, ...]]:
    """One entry for each prompt. A flat list of numbers is a single prompt in token ids."""
    prompt = body.prompt
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if not prompt or [] in prompt:
        raise invalid("prompt", "empty array", "empty_array")
    tokens = tuple(item for item in prompt if isinstance(item, int))
    if len(tokens) == len(prompt):
        return [tokens]
    if tokens:
        raise unsupported_value("prompt", "text and token ids in one prompt are not offered here")
    if len(prompt) > MAX_PROMPTS:
        raise invalid("prompt", f"expected at most {MAX_PROMPTS} prompts", "array_above_max_length")
    return [item if isinstance(item, str) else tuple(item) for item in prompt if not isinstance(item, int)]
