from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from gateway.cli.wrap import WordWrap


def screen(written: str) -> list[str]:
    """The lines that a terminal shows: what is taken back is gone."""
    lines = [""]
    for part in re.split(r"(\x1b\[\d+D\x1b\[K|\n)", written):
        if part == "\n":
            lines.append("")
        elif part.startswith("\x1b"):
            lines[-1] = lines[-1][: -int(part[2 : part.index("D")])]
        else:
            lines[-1] += part
    return lines


def wrapped(*pieces: str, width: int = 10) -> list[str]:
    """The lines of an answer that streams in."""
    wrap = WordWrap(width)
    return screen("".join(wrap.wrap(piece) for piece in pieces))


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        (["one two three"], ["one two ", "three"]),
        (["one tw", "o th", "ree"], ["one two ", "three"]),
        (["1234567890"], ["1234567890"]),
        (["12345678901"], ["1234567890", "1"]),
        (["1234567890 1"], ["1234567890", "1"]),
        (["a\nb c"], ["a", "b c"]),
        (["\u4e00" * 6], ["\u4e00" * 5, "\u4e00"]),
        (["ab \u4e00\u4e00\u4e00\u4e00"], ["ab \u4e00\u4e00\u4e00", "\u4e00"]),
    ],
)
def test_lines_break_between_words(pieces: list[str], lines: list[str]) -> None:
    """Wherever the pieces of the stream end; wide characters are words of their own."""
    assert wrapped(*pieces) == lines


@pytest.mark.parametrize("width", [0, 9])
def test_a_narrow_terminal_breaks_lines_itself(width: int) -> None:
    """And so does no terminal at all."""
    assert WordWrap(width).wrap("one two three four") == "one two three four"


@given(st.lists(st.text(st.sampled_from("ab \n\u4e00"))), st.integers(10, 20))
def test_nothing_is_lost_and_no_line_is_too_long(pieces: list[str], width: int) -> None:
    """Only spaces at the end of a line become its end."""
    lines = wrapped(*pieces, width=width)
    assert "".join("".join(lines).split()) == "".join("".join(pieces).split())
    assert all(cell_len(line) <= width for line in lines)
