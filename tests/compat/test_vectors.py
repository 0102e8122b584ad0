"""Vectors as numbers and as base64."""

from __future__ import annotations

import base64
import struct
from array import array

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compat.vectors import render_base64, render_numbers, shortest

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FLOATS, max_size=50))
def test_numbers_are_the_same_in_single_precision(numbers: list[float]) -> None:
    """Whatever their size, nothing is lost on the way through text."""
    vector = array("f", numbers)
    (rendered,) = render_numbers([vector])
    assert array("f", msgspec.json.decode(rendered)) == vector


@given(st.floats(width=32, min_value=2**-20, max_value=2**10))
def test_numbers_have_no_more_digits_than_they_need(number: float) -> None:
    """As few as NumPy's own shortest form, which searches for it."""
    (found,) = shortest(array("f", [number]))
    assert found == float(str(np.float32(number)))


def test_a_tenth_stays_a_tenth() -> None:
    """Single precision's 0.1 is 0.10000000149 in double precision."""
    assert render_numbers([array("f", [0.1, -0.25, 0.0])]) == [msgspec.Raw(b"[0.1,-0.25,0.0]")]


@pytest.mark.parametrize("numbers", [[], [1.5, -2.25]])
def test_base64_holds_little_endian_floats(numbers: list[float]) -> None:
    """As every OpenAI client unpacks it."""
    assert base64.b64decode(render_base64(array("f", numbers))) == struct.pack(f"<{len(numbers)}f", *numbers)
