"""Chat and completion bodies to `GenerateRequest`s: OpenAI's words end here (`spec/openai.md` sections 4 and 5).

Refuses what is understood but not offered, naming the field, because silently ignoring it would change the answer.
"""

from __future__ import annotations

from typing import Any

from compat.keep_alive import parse_keep_alive
from compat.openai.forced import one_call
from compat.openai.formats import parse_format
from compat.openai.messages import parse_messages
from compat.openai.options import parse_options, parse_priority
from compat.openai.refusals import invalid, invalid_type, unsupported_parameter, unsupported_value
from compat.openai.schema import MAX_PROMPTS, ChatBody, CompletionBody, GenerateBody
from compat.openai.tools import must_call, parse_tools
from engines.errors import UnsupportedCapability
from engines.model import ModelCard
from engines.options import parse_num_keep
from engines.request import JSON, GenerateRequest, Origin, Sampling

DEFAULTS = Sampling(temperature=1.0, top_p=1.0)

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
    sampling, load = parse_options(body)
    tools = parse_tools(body)
    stated = parse_format(body, tools)  # of the content, which an answer that must be a call has none of
    return GenerateRequest(
        id=request_id,
        model=body.model,
        origin=origin,
        messages=card.introduce(parse_messages(body.messages, card)),
        tools=tools,
        format=one_call(tools) if must_call(body) else stated,
        sampling=sampling,
        defaults=DEFAULTS,
        load=load,
        keep_alive_s=parse_keep_alive(body.keep_alive),
        think=_think(body) if "thinking" in card.capabilities else None,
        template_kwargs=_template_kwargs(body),
        truncate=_truncate(body),
        num_keep=parse_num_keep(body.options or {}, card.parameters),
        num_choices=body.n or 1,
        logprobs=chat_logprobs_of(body),
        stream=bool(body.stream),
        priority=parse_priority(body),
    )


def parse_completion(
    body: CompletionBody, card: ModelCard, *, request_id: str, origin: Origin
) -> list[GenerateRequest]:
    """One request for each prompt of a completion; the first has `request_id`, the others `-1`, `-2`, ... after it.

    More choices than are wanted are asked for with their log-probabilities, so that the best can be found.

    Raises:
        BadRequest: the body is malformed, or asks for what is not offered.
    """
    _refuse_unsupported_completion(body, card)
    sampling, load = parse_options(body)
    output_format, prompts = parse_format(body), _prompts(body)
    num_choices = body.best_of or body.n or 1
    logprobs = completion_logprobs_of(body)
    return [
        GenerateRequest(
            id=f"{request_id}-{position}" if position else request_id,
            model=body.model,
            origin=origin,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_tokens=None if isinstance(prompt, str) else prompt,
            suffix=body.suffix or "",
            format=output_format,
            sampling=sampling,
            defaults=DEFAULTS,
            load=load,
            keep_alive_s=parse_keep_alive(body.keep_alive),
            truncate=_truncate(body),
            num_keep=parse_num_keep(body.options or {}, card.parameters),
            num_choices=num_choices,
            logprobs=0 if logprobs is None and num_choices > (body.n or 1) else logprobs,
            echo=bool(body.echo),
            stream=bool(body.stream),
            priority=parse_priority(body, len(prompts)),
        )
        for position, prompt in enumerate(prompts)
    ]


def chat_logprobs_of(body: ChatBody) -> int | None:
    """How many likely alternatives to show of each token; None shows no log-probabilities."""
    if not body.logprobs:
        return body.n_probs or None
    return body.n_probs or 0 if body.top_logprobs is None else body.top_logprobs


def completion_logprobs_of(body: CompletionBody) -> int | None:
    """The same for a completion, where `true` is 1 and 0 shows the chosen token alone."""
    if body.logprobs is None or body.logprobs is False:
        return body.n_probs or None
    return int(body.logprobs)


def _refuse_unsupported_chat(body: ChatBody) -> None:
    _refuse(functions=body.functions, function_call=body.function_call, audio=body.audio)
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "'logprobs' must be true with it")
    if "audio" in (body.modalities or ()):
        raise unsupported_value("modalities", "audio output is not offered here")
    if body.add_generation_prompt and body.continue_final_message:
        raise invalid("continue_final_message", "cannot be true together with 'add_generation_prompt'")


def _refuse_unsupported_completion(body: CompletionBody, card: ModelCard) -> None:
    if body.suffix and "insert" not in card.capabilities:
        raise UnsupportedCapability(card.name, "insert")
    if body.suffix and not all(isinstance(prompt, str) for prompt in _prompts(body)):
        raise unsupported_value("suffix", "token ids before it are not offered here")
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise invalid("best_of", "smaller than 'n'")
    if body.best_of is not None and body.best_of > 1 and body.stream:
        raise invalid("best_of", "more than 1 cannot be streamed")


def _refuse(**fields: Any) -> None:
    """Raise for the first field that asks for something; false, zero and empty values ask for nothing."""
    for name, value in fields.items():
        if value:
            raise unsupported_parameter(name)


def _truncate(body: GenerateBody) -> bool:
    """Whether a prompt that is too long is cut; here only on request."""
    return bool(body.truncate) or body.truncation == "auto"


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
