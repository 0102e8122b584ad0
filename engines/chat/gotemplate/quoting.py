"""Go's string literals: read as `strconv.Unquote` does, written as `%q` does.

A Go string is bytes. Here it is a `str` in which a byte that is no UTF-8 is a lone surrogate, as Python's
`surrogateescape` has it; `as_bytes` and `as_text` go between the two.
"""

from __future__ import annotations

import re

_SIMPLE = {
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
    "\\": "\\",
    "'": "'",
    '"': '"',
}
_NAMES = {code: f"\\{name}" for name, code in _SIMPLE.items() if name not in "'\""}
_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|([abfnrtv\\'\"]))")


def as_bytes(text: str) -> bytes:
    """The bytes of a Go string. Half a surrogate pair that stands for no byte is no text; Go has U+FFFD for it."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return _NO_BYTE.sub("\ufffd", text).encode("utf-8", "surrogateescape")


def as_text(data: bytes) -> str:
    """The Go string of these bytes."""
    return data.decode("utf-8", "surrogateescape")


def unquote(literal: str) -> str:
    """The text of a string in double quotes or backquotes. Raises ValueError."""
    body = literal[1:-1]
    if literal[0] == "`":
        return body.replace("\r", "")
    if "\\" not in body:
        return body
    pieces, at = [], 0
    while (backslash := body.find("\\", at)) >= 0:
        pieces += [as_bytes(body[at:backslash])]
        value, at = _unescape(body, backslash, '"')
        pieces.append(value)
    return as_text(b"".join([*pieces, as_bytes(body[at:])]))


def unquote_character(literal: str) -> int:
    """The code of a character in single quotes. Raises ValueError."""
    body = literal[1:-1]
    if not body:
        raise ValueError("invalid syntax")
    code, end = ord(body[0]), 1
    if body.startswith("\\"):
        value, end = _unescape(body, 0, "'")
        code = value[0] if len(value) == 1 else ord(value.decode())
    if end < len(body):
        raise ValueError(f"malformed character constant: {literal}")
    return code


def _unescape(body: str, start: int, mark: str) -> tuple[bytes, int]:
    """The bytes of the escape that begins at `start`, and where it ends; `mark` is the only quote that may be one."""
    match = _ESCAPE.match(body, start)
    if match is None or (match[5] in ("'", '"') and match[5] != mark):
        raise ValueError("invalid syntax")
    hexadecimal, short, long, octal, simple = match.groups()
    if simple:
        return _SIMPLE[simple].encode(), match.end()
    code = int(hexadecimal or short or long or octal, 8 if octal else 16)
    if code > (0xFF if hexadecimal or octal else 0x10FFFF) or (not (hexadecimal or octal) and 0xD800 <= code < 0xE000):
        raise ValueError("invalid syntax")
    return (bytes([code]) if hexadecimal or octal else chr(code).encode()), match.end()


def quote(text: str, mark: str = '"', *, ascii_only: bool = False) -> str:
    """The text as a Go literal, `%q`; `%+q` with `ascii_only`."""
    return mark + "".join(_escape(character, mark, ascii_only) for character in text) + mark


def _escape(character: str, mark: str, ascii_only: bool) -> str:
    if character == mark:
        return f"\\{mark}"
    if character in _NAMES:
        return _NAMES[character]
    code = ord(character)
    if character.isprintable() and (code < 0x7F or not ascii_only):
        return character
    if 0xDC80 <= code < 0xDD00:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x20 or code == 0x7F:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
