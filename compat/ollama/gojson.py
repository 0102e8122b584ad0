"""JSON as Go's `encoding/json` reads and writes it (`spec/ollama.md` section 1).

Reading is more forgiving than the standard: only the first value counts, and bad UTF-8 or half a surrogate pair becomes
U+FFFD. Writing escapes what HTML could mistake for markup. Error texts are Go's, as far as msgspec tells what is wrong.
"""

from __future__ import annotations

import re

import msgspec

from engines.errors import BadRequest
from engines.request import JSON

_WHITESPACE = b" \t\r\n"
_PAIR_OR_SURROGATE_OR_OTHER = re.compile(
    rb"(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\."
)
_MALFORMED = re.compile(r"JSON is malformed: (?P<what>.*) \(byte (?P<position>\d+)\)")
_CONTEXTS = {
    "object keys must be strings": "looking for beginning of object key string",
    "expected ':'": "after object key",
    "expected ',' or '}'": "after object key:value pair",
    "expected ',' or ']'": "after array element",
}
_UNSAFE = re.compile(rb"[<>&]|\xe2\x80[\xa8\xa9]")  # the last two are U+2028 and U+2029
_GO_ESCAPES = dict(zip('"\\\a\b\f\n\r\t\v', (r"\"", r"\\", *(rf"\{letter}" for letter in "abfnrtv")), strict=True))
_encode = msgspec.json.Encoder().encode


def decode_first(data: bytes) -> JSON:
    """The first JSON value of a body; what comes after it is ignored. Raises BadRequest."""
    data = _mend(data)
    if not data.strip(_WHITESPACE):
        raise BadRequest("missing request body")
    try:
        return msgspec.json.decode(data)
    except msgspec.ValidationError:
        raise BadRequest("json: cannot unmarshal number into Go value of type float64") from None
    except msgspec.DecodeError as error:
        return _decode_before(data, str(error))
    except RecursionError:
        raise BadRequest("exceeded max depth") from None


def _decode_before(data: bytes, complaint: str) -> JSON:
    """What comes before the byte that msgspec complains about, when that is a whole value."""
    malformed = _MALFORMED.fullmatch(complaint)
    if malformed is None:
        raise BadRequest("unexpected EOF")
    what, position = malformed["what"], int(malformed["position"])
    if what == "trailing characters":
        return decode_first(data[: position - 1])
    if position >= len(data):
        raise BadRequest("unexpected EOF")
    context = _CONTEXTS.get(what, "looking for beginning of value")
    raise BadRequest(f"invalid character {_quote_character(chr(data[position]))} {context}")


def _mend(data: bytes) -> bytes:
    """The bytes with U+FFFD for what is no Unicode, raw or escaped."""
    data = data.decode(errors="replace").encode()
    if b"\\ud" in data or b"\\uD" in data:
        return _PAIR_OR_SURROGATE_OR_OTHER.sub(lambda escape: b"\\ufffd" if escape[2] else escape[0], data)
    return data


def encode(value: object) -> bytes:
    """Compact JSON with `<`, `>`, `&`, U+2028 and U+2029 escaped."""
    return _UNSAFE.sub(lambda match: b"\\u%04x" % ord(match[0].decode()), _encode(value))


def quote(text: str) -> str:
    """The text as a Go string literal, `%q`."""
    return '"' + "".join(_GO_ESCAPES.get(character) or _printable(character) for character in text) + '"'


def _quote_character(character: str) -> str:
    """The character as Go's decoder shows it, each kind of quote in the other."""
    shown = {"'": "\\'", '"': '"'}.get(character) or quote(character)[1:-1]
    return f"'{shown}'"


def _printable(character: str) -> str:
    code = ord(character)
    if character.isprintable():
        return character
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
