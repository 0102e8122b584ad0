from __future__ import annotations

import unicodedata
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cli import format as human

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1500, "1.5 KB"),
        (2019393189, "2.0 GB"),
        (4661224676, "4.7 GB"),
        (2 * 10**9, "2 GB"),
        (42_949_672_960, "42 GB"),
        (9_999_999, "10.0 MB"),
        (3 * 10**12, "3 TB"),
        (10**16, "10000 TB"),
    ],
)
def test_sizes_read_as_ollama_writes_them(num_bytes: int, text: str) -> None:
    """Sizes are decimal, with one decimal below 10 unless whole, cut to an integer from 10 up."""
    assert human.size(num_bytes) == text


@pytest.mark.parametrize(
    ("passed", "text"),
    [
        (timedelta(0), "Less than a second ago"),
        (timedelta(seconds=1), "1 second ago"),
        (timedelta(seconds=59.9), "59 seconds ago"),
        (timedelta(seconds=60), "About a minute ago"),
        (timedelta(minutes=4), "4 minutes ago"),
        (timedelta(minutes=60), "About an hour ago"),
        (timedelta(minutes=89), "About an hour ago"),
        (timedelta(minutes=90), "2 hours ago"),
        (timedelta(hours=47), "47 hours ago"),
        (timedelta(hours=48), "2 days ago"),
        (timedelta(days=14), "2 weeks ago"),
        (timedelta(days=60), "2 months ago"),
        (timedelta(days=365 * 2), "2 years ago"),
        (timedelta(minutes=-4), "4 minutes from now"),
        (timedelta(hours=-1), "About an hour from now"),
        (timedelta(days=-20 * 365), "20 years from now"),
        (timedelta(days=-292 * 365), "Forever"),
    ],
)
def test_relative_times_read_as_ollama_writes_them(passed: timedelta, text: str) -> None:
    """Every unit changes where Ollama's does, in both directions."""
    assert human.relative_time(NOW - passed, NOW) == text


def test_time_of_year_one_is_never() -> None:
    """Go's zero time means that there is none."""
    assert human.relative_time(datetime(1, 1, 1, tzinfo=UTC), NOW) == "Never"


def test_model_past_its_time_is_stopping() -> None:
    """A moment in the past is a model on its way out."""
    assert human.until(NOW - timedelta(seconds=1), NOW) == "Stopping..."
    assert human.until(NOW + timedelta(minutes=4), NOW) == "4 minutes from now"


@pytest.mark.parametrize(
    ("size_bytes", "size_vram_bytes", "text"),
    [
        (100, 0, "100% CPU"),
        (100, 100, "100% GPU"),
        (100, 101, "Unknown"),
        (0, 5, "Unknown"),
        (1000, 600, "40%/60% CPU/GPU"),
        (1000, 995, "1%/99% CPU/GPU"),
    ],
)
def test_processor_tells_where_a_model_lies(size_bytes: int, size_vram_bytes: int, text: str) -> None:
    """The column follows spec/ollama.md section 4.2."""
    assert human.processor(size_bytes, size_vram_bytes) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (9999, "9999"),
        (10_000, "10.0K"),
        (12_345, "12.3K"),
        (99_960, "100K"),
        (456_400, "456K"),
        (999_600, "1.00M"),
        (7_890_000, "7.89M"),
        (10**9, "1.00B"),
        (10**13, "10000B"),
    ],
)
def test_counts_keep_three_digits(number: int, text: str) -> None:
    """Large counts are short, and rounding never prints a thousand of a unit that has a larger one."""
    assert human.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(3212749888, "3.2B"), (7 * 10**9, "7B"), (567_750_000, "567.75M"), (12_345, "12K"), (999, "999")],
)
def test_parameter_counts_read_as_ollama_writes_them(number: int, text: str) -> None:
    """The forms are those of spec/ollama.md section 7.7."""
    assert human.parameters(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0852, "85.2ms"),
        (4.305, "4.30s"),
        (0.99996, "1.00s"),
        (59.999, "1m0.0s"),
        (125.0, "2m5.0s"),
        (179.99, "3m0.0s"),
    ],
)
def test_durations_carry_over_to_the_next_unit(seconds: float, text: str) -> None:
    """Rounding never leaves sixty seconds or a thousand milliseconds."""
    assert human.duration(seconds) == text


@given(st.text())
def test_printable_text_holds_no_control_characters(text: str) -> None:
    """No terminal sequence gets through, and text without control characters is unchanged."""
    shown = human.printable(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cs") or c in "\n\t" for c in shown)
    if all(unicodedata.category(c) not in ("Cc", "Cs") for c in text):
        assert shown == text


@given(st.datetimes(timezones=st.just(UTC)), st.datetimes(timezones=st.just(UTC)))
def test_any_two_times_can_be_told_apart_in_words(when: datetime, now: datetime) -> None:
    """No pair of times is beyond words."""
    assert human.relative_time(when, now)


@given(st.integers(min_value=0, max_value=2**63))
def test_any_size_and_count_is_short(number: int) -> None:
    """Numbers stay short enough for a column."""
    assert len(human.size(number)) <= 12
    assert len(human.count(number)) <= 11
