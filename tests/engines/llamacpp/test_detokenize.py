from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.events import TokenLogprob
from engines.llamacpp.detokenize import Detokenizer, StopFilter, TextStream

END = -1
few_letters = st.text("abé", max_size=30)
stop_strings = st.lists(st.text("abé", max_size=4), max_size=3)


def pieces_of(data: st.DataObject, content: bytes) -> list[bytes]:
    """`content` cut at positions that hypothesis chooses."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    bounds = [0, *cuts, len(content)]
    return [content[start:end] for start, end in pairwise(bounds)]


def before_first_stop(text: str, stops: list[str]) -> str:
    """The text up to the match that is complete first, of those that end together the longest."""
    for end in range(1, len(text) + 1):
        matches = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if matches:
            return text[: min(matches)]
    return text


def stream(pieces: list[bytes], stops: list[str]) -> TextStream:
    """A stream in which token i stands for `pieces[i]`."""
    return TextStream(lambda token: pieces[token], lambda token: token == END, stops)


@given(data=st.data(), text=st.text())
def test_characters_survive_any_cut(data: st.DataObject, text: str) -> None:
    """However bytes are spread over tokens, the text is the same and no piece holds half a character."""
    detokenizer = Detokenizer()
    parts = [detokenizer.decode(piece) for piece in pieces_of(data, text.encode())]
    assert "".join(parts) == text
    assert detokenizer.flush() == ""


@given(data=st.data(), content=st.binary(max_size=40))
def test_invalid_bytes_become_replacement_characters(data: st.DataObject, content: bytes) -> None:
    """What is no UTF-8 reads the same in pieces as in one, and the end leaves nothing behind."""
    detokenizer = Detokenizer()
    parts = [detokenizer.decode(piece) for piece in pieces_of(data, content)]
    assert "".join(parts) + detokenizer.flush() == content.decode("utf-8", "replace")


def test_half_a_character_at_the_end_shows_as_one_replacement() -> None:
    """An answer cut inside an emoji ends with U+FFFD."""
    detokenizer = Detokenizer()
    assert detokenizer.decode("🙂".encode()[:2]) == ""
    assert detokenizer.flush() == "\ufffd"


@given(data=st.data(), text=few_letters, stops=stop_strings)
def test_text_is_cut_at_the_first_stop_string(data: st.DataObject, text: str, stops: list[str]) -> None:
    """For any tokens and stop strings, what is sent is the text before the first match, or all of it."""
    pieces = pieces_of(data, text.encode())
    tokens = stream(pieces, stops)
    sent = ""
    for token in range(len(pieces)):
        is_over = tokens.accept(token)
        sent += tokens.take()[0]
        if is_over:
            break
    assert sent + tokens.flush()[0] == before_first_stop(text, stops)


@given(text=few_letters, stops=stop_strings)
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(text: str, stops: list[str]) -> None:
    """After every character, what is missing is the longest ending that a stop string could begin with."""
    letters = StopFilter(stops)
    sent = ""
    for length, letter in enumerate(text, start=1):
        sent += letters.decode(letter)
        if letters.matched:
            return
        seen = text[:length]
        held = seen[len(sent) :]
        assert seen == sent + held
        longest = max(
            (n for stop in stops for n in range(min(len(stop) - 1, length) + 1) if seen.endswith(stop[:n])), default=0
        )
        assert len(held) == longest


@pytest.mark.parametrize("pieces", [["xaba"], ["xab", "a"], ["xa", "ba"]])
def test_the_stop_string_that_is_complete_first_wins(pieces: list[str]) -> None:
    """Whether or not one that began earlier would have been complete in the same piece."""
    letters = StopFilter(["aba", "b"])
    assert "".join(letters.decode(piece) for piece in pieces) == "xa"
    assert letters.matched


def test_a_stop_string_that_does_not_come_is_sent_in_the_end() -> None:
    """`flush` gives back what might have become a stop string."""
    letters = StopFilter(["</answer>"])
    assert letters.decode("1 < 2 </ans") == "1 < 2 "
    assert letters.flush() == "</ans"


def test_nothing_follows_a_stop_string() -> None:
    """Text after the match is dropped, whether it comes in the same piece or later."""
    letters = StopFilter(["STOP"])
    assert letters.decode("go STOP on") == "go "
    assert letters.decode("and on") == ""
    assert letters.flush() == ""


@pytest.mark.parametrize("stops", [[], [""]])
def test_without_stop_strings_everything_passes_at_once(stops: list[str]) -> None:
    """An empty stop string is none."""
    assert StopFilter(stops).decode("anything") == "anything"


def test_an_end_token_ends_the_answer_without_text() -> None:
    """The token itself is not shown, and what was held back is flushed."""
    tokens = stream([b"on", b"ce"], ["center"])
    assert not tokens.accept(0)
    assert not tokens.accept(1)
    assert tokens.accept(END)
    assert tokens.take() == ("on", ())
    assert tokens.flush() == ("ce", ())


def test_half_a_character_before_a_stop_string_stays_away() -> None:
    """The rest of the detokenizer passes the stop filter too."""
    tokens = stream([b"x", b"S", "é".encode()[:1]], ["S\ufffd"])
    assert [tokens.accept(token) for token in range(3)] == [False, False, False]
    assert tokens.flush() == ("x", ())


def told(token: int) -> TokenLogprob:
    """What is told of a token."""
    return TokenLogprob(token, b"", -1.0)


def test_tokens_are_told_with_the_text_that_they_complete() -> None:
    """While text is held back for a stop string, so are its tokens; half a character goes with what comes next."""
    tokens = stream([b"on", b"ce", "é".encode()[:1], "é".encode()[1:]], ["center"])
    tokens.accept(0, told(0))
    tokens.accept(1, told(1))
    assert tokens.take() == ("on", (told(0),))
    tokens.accept(2, told(2))
    tokens.accept(3, told(3))
    assert tokens.take() == ("ceé", (told(1), told(2), told(3)))


def test_tokens_of_a_stop_string_are_not_told() -> None:
    """They vanish with its text."""
    tokens = stream([b"yes", b" ST", b"OP"], [" STOP"])
    assert [tokens.accept(token, told(token)) for token in range(3)] == [False, False, True]
    assert tokens.take() == ("yes", (told(0),))
    assert tokens.flush() == ("", ())
