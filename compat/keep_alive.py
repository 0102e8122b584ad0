"""Ollama's `keep_alive`, which OpenAI bodies may carry too: seconds, or a Go duration (`spec/ollama.md` section 2).

The error texts are those of Go's `time.ParseDuration`, because Ollama's clients see them. The surprise: a bare number
inside a string is no duration, so `-1` means for ever and `"-1"` is an error.
"""

from __future__ import annotations

import re

from engines.errors import BadRequest
from engines.request import FOREVER, JSON

_LONGEST_S = 1e12
_MAX_ECHO = 100
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_TERM = re.compile(r"(\d+\.?\d*|\.\d+)([^\d.]*)", re.ASCII)
_GO_TYPES = {bool: "bool", list: "[]interface {}", dict: "map[string]interface {}"}


def parse_keep_alive(value: JSON) -> float | None:
    """The keep-alive in seconds, `FOREVER` for anything negative; None says nothing about it. Raises BadRequest."""
    if value is None:
        return None
    seconds = _seconds(value)
    return FOREVER if seconds < 0 else seconds


def _seconds(value: JSON) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(max(-1, min(value, _LONGEST_S)))  # an integer of JSON may exceed every float
    if isinstance(value, str):
        return _duration(value)
    raise _refuse(f"Unsupported type: '{_GO_TYPES[type(value)]}'")


def _duration(text: str) -> float:
    quoted = f'"{text[:_MAX_ECHO]}"'
    terms = text.removeprefix("-") if text.startswith("-") else text.removeprefix("+")
    if terms == "0":
        return 0.0
    if not terms or len(text) > _MAX_ECHO:
        raise _refuse(f"time: invalid duration {quoted}")
    seconds, position = 0.0, 0
    while position < len(terms):
        term = _TERM.match(terms, position)
        if term is None:
            raise _refuse(f"time: invalid duration {quoted}")
        number, unit = term.groups()
        if not unit:
            raise _refuse(f"time: missing unit in duration {quoted}")
        if unit not in _UNIT_S:
            raise _refuse(f'time: unknown unit "{unit}" in duration {quoted}')
        seconds += float(number) * _UNIT_S[unit]
        position = term.end()
    seconds = min(seconds, _LONGEST_S)
    return -seconds if text.startswith("-") else seconds


def _refuse(message: str) -> BadRequest:
    return BadRequest(message, param="keep_alive", reason="invalid_value")
