"""Tokens in OpenAI's two shapes: data in, data out."""

import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from compat.openai.logprobs import (
    EchoDelta,
    HeldTokens,
    chat_logprobs,
    completion_logprobs,
    mean_logprob,
    settled,
)
from compat.openai.render import encode
from engines.events import TextDelta, TokenLogprob


def token(data: bytes | str, logprob: float = -0.5, *top: TokenLogprob) -> TokenLogprob:
    """A token of these bytes."""
    return TokenLogprob(1, data.encode() if isinstance(data, str) else data, logprob, top)


def shown(body: object) -> Any:
    """The body as a client reads it."""
    return json.loads(encode(body))


def test_a_chat_token_has_its_bytes_and_as_many_alternatives_as_asked_for() -> None:
    """Half a character shows as U+FFFD; an empty list stays."""
    tokens = [token("Hi", -0.25, token("Hi", -0.25), token(b"\xf0\x9f", -2.0))]
    assert shown(chat_logprobs(tokens, 2)) == {
        "content": [
            {
                "token": "Hi",
                "logprob": -0.25,
                "bytes": [72, 105],
                "top_logprobs": [
                    {"token": "Hi", "logprob": -0.25, "bytes": [72, 105]},
                    {"token": "\ufffd", "logprob": -2.0, "bytes": [240, 159]},
                ],
            }
        ],
        "refusal": None,
    }
    assert shown(chat_logprobs(tokens, 0))["content"][0]["top_logprobs"] == []


def test_numbers_that_json_lacks_become_the_least() -> None:
    """Neither infinity nor NaN, in either shape."""
    pieces = [TextDelta("ab", 0, (token("a", -math.inf, token("c", -math.inf)), token("b", math.nan)))]
    chat = shown(chat_logprobs(pieces[0].logprobs, 1))
    assert [entry["logprob"] for entry in chat["content"]] == [-9999.0, -9999.0]
    completion = shown(completion_logprobs(pieces, 1))
    assert completion["token_logprobs"] == [-9999.0, -9999.0]
    assert completion["top_logprobs"][0] == {"a": -9999.0, "c": -9999.0}


def test_a_completion_s_arrays_are_parallel() -> None:
    """The chosen token is always among the alternatives; of two that look alike the likelier counts."""
    unlike = token("b", -3.0, token("x", -0.1), token(b"\xf0", -1.0), token(b"\xf1", -2.0))
    body = completion_logprobs([TextDelta("a", 0, (token("a", -0.5),)), TextDelta("b", 0, (unlike,))], 3)
    assert shown(body) == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -3.0],
        "top_logprobs": [{"a": -0.5}, {"x": -0.1, "\ufffd": -1.0, "b": -3.0}],
        "text_offset": [0, 1],
    }
    assert completion_logprobs([TextDelta("b", 0, (unlike,))], 0).top_logprobs == [{"b": -3.0}]


def test_nothing_precedes_a_prompt_s_first_token() -> None:
    """It has no log-probability; offsets count the prompt."""
    prompt = EchoDelta("Hey ", 0, (token("Hey", 0.0), token(" ", -1.0)))
    body = completion_logprobs([prompt, TextDelta("you", 0, (token("you", -2.0),))], 0)
    assert body.token_logprobs == [None, -1.0, -2.0]
    assert body.top_logprobs == [None, {" ": -1.0}, {"you": -2.0}]
    assert body.text_offset == [0, 3, 4]


def test_offsets_count_characters_and_not_bytes() -> None:
    """The second half of a character begins where the first does."""
    halves = (token("a"), token(b"\xf0\x9f"), token(b"\x98\x80"), token("b"))
    body = completion_logprobs([TextDelta("a\U0001f600b", 0, halves)], 0, offset=10)
    assert body.text_offset == [10, 11, 11, 12]


def test_tokens_without_text_travel_with_the_next_text_of_their_choice() -> None:
    """And with its end when there is none."""
    held, half, rest, end = HeldTokens(), token(b"\xc3"), token(b"\xa9"), token(b"")
    assert held.release(TextDelta("", 1, (half,))) is None
    assert held.release(TextDelta("x", 0)) == TextDelta("x", 0)
    assert held.release(TextDelta("\u00e9", 1, (rest,))) == TextDelta("\u00e9", 1, (half, rest))
    assert held.release(TextDelta("", 1, (end,))) is None
    assert (held.flush(1), held.flush(1), held.flush(0)) == ((end,), (), ())


def test_a_prompt_without_text_is_still_the_prompt() -> None:
    """Its token is never taken for one of the answer's."""
    echo = EchoDelta("", 0, (token(b"", 0.0),))
    assert settled([echo, TextDelta("a", 0, (token("a"),))])[0] == echo


def test_the_mean_is_the_answer_s_alone() -> None:
    """Prompts do not count, and an answer without tokens is the least likely."""
    echo = EchoDelta("Hey", 0, (token("Hey", -100.0),))
    assert mean_logprob([echo, TextDelta("ab", 0, (token("a", -1.0), token("b", -2.0)))]) == -1.5
    assert mean_logprob([echo]) == -math.inf


tokens = st.lists(st.builds(TokenLogprob, st.just(1), st.binary(max_size=5), st.floats()), max_size=4).map(tuple)


@given(st.lists(st.builds(TextDelta, st.text(max_size=4), st.just(3), tokens), max_size=5))
def test_no_token_is_lost_whatever_the_pieces(pieces: list[TextDelta]) -> None:
    """In order, streamed or not; arrays stay parallel and offsets inside the text."""
    everything = [each for piece in pieces for each in piece.logprobs]
    whole = settled(pieces)
    assert [each for piece in whole for each in piece.logprobs] == everything
    body = completion_logprobs(whole, 2)
    assert len(body.tokens) == len(body.token_logprobs) == len(body.top_logprobs) == len(everything)
    length = sum(len(piece.text) for piece in pieces)
    assert body.text_offset == sorted(body.text_offset)
    assert all(0 <= offset <= length for offset in body.text_offset)
    json.loads(encode(body), parse_constant=lambda name: 1 / 0)
