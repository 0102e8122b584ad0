"""Scores as probabilities."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compat.relevance import ranked, relevance
from engines.model import ModelCard

CARD = ModelCard("m:latest", "m", "0" * 64, Path("m"), "sha256:0", 1, 0.0, family="bert")


@given(st.lists(st.floats(allow_nan=False), max_size=20))
def test_every_logit_becomes_a_probability_in_the_same_order(scores: list[float]) -> None:
    """The largest and smallest numbers too."""
    found = relevance(scores, CARD)
    assert all(0 <= score <= 1 for score in found)
    assert [found[i] for i in sorted(range(len(scores)), key=scores.__getitem__)] == sorted(found)


def test_a_probability_stays_as_it_is() -> None:
    """A Qwen3 reranker has been through a softmax."""
    assert relevance([0.9, 0.1], dataclasses.replace(CARD, family="qwen3")) == [0.9, 0.1]
    assert relevance([0.0], CARD) == [0.5]


def test_equal_scores_stay_in_order() -> None:
    """The best comes first, and nothing is shuffled without a reason."""
    assert ranked([1.0, 2.0, 1.0]) == [(1, 2.0), (0, 1.0), (2, 1.0)]
    assert ranked([]) == []


@pytest.mark.parametrize("logit", [1000.0, -1000.0])
def test_a_huge_logit_does_not_overflow(logit: float) -> None:
    """The exponential of either would."""
    assert relevance([logit], CARD) == [1.0 if logit > 0 else 0.0]
