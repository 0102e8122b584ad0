"""A reranker's score as clients read it: between 0 and 1 (`spec/openai.md` section 9.1). Pure.

Most rerankers end in one logit. Those of the Qwen3 family end in a softmax over yes and no, so their score is a
probability already (llama-graph.cpp, build_pooling).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from engines.model import ModelCard

_PROBABILITY_FAMILIES = ("qwen3", "qwen3vl")


def relevance(scores: Sequence[float], card: ModelCard) -> list[float]:
    """The scores as probabilities, in the same order."""
    if card.family in _PROBABILITY_FAMILIES:
        return list(scores)
    return [_sigmoid(score) for score in scores]


def ranked(scores: Sequence[float]) -> list[tuple[int, float]]:
    """Indexes and scores, the best first; equal ones stay in order."""
    return sorted(enumerate(scores), key=lambda pair: -pair[1])


def _sigmoid(logit: float) -> float:
    """In two forms, because the exponential of a large number overflows."""
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))
