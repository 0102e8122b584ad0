"""The functions of Go's templates, and Ollama's own (`spec/ollama.md` section 8.3).

`and`, `or` and `call` are the executor's, because they do not take their arguments as the others do. The surprise: a
function raises `FunctionError` with nothing but Go's words for what is wrong; where that was is the executor's to tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from urllib.parse import quote_plus

from engines.chat.gotemplate.gojson import encode
from engines.chat.gotemplate.printing import Spend, sprint, sprintf, sprintln
from engines.chat.gotemplate.quoting import as_bytes, as_text
from engines.chat.gotemplate.values import (
    INVALID,
    Map,
    PropertyType,
    Slice,
    Struct,
    Uint8,
    Value,
    is_nil,
    length,
    truth,
    type_name,
)

Kind = Literal["value", "any", "string"]
"""What a parameter is: anything at all, an `interface{}`, or a string."""


class FunctionError(Exception):
    """A function cannot take what it is given."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function: what it needs, what it takes beyond that, and what it does."""

    run: Callable[..., Value]
    parameters: tuple[Kind, ...] = ()
    rest: Kind | None = None


def make_functions(now: Callable[[], datetime], spend: Spend) -> dict[str, Function]:
    """Every function by its name, for one render.

    Args:
        now: the clock behind the dates.
        spend: told how much is about to be built.
    """

    def printf(layout: str, *values: Value) -> str:
        return sprintf(layout, values, spend)

    def metered(inner: Callable[..., str]) -> Callable[..., str]:
        def run(*values: Value) -> str:
            text = inner(*values)
            spend(len(text))
            return text

        return run

    date = "%Y-%m-%d"
    return {
        "eq": Function(_eq, ("value",), "value"),
        "ne": Function(lambda left, right: not _eq(left, right), ("value", "value")),
        "lt": Function(_lt, ("value", "value")),
        "le": Function(_le, ("value", "value")),
        "gt": Function(lambda left, right: not _le(left, right), ("value", "value")),
        "ge": Function(lambda left, right: not _lt(left, right), ("value", "value")),
        "not": Function(lambda value: not truth(value), ("value",)),
        "len": Function(_len, ("value",)),
        "index": Function(_index, ("value",), "value"),
        "slice": Function(_slice(spend), ("value",), "value"),
        "print": Function(metered(lambda *values: sprint(values)), (), "any"),
        "println": Function(metered(lambda *values: sprintln(values)), (), "any"),
        "printf": Function(printf, ("string",), "any"),
        "html": Function(metered(lambda *values: _html(_shown(values))), (), "any"),
        "js": Function(metered(lambda *values: _js(_shown(values))), (), "any"),
        "urlquery": Function(metered(lambda *values: quote_plus(as_bytes(_shown(values)))), (), "any"),
        "json": Function(metered(encode), ("any",)),
        "currentDate": Function(lambda *_: now().strftime(date), (), "string"),
        "yesterdayDate": Function(lambda *_: (now() - timedelta(days=1)).strftime(date), (), "string"),
        "toTypeScriptType": Function(metered(_typescript), ("any",)),
    }


# comparing


def _kind(value: Value) -> str:
    """Go's basic kinds; empty for what has none."""
    match value:
        case bool():
            return "bool"
        case Uint8() | int():
            return "int"  # signed or not is all one where no number is negative
        case float():
            return "float"
        case complex():
            return "complex"
        case str():
            return "string"
    return ""


def _eq(first: Value, *others: Value) -> bool:
    if not others:
        raise FunctionError("missing argument for comparison")
    return any(_are_equal(first, other) for other in others)


def _are_equal(left: Value, right: Value) -> bool:
    kind = _kind(left)
    if kind != _kind(right):
        if _is_nothing(left) or _is_nothing(right):
            return False
        raise FunctionError(f"incompatible types for comparison: {type_name(left)} and {type_name(right)}")
    if kind:
        return bool(left == right)
    if not _is_nothing(left) and not _is_nothing(right) and _composite(left) is not _composite(right):
        one, other = (sprintf("%s", [value], _unmetered) for value in (left, right))
        raise FunctionError(f"non-comparable types {one}: {type_name(left)}, {type_name(right)}: {other}")
    if is_nil(left) or is_nil(right):
        return is_nil(left) and is_nil(right)
    if not isinstance(right, Struct) or not right.type.name.startswith("*"):
        raise FunctionError(f"non-comparable type {sprintf('%s', [right], _unmetered)}: {type_name(right)}")
    return left is right


def _unmetered(size: int) -> None:
    """For texts of errors, which end the render."""


def _composite(value: Value) -> type:
    """Go's other kinds: a map, a struct or a list."""
    return next((kind for kind in (dict, Struct) if isinstance(value, kind)), Slice)


def _is_nothing(value: Value) -> bool:
    return value is None or value is INVALID


def _lt(left: Value, right: Value) -> bool:
    kinds = _kind(left), _kind(right)
    if not all(kinds):
        raise FunctionError("invalid type for comparison")
    if kinds[0] != kinds[1]:
        raise FunctionError(f"incompatible types for comparison: {type_name(left)} and {type_name(right)}")
    if kinds[0] in ("bool", "complex"):
        raise FunctionError("invalid type for comparison")
    return bool(as_bytes(left) < as_bytes(right)) if kinds[0] == "string" else bool(left < right)


def _le(left: Value, right: Value) -> bool:
    return _lt(left, right) or _are_equal(left, right)


# parts


def _len(value: Value) -> int:
    if value is None:
        raise FunctionError("len of nil pointer")
    if isinstance(value, str):
        return length(value)
    if isinstance(value, (Slice, dict, bytes)):
        return len(value)
    if value is INVALID:
        raise FunctionError("reflect: call of reflect.Value.Type on zero Value")
    raise FunctionError(f"len of type {type_name(value)}")


def _bound(index: Value, limit: int) -> int:
    if _is_nothing(index):
        raise FunctionError("cannot index slice/array with nil")
    if isinstance(index, bool) or not isinstance(index, int):
        raise FunctionError(f"cannot index slice/array with type {type_name(index)}")
    if not 0 <= index <= limit:
        raise FunctionError(f"index out of range: {index}")
    return int(index)


def _index(item: Value, *indexes: Value) -> Value:
    if _is_nothing(item):
        raise FunctionError("index of untyped nil")
    for index in indexes:
        if item is None:
            raise FunctionError("index of nil pointer")
        item = _element(item, index)
    return item


def _element(item: Value, index: Value) -> Value:
    match item:
        case str():
            data = as_bytes(item)
            return Uint8(_at(data, index))
        case bytes():
            return Uint8(_at(item, index))
        case Slice():
            return _at(item, index)
        case dict():
            if _is_nothing(index):
                raise FunctionError("value is nil; should be of type string")
            if not isinstance(index, str):
                raise FunctionError(f"value has type {type_name(index)}; should be string")
            return item.get(index, item.zero if isinstance(item, Map) else None)
    raise FunctionError(f"can't index item of type {type_name(item)}")


def _at(items: bytes | Slice, index: Value) -> Value:
    position = _bound(index, len(items))
    if position == len(items):  # passes Go's own check, and fails in its reflection
        raise FunctionError("reflect: slice index out of range")
    return items[position]


def _slice(spend: Spend) -> Callable[..., Value]:
    def cut(item: Value, *indexes: Value) -> Value:
        if _is_nothing(item):
            raise FunctionError("slice of untyped nil")
        if len(indexes) > 3:
            raise FunctionError(f"too many slice indexes: {len(indexes)}")
        if isinstance(item, str) and len(indexes) == 3:
            raise FunctionError("cannot 3-index slice a string")
        if not isinstance(item, (str, bytes, Slice)):
            raise FunctionError(f"can't slice item of type {type_name(item)}")
        if not isinstance(item, Slice):
            spend(len(item))
            data = as_bytes(item) if isinstance(item, str) else item
            start, stop, _ = _bounds(indexes, len(data), len(data))
            return as_text(data[start:stop]) if isinstance(item, str) else data[start:stop]
        start, stop, capacity = _bounds(indexes, len(item), item.capacity)
        return item.cut(start, stop, capacity)

    return cut


def _bounds(indexes: tuple[Value, ...], size: int, capacity: int) -> tuple[int, int, int | None]:
    start, stop, end, *_ = [*(_bound(index, capacity) for index in indexes), *[-1] * 3]
    start, stop = max(start, 0), size if stop < 0 else stop
    if start > stop:
        raise FunctionError(f"invalid slice index: {start} > {stop}")
    if stop > end >= 0:
        raise FunctionError(f"invalid slice index: {stop} > {end}")
    return start, stop, end if end >= 0 else None


# escaping

_HTML = str.maketrans(
    {"\0": "\ufffd", '"': "&#34;", "'": "&#39;", "&": "&amp;", "<": "&lt;", ">": "&gt;"},
)
_JS = re.compile("[\\\\'\"<>&=\\x00-\\x1f\\x80-\\U0010ffff]")
_JS_NAMES = {"\\": r"\\", "'": r"\'", '"': r"\""}


def _shown(values: tuple[Value, ...]) -> str:
    return sprint(["<no value>" if value is None else value for value in values])


def _html(text: str) -> str:
    return text.translate(_HTML)


def _js(text: str) -> str:
    return _JS.sub(_escape_js, text)


def _escape_js(match: re.Match[str]) -> str:
    character = match[0]
    if character >= "\x80" and character.isprintable():
        return character
    return _JS_NAMES.get(character) or f"\\u{0xFFFD if 0xD800 <= ord(character) < 0xE000 else ord(character):04X}"


# tools

_TYPESCRIPT = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "array": "any[]",
    "object": "Record<string, any>",
}


def _typescript(value: Value) -> str:
    """A tool's parameter as a TypeScript type."""
    if not isinstance(value, Struct) or "AnyOf" not in value.values:
        return "any"
    if value.values["AnyOf"]:
        return " | ".join(map(_typescript, value.values["AnyOf"]))
    names = value.values["Type"]
    assert isinstance(names, PropertyType)
    return " | ".join(_TYPESCRIPT.get(name, "any") for name in names) or "any"


NAMES = frozenset(make_functions(datetime.now, lambda size: None)) | {"and", "or", "call"}
"""Every function that a template may call."""
