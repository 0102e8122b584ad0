"""Model options typed by a person, `temperature=0.2`, as the server wants them; pure.

The names and types are those of `engines.options`, so a typing mistake is told here and not silently ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from engines.options import LIST_OPTIONS, OPTION_NAMES, OptionTypeError, OptionValueError, check_options
from engines.request import JSON


class BadParameter(ValueError):
    """There is no such option, or the value is not of its type; the message says which."""


def parse_assignments(assignments: Sequence[str]) -> dict[str, JSON]:
    """`["temperature=0", "stop=A", "stop=B"]` as an options object.

    Raises:
        BadParameter: an assignment is none, or names or sets an option wrongly.
    """
    words: dict[str, list[str]] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise BadParameter(f"{assignment!r} is not of the form name=value")
        words.setdefault(name.strip(), []).append(value)
    return {name: parse_parameter(name, values) for name, values in words.items()}


def parse_parameter(name: str, words: Sequence[str]) -> JSON:
    """The value of option `name`: every word where it is a list, else the last word as a number or a boolean.

    Raises:
        BadParameter: no such option, or a value that it cannot have.
    """
    if name not in OPTION_NAMES:
        raise BadParameter(f"there is no option {name!r}")
    value: JSON = list(words) if name in LIST_OPTIONS else _scalar(words[-1])
    try:
        check_options({name: value})
    except (OptionTypeError, OptionValueError) as error:
        raise BadParameter(error.message) from None
    return value


def _scalar(word: str) -> JSON:
    try:
        value = json.loads(word)
    except ValueError:
        return word
    return value if isinstance(value, (bool, int, float)) else word
