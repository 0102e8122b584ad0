"""JSON exactly as Go's encoder writes it, because digests are taken of these bytes (`spec/ollama.md` section 10)."""

from __future__ import annotations

import math
import re
from decimal import Decimal

import msgspec

from engines.request import JSON

_ESCAPED = re.compile(rb"[<>&]|\xe2\x80[\xa8\xa9]")  # the last two are U+2028 and U+2029


def encode_json(value: JSON) -> bytes:
    """Compact JSON and a newline: keys of maps sorted, fields of structs as declared, `<`, `>` and `&` escaped.

    Raises:
        ValueError: a number is infinite or none.
    """
    text = msgspec.json.encode(_with_go_floats(value), order="deterministic")
    return _ESCAPED.sub(lambda match: b"\\u%04x" % ord(match[0].decode()), text) + b"\n"


def _with_go_floats(value: JSON) -> JSON:
    match value:
        case dict():
            return {key: _with_go_floats(item) for key, item in value.items()}
        case list() | tuple():
            return [_with_go_floats(item) for item in value]
        case float():
            return msgspec.Raw(_go_float(value).encode())
    return value


def _go_float(number: float) -> str:
    """Shortest digits; no `.0`; an exponent only below 1e-6 and from 1e21 (Go encoding/json, floatEncoder)."""
    if not math.isfinite(number):
        raise ValueError(f"JSON cannot hold {number}")
    if number and not 1e-6 <= abs(number) < 1e21:
        mantissa, _, exponent = repr(number).partition("e")
        return f"{mantissa.removesuffix('.0')}e{exponent[0]}{exponent[1:].lstrip('0')}"
    return f"{Decimal(repr(number)):f}".removesuffix(".0")
