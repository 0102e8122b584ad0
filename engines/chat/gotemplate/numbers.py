"""Numbers: read as Go reads constants, written as Go's `fmt` and `strconv` write them."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from engines.chat.gotemplate.quoting import quote

_INT = re.compile(
    r"(?P<sign>[+-]?)(?:0[xX](?P<hex>_?[0-9a-fA-F]+(?:_[0-9a-fA-F]+)*)|0[bB](?P<bin>_?[01]+(?:_[01]+)*)"
    r"|0[oO]?(?P<oct>_?[0-7]+(?:_[0-7]+)*)|(?P<dec>0|[1-9][0-9]*(?:_[0-9]+)*))"
)
_FLOAT = re.compile(r"[+-]?(?:[0-9]+(?:_[0-9]+)*\.?(?:[0-9]+(?:_[0-9]+)*)?|\.[0-9]+(?:_[0-9]+)*)(?:[eE][+-]?[0-9]+)?")
_HEX_FLOAT = re.compile(r"[+-]?0[xX](?=[0-9a-fA-F.])[0-9a-fA-F_]*\.?[0-9a-fA-F]*[pP][+-]?[0-9]+")
_BASES = {"hex": 16, "bin": 2, "oct": 8, "dec": 10}
MAX_INT, MIN_INT, MAX_UINT = 2**63 - 1, -(2**63), 2**64 - 1


def parse_complex(text: str) -> complex:
    """`1+2i`. Raises ValueError."""
    at = max(text.rfind("+"), text.rfind("-"))
    if text[at - 1] in "eEpP":
        at = max(text.rfind("+", 0, at), text.rfind("-", 0, at))
    return complex(_float(text[:at], text), _float(text[at:-1], text))


def parse_number(text: str) -> int | float | complex | None:
    """A constant where nothing says which type it should have; None does not fit an int. Raises ValueError."""
    if text.endswith("i"):
        return complex(0, _float(text[:-1], text))
    if match := _INT.fullmatch(text):
        base = next(base for base in _BASES if match[base])
        value = int(match[base].replace("_", ""), _BASES[base]) * (-1 if match["sign"] == "-" else 1)
        if MIN_INT <= value <= MAX_INT:
            return value
        if value <= MAX_UINT and not match["sign"]:
            return None
        raise ValueError(f"integer overflow: {quote(text)}")
    number = _float(text, text)
    if not any(sign in text for sign in ".eEpP"):  # what Go thinks of `09`
        raise ValueError(f"integer overflow: {quote(text)}")
    return number


def _float(text: str, whole: str) -> float:
    try:
        if _HEX_FLOAT.fullmatch(text):
            value = float.fromhex(text.replace("_", ""))
        elif _FLOAT.fullmatch(text) and "_" not in text:  # underscores need a base prefix (strconv.ParseFloat)
            value = float(text)
        else:
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"illegal number syntax: {quote(whole)}") from None
    if math.isinf(value):
        raise ValueError(f"illegal number syntax: {quote(whole)}")
    return value


def format_float(number: float, verb: str = "g", precision: int = -1) -> str:
    """The number with the verb `e`, `f` or `g`, or one of these in capitals; precision -1 is the shortest exact `g`."""
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "+Inf" if number > 0 else "-Inf"
    text = _shortest(number) if precision < 0 else f"{number:.{precision}{verb.lower()}}"
    return text.upper() if verb.isupper() else text


def _shortest(number: float) -> str:
    """`%g`: an exponent below 1e-4 and from 1e6, where the digits would not say more."""
    exact = Decimal(repr(number))
    exponent = exact.adjusted() if number else 0
    if -4 <= exponent < 6:
        text = f"{exact:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{exact.scaleb(-exponent).normalize():f}e{exponent:+03d}"


def format_hex_float(number: float) -> str:
    """`%x` of a float."""
    if not math.isfinite(number):
        return format_float(number)
    mantissa, exponent = number.hex().split("p")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    if not number:
        mantissa, exponent = mantissa[: mantissa.index("0x") + 3], "0"
    return f"{mantissa}p{int(exponent):+03d}"
