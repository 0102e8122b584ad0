"""Ollama's `keep_alive`, which OpenAI bodies may carry too: seconds, or a Go duration (`spec/ollama.md` section 1)."""

from __future__ import annotations

import re

from compat.openai.refusals import invalid
from engines.request import FOREVER, JSON

_LONGEST_S = 1e12
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER_AND_UNIT = r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)"
_DURATION = re.compile(rf"[+-]?(?:{_NUMBER_AND_UNIT})+", re.ASCII)
_TERM = re.compile(_NUMBER_AND_UNIT, re.ASCII)


def parse_keep_alive(value: JSON) -> float | None:
    """The keep-alive in seconds, `FOREVER` for anything negative; None says nothing about it. Raises BadRequest."""
    if value is None:
        return None
    seconds = _seconds(value)
    return FOREVER if seconds < 0 else seconds


def _seconds(value: JSON) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(max(-1, min(value, _LONGEST_S)))  # an integer of JSON may exceed every float
    if isinstance(value, str) and len(value) <= 100:
        if value == "0":
            return 0.0
        if _DURATION.fullmatch(value):
            seconds = sum(float(number) * _UNIT_S[unit] for number, unit in _TERM.findall(value))
            return -seconds if value.startswith("-") else seconds
    raise invalid("keep_alive", "expected seconds or a duration such as '5m'")
