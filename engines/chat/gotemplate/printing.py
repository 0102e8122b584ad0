"""How Go's `fmt` writes values: `Sprint`, `Sprintln` and `Sprintf`.

Not done as Go does it: `%#v` is `%v` with strings in quotes, a `#` means nothing to a float and `%b` is no verb for it,
and a width beyond Go's limit counts as none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from engines.chat.gotemplate.gojson import encode
from engines.chat.gotemplate.numbers import format_float, format_hex_float
from engines.chat.gotemplate.quoting import as_bytes, quote
from engines.chat.gotemplate.values import INVALID, Map, PropertyType, Slice, Struct, Uint8, Value, type_name

Spend = Callable[[int], object]
"""Is told how many characters are about to be written; raises where that is too much."""

MAX_WIDTH = 1_000_000
_AS_LITERAL = "V"
"""Stands among the flags for the `#` of `%#v`."""
_VERB = re.compile(
    r"%(?P<flags>[-+# 0]*)(?P<at>\[[^\]]*\]?)?(?P<width>\*|[0-9]+)?"
    r"(?P<dot>\.(?P<pat>\[[^\]]*\]?)?(?P<precision>\*|[0-9]+)?)?(?P<vat>\[[^\]]*\]?)?(?P<verb>.)?",
    re.DOTALL,
)
_ARGUMENT = re.compile(r"\[([0-9]+)\]")


@dataclass(frozen=True, slots=True)
class _Spec:
    """One verb and how it is modified; -1 is an unsaid width or precision."""

    verb: str = "v"
    flags: str = ""
    width: int = -1
    precision: int = -1


def sprint(values: Sequence[Value]) -> str:
    """The values with a space between two of which neither is a string."""
    pieces: list[str] = []
    for index, value in enumerate(values):
        if index and not isinstance(value, str) and not isinstance(values[index - 1], str):
            pieces.append(" ")
        pieces.append(text_of(value))
    return "".join(pieces)


def sprintln(values: Sequence[Value]) -> str:
    """The values with spaces between them and a newline."""
    return " ".join(map(text_of, values)) + "\n"


def text_of(value: Value) -> str:
    """`%v`."""
    return value if isinstance(value, str) else _format(value, _Spec())


def sprintf(layout: str, values: Sequence[Value], spend: Spend) -> str:
    """The layout with its verbs filled in; what is wrong with it is written into the text, as in Go."""
    return _Filling(values, spend).fill(layout)


class _Filling:
    """One use of a layout."""

    def __init__(self, values: Sequence[Value], spend: Spend) -> None:
        self._values = values
        self._spend = spend
        self._next = 0
        self._is_reordered = False

    def fill(self, layout: str) -> str:
        """The whole text."""
        text = _VERB.sub(self._verb, layout)
        rest = self._values[self._next :]
        if rest and not self._is_reordered:
            told = (f"{type_name(value)}={text_of(value)}" if value is not None else "<nil>" for value in rest)
            text += f"%!(EXTRA {', '.join(told)})"
        return text

    def _verb(self, match: re.Match[str]) -> str:
        complaints: list[str] = []
        flags = match["flags"]
        is_good = self._move(match["at"])
        width = self._number(match["width"], "%!(BADWIDTH)", complaints)
        if width < -1:  # a computed width below zero is one to the left
            width, flags = -width, f"{flags}-"
        is_good = self._move(match["pat"]) and is_good
        precision = self._number(match["precision"], "%!(BADPREC)", complaints)
        if match["dot"] and not match["precision"]:
            precision = 0
        is_good = self._move(match["vat"]) and is_good
        verb = match["verb"]
        before = "".join(complaints)
        if verb is None:
            return f"{before}%!(NOVERB)"
        if verb == "%":
            return f"{before}%"
        if not is_good:
            return f"{before}%!{verb}(BADINDEX)"
        if self._next >= len(self._values):
            return f"{before}%!{verb}(MISSING)"
        value = self._values[self._next]
        self._next += 1
        self._spend(max(width, precision, 0))
        text = _format(value, _Spec(verb, flags, width, precision))
        self._spend(len(text))
        return before + text

    def _move(self, argument: str | None) -> bool:
        """Go to the argument of an explicit index; False for a bad one."""
        if argument is None:
            return True
        self._is_reordered = True
        match = _ARGUMENT.fullmatch(argument)
        index = int(match[1]) if match and len(match[1]) < 8 else 0
        if not 1 <= index <= len(self._values):
            return False
        self._next = index - 1
        return True

    def _number(self, text: str | None, complaint: str, complaints: list[str]) -> int:
        """A width or precision, which may be an argument."""
        if text is None:
            return -1
        if text != "*":
            number = int(text[:8])
            return number if number <= MAX_WIDTH else -1
        value = self._values[self._next] if self._next < len(self._values) else None
        self._next += self._next < len(self._values)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_WIDTH:
            complaints.append(complaint)
            return -1
        if value < 0 and complaint == "%!(BADPREC)":
            complaints.append(complaint)
            return -1
        return -1 if value == -1 and complaint == "%!(BADPREC)" else value


def _format(value: Value, spec: _Spec) -> str:
    """A value on its own. To `%v` a `+` and a `#` mean something else than to the others."""
    if spec.verb == "v" and spec.flags:
        spec = replace(spec, flags=spec.flags.replace("+", "").replace("#", _AS_LITERAL))
    if value is None or value is INVALID:
        return _pad("<nil>", spec) if spec.verb in "vT" else f"%!{spec.verb}(<nil>)"
    if spec.verb == "T":
        return _pad(type_name(value), spec)
    return _nested(value, spec)


def _nested(value: Value, spec: _Spec) -> str:
    """A value, or an element of one."""
    if spec.verb in "vsxXq" and (text := _own_text(value)) is not None:
        return _string(text, spec)
    match value:
        case bool() | int() | float() | complex() | str():
            return _basic(value, spec)
        case bytes():
            return _bytes(value, spec)
        case Slice():
            return f"[{' '.join(_nested(item, spec) for item in value)}]"
        case dict():
            return f"map[{' '.join(f'{_nested(key, spec)}:{_nested(value[key], spec)}' for key in sorted(value))}]"
        case Struct():
            star = "&" if value.type.name.startswith("*") else ""
            return f"{star}{{{' '.join(_nested(value.values[field], spec) for field, *_ in value.type.fields)}}}"
    return "<nil>"


def _basic(value: Value, spec: _Spec) -> str:
    match value:
        case bool():
            return _pad("true" if value else "false", spec) if spec.verb in "tv" else _bad(value, spec)
        case int():
            return _integer(value, spec)
        case float():
            return _float(value, spec)
        case complex():
            return _complex(value, spec)
    return _string(value, spec)


def _own_text(value: Value) -> str | None:
    """What a value prints as that has a `String` method in Ollama."""
    match value:
        case PropertyType():
            return value[0] if len(value) == 1 else f"[{' '.join(value)}]" if value else ""
        case Map():
            return encode(value)
        case Slice(prints_json=True):
            return encode(value)
        case Struct() if value.type.prints_json:
            return encode(value)
    return None


def _bad(value: Value, spec: _Spec) -> str:
    return f"%!{spec.verb}({type_name(value)}={_nested(value, replace(spec, verb='v'))})"


def _pad(text: str, spec: _Spec) -> str:
    missing = spec.width - len(text)
    if missing <= 0:
        return text
    if "-" in spec.flags:
        return text + " " * missing
    return ("0" if "0" in spec.flags else " ") * missing + text


def _string(text: str, spec: _Spec) -> str:
    match spec.verb:
        case "v" if _AS_LITERAL in spec.flags:
            return _pad(quote(text), spec)
        case "v" | "s":
            return _pad(text[: spec.precision] if spec.precision >= 0 else text, spec)
        case "q":
            text = text[: spec.precision] if spec.precision >= 0 else text
            if "#" in spec.flags and "`" not in text and all(c.isprintable() or c == "\t" for c in text):
                return _pad(f"`{text}`", spec)
            return _pad(quote(text, ascii_only="+" in spec.flags), spec)
        case "x" | "X":
            return _hex(as_bytes(text), spec)
    return _bad(text, spec)


def _hex(data: bytes, spec: _Spec) -> str:
    data = data[: spec.precision] if spec.precision >= 0 else data
    prefix = ("0x" if spec.verb == "x" else "0X") if "#" in spec.flags else ""
    digits = (f"{byte:02{spec.verb}}" for byte in data)
    if " " in spec.flags:
        return _pad(" ".join(prefix + each for each in digits), spec)
    return _pad(prefix * bool(data) + "".join(digits), spec)


def _bytes(data: bytes, spec: _Spec) -> str:
    match spec.verb:
        case "s" | "q":
            return _string(data.decode("utf-8", "surrogateescape"), spec)
        case "x" | "X":
            return _hex(data, spec)
    return f"[{' '.join(_integer(Uint8(byte), spec) for byte in data)}]"


_BASES = {"v": "d", "d": "d", "b": "b", "o": "o", "O": "o", "x": "x", "X": "X"}


def _integer(value: int, spec: _Spec) -> str:
    if spec.verb in "cqU":
        return _character(value, spec)
    base = _BASES.get(spec.verb)
    if base is None:
        return _bad(value, spec)
    sign = "-" if value < 0 else "+" if "+" in spec.flags else " " if " " in spec.flags else ""
    digits = f"{abs(value):{base}}"
    if spec.precision == 0 and not value:
        return " " * max(spec.width, 0)
    prefix = "0o" if spec.verb == "O" else ""
    if "#" in spec.flags:
        prefix = {"b": "0b", "o": "0", "x": "0x", "X": "0X"}.get(spec.verb, prefix)
    if spec.precision >= 0:
        digits = digits.rjust(spec.precision, "0")
    elif "0" in spec.flags and "-" not in spec.flags and spec.width > 0:
        digits = digits.rjust(spec.width - len(sign), "0")
    if prefix == "0" and digits.startswith("0"):
        prefix = ""
    return _pad(sign + prefix + digits, replace(spec, flags=spec.flags.replace("0", "")))


def _character(value: int, spec: _Spec) -> str:
    is_character = 0 <= value <= 0x10FFFF and not 0xD800 <= value < 0xE000
    character = chr(value) if is_character else "\ufffd"
    if spec.verb == "c":
        return _pad(character, spec)
    if spec.verb == "q":
        return _pad(quote(character, "'", ascii_only="+" in spec.flags), spec)
    shown = f" '{character}'" if "#" in spec.flags and character.isprintable() else ""
    return _pad(
        f"U+{value & (2**64 - 1):0{max(spec.precision, 4)}X}{shown}", replace(spec, flags="-" * ("-" in spec.flags))
    )


def _float(value: float, spec: _Spec) -> str:
    match spec.verb:
        case "v":
            text = format_float(value, "g", spec.precision)
        case "g" | "G":
            text = format_float(value, spec.verb, spec.precision)
            text = text.upper() if spec.verb == "G" else text
        case "e" | "E" | "f" | "F":
            text = format_float(value, spec.verb, 6 if spec.precision < 0 else spec.precision)
        case "x" | "X":
            text = format_hex_float(value)
            text = text.upper() if spec.verb == "X" else text
        case _:
            return _bad(value, spec)
    sign = text[0] if text[0] in "+-" else ""
    digits = text.removeprefix(sign) if sign else text
    if not digits[0].isdigit():  # Inf and NaN
        shown = f"{sign if sign == '-' or '+' in spec.flags or digits == 'Inf' else ''}{digits}"
        return _pad(shown, replace(spec, flags=spec.flags.replace("0", "")))
    if not sign:
        sign = "+" if "+" in spec.flags else " " if " " in spec.flags else ""
    if "0" in spec.flags and "-" not in spec.flags and spec.width > 0:
        return sign + digits.rjust(spec.width - len(sign), "0")
    return _pad(sign + digits, spec)


def _complex(value: complex, spec: _Spec) -> str:
    if spec.verb not in "vgGeEfFxX":
        return _bad(value, spec)
    imaginary = replace(spec, flags=f"{spec.flags}+")
    return f"({_float(value.real, spec)}{_float(value.imag, imaginary)}i)"
