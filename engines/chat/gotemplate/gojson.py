"""A template's values as JSON, in the way of Go's encoder: maps sorted, structs as declared, markup escaped."""

from __future__ import annotations

import base64
import json
import math
import re
from decimal import Decimal

from engines.chat.gotemplate.values import ANY_SLICE, INVALID, Map, PropertyType, Slice, Struct, Value

_ESCAPED = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def encode(value: Value) -> str:
    """Compact JSON; empty for what Go's encoder refuses. Raises RecursionError."""
    try:
        return _encode(value)
    except ValueError:
        return ""


def _encode(value: Value) -> str:
    if value is None or value is INVALID:
        return "null"
    match value:
        case bool() | int() | float():
            return _number(value)
        case str():
            return _string(value)
        case bytes():
            return f'"{base64.b64encode(value).decode()}"'
        case dict():
            keys = value if isinstance(value, Map) and value.keeps_order else sorted(value)
            return "{" + ",".join(f"{_string(key)}:{_encode(value[key])}" for key in keys) + "}"
        case PropertyType() if len(value) == 1:
            return _encode(value[0])
        case Slice() if not value and value.type not in (ANY_SLICE, "template.templateTools"):
            return "null"  # Ollama has none where the request says none
        case Slice():
            return f"[{','.join(map(_encode, value))}]"
        case Struct():
            return _struct(value)
    raise ValueError


def _struct(value: Struct) -> str:
    fields = ((name, value.values[field], omits) for field, name, omits in value.type.fields)
    shown = ((name, item) for name, item, omits in fields if not (omits and _is_empty(item)))
    return "{" + ",".join(f'"{name}":{_encode(item)}' for name, item in shown) + "}"


def _is_empty(value: Value) -> bool:
    return value is None or (isinstance(value, (str, dict, bytes, Slice)) and not value)


def _string(text: str) -> str:
    return _ESCAPED.sub(_escape, json.dumps(text, ensure_ascii=False))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\u{0xFFFD if 0xD800 <= code < 0xE000 else code:04x}"


def _number(number: float) -> str:
    """A float in its shortest digits, without `.0`, and with an exponent only below 1e-6 and from 1e21."""
    if isinstance(number, bool):
        return "true" if number else "false"
    if isinstance(number, int):
        return str(int(number))
    if not math.isfinite(number):
        raise ValueError
    if number and not 1e-6 <= abs(number) < 1e21:
        mantissa, _, exponent = repr(number).partition("e")
        return f"{mantissa.removesuffix('.0')}e{exponent[0]}{exponent[1:].lstrip('0')}"
    return f"{Decimal(repr(number)):f}".removesuffix(".0")
