"""Ollama's option names, which are both a wire format and what a model's params layer holds on disk.

Types, truncation and error texts follow `spec/ollama.md` section 3: unknown names are ignored, `null` is skipped,
integer options accept any JSON number and truncate toward zero, and a wrong type is an error naming the option.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from engines.errors import HeadwaterError
from engines.request import JSON, LoadOptions, Sampling


class OptionTypeError(HeadwaterError):
    """An option has the wrong JSON type. Ollama answers 500 here, and clients see that status."""

    code = "invalid_option"


def parse_sampling(options: Mapping[str, JSON]) -> Sampling:
    """The sampling part of an options object.

    Raises:
        OptionTypeError: a known option has the wrong type.
    """
    return Sampling(
        temperature=_float(options, "temperature"),
        top_k=_integer(options, "top_k"),
        top_p=_float(options, "top_p"),
        min_p=_float(options, "min_p"),
        typical_p=_float(options, "typical_p"),
        repeat_last_n=_integer(options, "repeat_last_n"),
        repeat_penalty=_float(options, "repeat_penalty"),
        presence_penalty=_float(options, "presence_penalty"),
        frequency_penalty=_float(options, "frequency_penalty"),
        seed=_integer(options, "seed"),
        stop=_stop(options),
        max_tokens=_integer(options, "num_predict"),
    )


def parse_load_options(options: Mapping[str, JSON]) -> LoadOptions:
    """The load-time part of an options object.

    Raises:
        OptionTypeError: a known option has the wrong type.
    """
    use_mmap = options.get("use_mmap")
    if use_mmap is not None and not isinstance(use_mmap, bool):
        raise OptionTypeError('option "use_mmap" must be of type boolean')
    return LoadOptions(
        num_ctx=_integer(options, "num_ctx"),
        num_batch=_integer(options, "num_batch"),
        num_gpu=_integer(options, "num_gpu"),
        main_gpu=_integer(options, "main_gpu"),
        use_mmap=use_mmap,
        num_thread=_integer(options, "num_thread"),
    )


def _integer(options: Mapping[str, JSON], name: str) -> int | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise OptionTypeError(f'option "{name}" must be of type integer')
    return int(value)


def _float(options: Mapping[str, JSON], name: str) -> float | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionTypeError(f'option "{name}" must be of type float32')
    return float(value)


def _stop(options: Mapping[str, JSON]) -> tuple[str, ...] | None:
    value = options.get("stop")
    if value is None:
        return None
    if not isinstance(value, list):
        raise OptionTypeError('option "stop" must be of type array')
    if not all(isinstance(item, str) for item in value):
        raise OptionTypeError('option "stop" must be of an array of strings')
    return tuple(value)
