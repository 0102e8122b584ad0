"""`keep_alive` in every form and with every error text."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compat.keep_alive import parse_keep_alive
from engines.errors import BadRequest
from engines.request import FOREVER


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (0, 0.0),
        (300, 300.0),
        (1.5, 1.5),
        ("0", 0.0),
        ("0s", 0.0),
        ("-0", 0.0),
        ("5m", 300.0),
        ("5m0s", 300.0),
        ("1h30m", 5400.0),
        ("+1.5s", 1.5),
        (".5s", 0.5),
        ("1.s", 1.0),
        ("250ms", 0.25),
        (-1, FOREVER),
        (-0.5, FOREVER),
        ("-1s", FOREVER),
        (10**400, 1e12),
        ("9" * 90 + "h", 1e12),
    ],
)
def test_a_keep_alive_is_seconds(value: Any, seconds: float | None) -> None:
    """Numbers and Go durations; negative is for ever, and nothing is longer than we can count."""
    assert parse_keep_alive(value) == seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("300", 'time: missing unit in duration "300"'),
        ("-1", 'time: missing unit in duration "-1"'),
        ("5m3", 'time: missing unit in duration "5m3"'),
        ("abc", 'time: invalid duration "abc"'),
        ("", 'time: invalid duration ""'),
        ("-", 'time: invalid duration "-"'),
        (".s", 'time: invalid duration ".s"'),
        ("5 m", 'time: unknown unit " m" in duration "5 m"'),
        ("5d", 'time: unknown unit "d" in duration "5d"'),
        (True, "Unsupported type: 'bool'"),
        ([5], "Unsupported type: '[]interface {}'"),
        ({}, "Unsupported type: 'map[string]interface {}'"),
    ],
)
def test_what_is_no_keep_alive_is_refused_in_go_s_words(value: Any, text: str) -> None:
    """The message is Go's, and the field is named for dialects that tell it."""
    with pytest.raises(BadRequest) as refused:
        parse_keep_alive(value)
    assert (refused.value.message, refused.value.param) == (text, "keep_alive")


@given(st.text(max_size=300) | st.from_regex(r"[+-]?([0-9.]+(ns|us|µs|ms|s|m|h|d)?){0,4}", fullmatch=True))
def test_any_text_is_a_duration_or_a_bad_request(text: str) -> None:
    """Never anything else, and never less than nothing."""
    try:
        seconds = parse_keep_alive(text)
    except BadRequest as refused:
        assert len(refused.message) < 300  # noqa: PT017  either end is right
    else:
        assert seconds is not None
        assert seconds >= 0
