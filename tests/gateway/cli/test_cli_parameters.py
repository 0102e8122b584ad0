from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cli.parameters import BadParameter, parse_assignments, parse_parameter


def test_values_have_the_types_of_their_options() -> None:
    """Numbers, booleans and stop strings arrive as the API wants them."""
    assert parse_assignments(["temperature=0", "num_ctx=8192", "use_mmap=false", "stop=A", "stop=B=C"]) == {
        "temperature": 0,
        "num_ctx": 8192,
        "use_mmap": False,
        "stop": ["A", "B=C"],
    }


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("temperature", "not of the form name=value"),
        ("temprature=1", "no option 'temprature'"),
        ("temperature=warm", 'option "temperature" must be of type float32'),
        ("num_ctx=true", 'option "num_ctx" must be of type integer'),
        ("num_ctx=NaN", 'option "num_ctx" must be of type integer'),
        ("=1", "no option ''"),
        ("num_thread=5000", "expected a value <= 1024"),
        ("num_keep=some", 'option "num_keep" must be of type integer'),
        ("seed=null", 'option "seed" must be of type integer'),
    ],
)
def test_mistake_is_told(assignment: str, message: str) -> None:
    """What the server would ignore or refuse is refused here, by name."""
    with pytest.raises(BadParameter, match=message):
        parse_assignments([assignment])


@given(st.text(), st.lists(st.text(), min_size=1))
def test_any_words_give_a_value_or_a_message(name: str, words: list[str]) -> None:
    """Nothing typed raises anything else."""
    with suppress(BadParameter):
        parse_parameter(name, words)
