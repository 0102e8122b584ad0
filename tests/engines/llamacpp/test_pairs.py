"""Query and document as one input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import PromptTooLong
from engines.llamacpp.pairs import Pair, PairBuilder

JOINTS = ([1], [2, 3], [2])


class Characters:
    """A vocabulary of characters."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """One token for each."""
        assert not add_special
        return [ord(character) for character in text]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The character."""
        return chr(token).encode()


PLAIN = PairBuilder(Characters(), JOINTS)
TEMPLATE = PairBuilder(Characters(), JOINTS, "<{query}|{document}>")


def build(
    builder: PairBuilder, document: str = "doc", num_ctx: int = 99, truncate: bool = True, at_most: int | None = None
) -> Pair:
    """An input for the query `q`."""
    return builder.build("q", document, num_ctx=num_ctx, truncate=truncate, max_document=at_most)


def text(pair: Pair) -> str:
    """The tokens as text."""
    return "".join(map(chr, pair.tokens))


def test_special_tokens_stand_around_and_between() -> None:
    """BOS query EOS SEP document EOS, as far as the vocabulary has them."""
    assert build(PLAIN) == Pair([1, ord("q"), 2, 3, *map(ord, "doc"), 2])


def test_a_models_own_template_is_filled() -> None:
    """Words in braces inside the texts are nothing special."""
    assert text(build(TEMPLATE)) == "<q|doc>"
    assert text(build(TEMPLATE, "{query}{document}")) == "<q|{query}{document}>"


@pytest.mark.parametrize("builder", [PLAIN, TEMPLATE])
def test_a_long_document_loses_its_end(builder: PairBuilder) -> None:
    """And nothing else."""
    whole = build(builder, "0123456789")
    cut = build(builder, "0123456789", num_ctx=len(whole.tokens) - 4)
    assert (cut, cut.truncated_tokens) == (Pair(build(builder, "012345").tokens, 4), 4)


@pytest.mark.parametrize("builder", [PLAIN, TEMPLATE])
def test_a_document_can_have_a_limit_of_its_own(builder: PairBuilder) -> None:
    """Cohere's `max_tokens_per_doc`."""
    assert build(builder, "0123", truncate=False, at_most=2) == Pair(build(builder, "01").tokens, 2)


@pytest.mark.parametrize("builder", [PLAIN, TEMPLATE])
def test_what_does_not_fit_is_refused(builder: PairBuilder) -> None:
    """A document that may not be cut, and a query that fills the window alone."""
    with pytest.raises(PromptTooLong):
        build(builder, "0123456789", num_ctx=8, truncate=False)
    with pytest.raises(PromptTooLong):
        build(builder, num_ctx=3)


@given(st.text(max_size=30), st.integers(4, 40))
def test_no_pair_exceeds_the_window(document: str, num_ctx: int) -> None:
    """Whatever the document."""
    for builder in (PLAIN, TEMPLATE):
        try:
            assert len(build(builder, document, num_ctx=num_ctx).tokens) <= num_ctx
        except PromptTooLong:
            assert num_ctx < 5
