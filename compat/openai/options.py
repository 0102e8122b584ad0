"""How tokens are chosen: OpenAI's fields, llama.cpp's samplers and Ollama's `options` (`spec/openai.md` section 4.1).

Where the same thing is said twice, the field wins over the entry in `options`. What Ollama would move to a bound or
ignore is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping

from compat.openai.refusals import invalid, invalid_type
from compat.openai.schema import CompletionBody, GenerateBody
from engines.options import (
    FURTHER_SAMPLERS,
    OptionTypeError,
    OptionValueError,
    check_options,
    parse_load_options,
    parse_sampling,
)
from engines.request import JSON, LoadOptions, Priority, Sampling

_INT32_MAX = 2**31 - 1


def parse_options(body: GenerateBody) -> tuple[Sampling, LoadOptions]:
    """Sampling and load options. Raises BadRequest."""
    options: Mapping[str, JSON] = body.options or {}
    further = {name: getattr(body, name) for name in FURTHER_SAMPLERS}
    _check(further)
    _check(options, "options.")
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
    return said.over(parse_sampling(further)).over(parse_sampling(options)), parse_load_options(options)


def parse_priority(body: GenerateBody, num_prompts: int = 1) -> Priority:
    """A list of prompts and the cheap tier can wait; whoever streams reads along."""
    if body.service_tier == "flex" or num_prompts > 1:
        return Priority.BATCH
    return Priority.INTERACTIVE if body.stream else Priority.NORMAL


def _check(options: Mapping[str, JSON], prefix: str = "") -> None:
    try:
        check_options(options)
    except OptionTypeError as error:
        raise invalid_type(prefix + error.name, error.expected, type(options[error.name]).__name__) from None
    except OptionValueError as error:
        raise invalid(prefix + error.name, error.why, _reason(options[error.name], error.nearest)) from None


def _reason(value: JSON, nearest: float | None) -> str:
    """OpenAI's code for a number that is out of range."""
    if nearest is None:
        return "invalid_value"
    kind = "integer" if isinstance(nearest, int) else "decimal"
    return f"{kind}_below_min_value" if value < nearest else f"{kind}_above_max_value"


def _seed(seed: int | None) -> int | None:
    """The seed modulo 2**32, except -1, which means random in llama.cpp."""
    return seed if seed is None or seed == -1 else seed % 2**32


def _stop(stop: str | list[str] | None) -> tuple[str, ...] | None:
    strings = [stop] if isinstance(stop, str) else stop or []
    return tuple(string for string in strings if string) or None


def _max_tokens(body: GenerateBody) -> int | None:
    """The token limit, clamped to what any context can hold; -1 means none, and 0 may only show the prompt again."""
    limits = {
        "max_completion_tokens": body.max_completion_tokens,
        "max_tokens": body.max_tokens,
        "n_predict": body.n_predict,
    }
    least = 0 if isinstance(body, CompletionBody) and body.echo else 1
    for name, limit in limits.items():
        if limit is not None:
            if limit < least and limit != -1:
                raise invalid(name, f"expected a value >= {least}, or -1 for no limit", "integer_below_min_value")
            return min(limit, _INT32_MAX)
    return None
