"""How likely a token was, before any sampler had its say (`spec/openai.md` section 4.6)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engines.events import TokenLogprob
from engines.llamacpp.candidates import likeliest
from engines.llamacpp.context import Logits

Piece = Callable[[int], bytes]


class Likelihoods:
    """What a row of logits says of the tokens that may come next. Taken before the row is masked or chosen from.

    Args:
        num_top: likeliest tokens to tell of. piece: the bytes of a token.
    """

    def __init__(self, logits: Logits, num_top: int, piece: Piece) -> None:
        greatest = logits.max()
        self._logits = logits
        self._norm = float(greatest) + float(np.log(np.exp(logits - greatest).sum(dtype=np.float64)))
        self._piece = piece
        ids = likeliest(logits, num_top) if num_top else np.empty(0, np.intp)
        order = ids[np.argsort(-logits[ids], kind="stable")]
        self._top = tuple(self._of(int(token)) for token in order)

    def _of(self, token: int) -> TokenLogprob:
        return TokenLogprob(token, self._piece(token), float(self._logits[token]) - self._norm)

    def of(self, token: int) -> TokenLogprob:
        """The token that was chosen, with the likeliest ones beside it. Masks leave the logit of a chosen one alone."""
        chosen = self._of(token)
        return TokenLogprob(token, chosen.data, chosen.logprob, self._top)
