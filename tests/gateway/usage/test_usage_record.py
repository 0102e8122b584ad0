from hypothesis import given
from hypothesis import strategies as st

from gateway.usage.record import bounded_text


@given(st.text(st.characters()), st.integers(0, 20))
def test_bounded_text_always_fits_and_encodes(text: str, max_bytes: int) -> None:
    """Never longer than allowed, never NUL, and always valid UTF-8."""
    bounded = bounded_text(text, max_bytes)
    assert len(bounded.encode()) <= max_bytes
    assert "\0" not in bounded


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20))
def test_ordinary_text_is_left_alone(text: str) -> None:
    """What fits stays as it is."""
    assert bounded_text(text, 80) == text


def test_text_is_never_cut_within_a_character() -> None:
    """A character that does not fit whole is left out."""
    assert bounded_text("aé€", 4) == "aé"
