"""Option objects to sampling and load options: data in, data out."""

import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.options import (
    FURTHER_SAMPLERS,
    OptionTypeError,
    OptionValueError,
    check_options,
    parse_load_options,
    parse_num_keep,
    parse_sampling,
)
from engines.request import LoadOptions, Sampling

FURTHER: dict[str, Any] = {
    "top_n_sigma": 1.5,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.1,
    "dry_multiplier": 0.8,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ("\n", ":"),
    "mirostat": 2,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
    "dynatemp_range": 0.5,
    "dynatemp_exponent": 1.0,
    "ignore_eos": True,
}


def test_further_samplers_count_where_they_make_sense() -> None:
    """Under llama.cpp's names; JSON has lists where we have tuples."""
    assert parse_sampling(json.loads(json.dumps(FURTHER))) == Sampling(**FURTHER)
    assert FURTHER.keys() | {"logit_bias"} == FURTHER_SAMPLERS.keys()


@pytest.mark.parametrize("value", ["x", [1], {"a": 1}, 10**400, -1e300, math.nan, math.inf, [[1, 2, 3]]])
def test_further_samplers_are_ignored_where_they_make_none(value: Any) -> None:
    """Whatever they are: Ollama knows none of them."""
    assert parse_sampling(dict.fromkeys(FURTHER_SAMPLERS, value)) == Sampling()


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("repeat_penalty", 0, 1e-6),
        ("repeat_penalty", -1e300, 1e-6),
        ("presence_penalty", 1e300, 2**31 - 1),
        ("temperature", 10**400, 2**31 - 1),
        ("seed", -(2**70), -(2**63)),
        ("top_k", 1e300, 2**31 - 1),
    ],
)
def test_ollama_s_numbers_are_moved_to_their_bounds(name: str, value: Any, nearest: float) -> None:
    """No engine sees one that it cannot hold, and no penalty lifts what a grammar forbids."""
    assert getattr(parse_sampling({name: value}), name) == nearest


@pytest.mark.parametrize("num_ctx", [-5, 0, 3, -1e308])
def test_no_window_is_smaller_than_ollama_s_least(num_ctx: float) -> None:
    """Four tokens."""
    assert parse_load_options({"num_ctx": num_ctx}) == LoadOptions(num_ctx=4)


def test_the_first_layer_says_what_is_kept() -> None:
    """Truncated toward zero; four tokens where none says anything."""
    assert parse_num_keep({"num_keep": None}, {"num_keep": 7.9}, {"num_keep": 1}) == 7
    assert parse_num_keep({"num_keep": -1}, {"num_keep": 7}) == -1
    assert parse_num_keep({}, {}) == 4
    with pytest.raises(OptionTypeError, match='option "num_keep" must be of type integer'):
        parse_num_keep({"num_keep": True})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"5": 1, "6": -100, "7": 100}, ((5, 1.0), (6, -math.inf), (7, 100.0))),
        ([[5, -0.5], [6, False], ["Hello", -100]], ((5, -0.5), (6, -math.inf), ("Hello", -math.inf))),
        ({}, None),
        ([], None),
    ],
)
def test_biases_come_in_openai_s_form_and_llama_cpp_s(value: Any, expected: Any) -> None:
    """The least bias, and false, ban."""
    assert parse_sampling({"logit_bias": value}).logit_bias == expected


@pytest.mark.parametrize(
    "value",
    [
        {"hello": 1},
        {"-1": 1},
        {"1.0": 1},
        {"": 1},
        {"\u0661": 1},
        {"9" * 5000: 1},
        {"9999999999": 1},
        {"1": True},
        {"1": None},
        {"1": "x"},
        {"1": 101},
        {"1": -100.5},
        {"1": 10**400},
        {"1": math.nan},
        [[1]],
        [[1, 2, 3]],
        [[True, 1]],
        [[-1, 1]],
        [[1.0, 1]],
        [["", 1]],
        [["x" * 257, 1]],
        [["x", True]],
        [1],
        {str(number): 1 for number in range(1025)},
    ],
)
def test_what_is_no_bias_is_told_and_ignored_otherwise(value: Any) -> None:
    """Keys are token ids, biases from -100 to 100, and there is a limit to them."""
    with pytest.raises(OptionValueError, match="logit_bias"):
        check_options({"logit_bias": value})
    assert parse_sampling({"logit_bias": value}) == Sampling()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 10**400},
        {"mirostat": 3},
        {"xtc_probability": 1.1},
        {"dry_sequence_breakers": ["x"] * 65},
        {"dry_sequence_breakers": ["x" * 257]},
        {"num_ctx": -5},
        {"num_keep": 2**31},
    ],
)
def test_checking_tells_of_values_out_of_range(options: dict[str, Any]) -> None:
    """By name."""
    with pytest.raises(OptionValueError, match=next(iter(options))):
        check_options(options)


@pytest.mark.parametrize(
    "options", [{"ignore_eos": 1}, {"dry_sequence_breakers": "x"}, {"mirostat": True}, {"logit_bias": 1}, {"stop": [1]}]
)
def test_checking_tells_of_wrong_types(options: dict[str, Any]) -> None:
    """Of all options alike."""
    with pytest.raises(OptionTypeError, match=next(iter(options))):
        check_options(options)


NAMES = [*FURTHER_SAMPLERS, "temperature", "top_k", "repeat_penalty", "seed", "stop", "num_ctx", "num_keep", "x"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("0123456789x", max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(NAMES), VALUES))
def test_any_options_are_read_or_refused_by_name(options: dict[str, Any]) -> None:
    """What passes the check is read unchanged; no number is ever NaN or infinite."""
    with suppress(OptionTypeError):
        sampling = parse_sampling(options)
        numbers = [getattr(sampling, name) for name in ("temperature", "repeat_penalty", "mirostat_tau", "dry_base")]
        assert all(number is None or math.isfinite(number) for number in numbers)
        parse_load_options(options)
        parse_num_keep(options)
    with suppress(OptionTypeError, OptionValueError):
        check_options(options)
        parse_sampling(options)
