"""Option names, which are both a wire format and what a model's params layer holds on disk.

Ollama's names follow `spec/ollama.md` section 3: unknown ones are ignored, `null` is skipped, integer options accept
any JSON number and truncate toward zero, and a wrong type is an error naming the option. A number beyond what an engine
can hold is moved to the bound, as Ollama cuts it to a machine word. llama.cpp's further samplers, which Ollama ignores
whatever they are, count where they make sense and are ignored where they do not. `check_options` is for those who
would rather be told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from engines.errors import HeadwaterError
from engines.request import JSON, LoadOptions, Sampling

MAX_BIASES = 1024
MAX_BREAKERS = 64
MAX_TEXT = 256
"""Characters of a biased text or a sequence breaker."""

BAN = -100.0
"""The least bias; it and less mean that a token never comes."""

_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1
_TOKEN_ID = re.compile(r"[0-9]{1,10}")


class OptionTypeError(HeadwaterError):
    """An option has the wrong JSON type. Ollama answers 500 here, and clients see that status."""

    code = "invalid_option"

    def __init__(self, name: str, expected: str) -> None:
        super().__init__(f'option "{name}" must be of {expected}')
        self.name = name
        self.expected = expected


class OptionValueError(HeadwaterError):
    """An option has an impossible value; `nearest` is the closest possible number, None where there is none."""

    code = "invalid_option"

    def __init__(self, name: str, why: str, nearest: float | None = None) -> None:
        super().__init__(f'option "{name}": {why}')
        self.name = name
        self.why = why
        self.nearest = nearest


Reader = Callable[[str, JSON], Any]
"""From an option's name and value to what it means. Raises OptionTypeError, OptionValueError."""


def parse_sampling(options: Mapping[str, JSON]) -> Sampling:
    """The sampling part of an options object.

    Raises:
        OptionTypeError: one of Ollama's options has the wrong type.
    """
    said = _read(options, _SAMPLERS)
    return Sampling(**{_FIELDS.get(name, name): value for name, value in said.items()})


def parse_load_options(options: Mapping[str, JSON]) -> LoadOptions:
    """The load-time part of an options object.

    Raises:
        OptionTypeError: a known option has the wrong type.
    """
    return LoadOptions(**_read(options, _LOAD))


def parse_num_keep(*layers: Mapping[str, JSON]) -> int:
    """How much of a prompt's beginning is kept when it is cut, by the first layer that says so.

    Raises:
        OptionTypeError: it is no number.
    """
    said = [kept for layer in layers for kept in _read(layer, _PROMPT).values()]
    return said[0] if said else DEFAULT_NUM_KEEP


def check_options(options: Mapping[str, JSON]) -> None:
    """Refuse what the parsers would move to a bound or ignore.

    Raises:
        OptionTypeError, OptionValueError: the first known option that is not what it should be.
    """
    for name, value in options.items():
        if name in _KNOWN and value is not None:
            _KNOWN[name](name, value)


def _read(options: Mapping[str, JSON], readers: Mapping[str, Reader]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in options.items():
        if name not in readers or value is None:
            continue
        try:
            fields[name] = readers[name](name, value)
        except OptionTypeError:
            if name not in FURTHER_SAMPLERS:
                raise
        except OptionValueError as error:
            if name not in FURTHER_SAMPLERS:
                fields[name] = error.nearest
    return fields


def _integer(low: int = _INT32_MIN, high: int = _INT32_MAX) -> Reader:
    def read(name: str, value: JSON) -> int:
        if not _is_number(value):
            raise OptionTypeError(name, "type integer")
        return int(_bounded(name, value, low, high))

    return read


def _real(low: float = float(_INT32_MIN), high: float = float(_INT32_MAX)) -> Reader:
    def read(name: str, value: JSON) -> float:
        if not _is_number(value):
            raise OptionTypeError(name, "type float32")
        return float(_bounded(name, value, low, high))

    return read


def _is_number(value: JSON) -> bool:
    """Whether it is one of JSON's, which has neither infinity nor NaN."""
    return not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    )


def _bounded(name: str, value: float, low: float, high: float) -> float:
    """The value, before any conversion: an integer of JSON may exceed every float."""
    if value < low:
        raise OptionValueError(name, f"expected a value >= {low}", low)
    if value > high:
        raise OptionValueError(name, f"expected a value <= {high}", high)
    return value


def _boolean(name: str, value: JSON) -> bool:
    if not isinstance(value, bool):
        raise OptionTypeError(name, "type boolean")
    return value


def _strings(name: str, value: JSON) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise OptionTypeError(name, "type array")
    if not all(isinstance(item, str) for item in value):
        raise OptionTypeError(name, "an array of strings")
    return tuple(value)


def _breakers(name: str, value: JSON) -> tuple[str, ...]:
    texts = _strings(name, value)
    if len(texts) > MAX_BREAKERS or any(len(text) > MAX_TEXT for text in texts):
        raise OptionValueError(name, f"expected at most {MAX_BREAKERS} strings of at most {MAX_TEXT} characters")
    return texts


def _logit_bias(name: str, value: JSON) -> tuple[tuple[int | str, float], ...] | None:
    """OpenAI's `{"id": bias}` or llama.cpp's `[[id or text, bias or false], ...]`; nothing when it is empty."""
    if not isinstance(value, (dict, list)):
        raise OptionTypeError(name, "type object")
    if len(value) > MAX_BIASES:
        raise OptionValueError(name, f"expected at most {MAX_BIASES} entries")
    if isinstance(value, dict):
        value = [[_token_id(name, key), bias] for key, bias in value.items()]
    return tuple(_biased(name, pair) for pair in value) or None


def _token_id(name: str, key: str) -> int:
    if not _TOKEN_ID.fullmatch(key):
        raise OptionValueError(name, f"{key[:40]!r} is no token id")
    return int(key)


def _biased(name: str, pair: JSON) -> tuple[int | str, float]:
    match pair:
        case [int() as token, bias] if not isinstance(token, bool):
            if not 0 <= token <= _INT32_MAX:
                raise OptionValueError(name, "a token id is out of range")
            return token, _bias(name, bias)
        case [str() as text, bias] if 0 < len(text) <= MAX_TEXT:
            return text, _bias(name, bias)
        case _:
            raise OptionValueError(name, f"expected pairs of a token id, or 1 to {MAX_TEXT} characters, and a bias")


def _bias(name: str, bias: JSON) -> float:
    """A number from -100 to 100; the least of it, and false, ban the token."""
    if bias is False:
        return -math.inf
    if not _is_number(bias) or not BAN <= bias <= -BAN:
        raise OptionValueError(name, f"expected a bias from {BAN:g} to {-BAN:g}")
    return -math.inf if bias == BAN else float(bias)


_SAMPLING: Mapping[str, Reader] = {
    "temperature": _real(),
    "top_k": _integer(),
    "top_p": _real(),
    "min_p": _real(),
    "typical_p": _real(),
    "repeat_last_n": _integer(),
    "repeat_penalty": _real(1e-6),  # it divides; below zero it would even lift what a grammar forbids
    "presence_penalty": _real(),
    "frequency_penalty": _real(),
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": _strings,
    "num_predict": _integer(),
}
_FIELDS = {"num_predict": "max_tokens"}
"""Where Ollama's name is not ours."""

FURTHER_SAMPLERS: Mapping[str, Reader] = {
    "top_n_sigma": _real(-1.0, 1e6),
    "xtc_probability": _real(0.0, 1.0),
    "xtc_threshold": _real(0.0, 1.0),
    "dry_multiplier": _real(0.0, 1e3),
    "dry_base": _real(1.0, 1e3),
    "dry_allowed_length": _integer(0),
    "dry_penalty_last_n": _integer(-1),
    "dry_sequence_breakers": _breakers,
    "mirostat": _integer(0, 2),
    "mirostat_tau": _real(0.0, 1e3),
    "mirostat_eta": _real(0.0, 1e3),
    "dynatemp_range": _real(0.0, 1e3),
    "dynatemp_exponent": _real(0.0, 1e3),
    "ignore_eos": _boolean,
    "logit_bias": _logit_bias,
}
"""llama.cpp's, by its names, which are our fields' too."""

_SAMPLERS = {**_SAMPLING, **FURTHER_SAMPLERS}
_LOAD: Mapping[str, Reader] = {
    "num_ctx": _integer(4),
    "num_batch": _integer(1, 2**16),  # one buffer each
    "num_gpu": _integer(),
    "main_gpu": _integer(),
    "use_mmap": _boolean,
    "num_thread": _integer(0, 1024),  # one thread each
}
_PROMPT: Mapping[str, Reader] = {"num_keep": _integer()}
DEFAULT_NUM_KEEP = 4

_KNOWN = {**_SAMPLERS, **_LOAD, **_PROMPT}

OPTION_NAMES = frozenset(_KNOWN)
"""Every option that means something."""

LIST_OPTIONS = frozenset({"stop", "dry_sequence_breakers"})
"""Those whose value is a list of texts."""
