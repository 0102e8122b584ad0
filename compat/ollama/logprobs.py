"""Log-probabilities in Ollama's shape (`spec/ollama.md` section 5.3). Pure."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import UNSET, UnsetType

from compat.ollama.schema import TokenBody, TopTokenBody
from engines.events import TokenLogprob

_LEAST = -9999.0
"""What stands for minus infinity, which JSON lacks."""


def render_logprobs(tokens: Iterable[TokenLogprob]) -> list[TokenBody]:
    """One entry for each token."""
    return [
        TokenBody(*_token(token), [TopTokenBody(*_token(other)) for other in token.top] or UNSET) for token in tokens
    ]


def _token(token: TokenLogprob) -> tuple[str, float, list[int] | UnsetType]:
    logprob = token.logprob if token.logprob > _LEAST else _LEAST  # also for NaN
    return token.data.decode(errors="replace"), logprob, list(token.data) or UNSET
