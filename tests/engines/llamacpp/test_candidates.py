from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engines.llamacpp.candidates import gather, likeliest


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 20_000), count=st.integers(1, 100), ties=st.booleans())
def test_the_likeliest_tokens_are_those_with_the_greatest_logits(seed: int, size: int, count: int, ties: bool) -> None:
    """Whatever the size of the vocabulary, and with tokens ruled out, no greater logit is left behind."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=size).astype(np.float32)
    logits[random.random(size) < 0.5] = -np.inf
    if ties:
        logits = np.round(logits)
    ids = likeliest(logits, count)
    assert len(set(ids.tolist())) == len(ids) == min(count, size)
    assert sorted(logits[ids]) == sorted(np.sort(logits)[-count:])


def test_candidates_carry_their_ids_and_logits() -> None:
    """As llama.cpp's samplers take them."""
    candidates = gather(np.array([0.5, 2.0, -1.0], np.float32), np.array([2, 1]))
    assert candidates.tolist() == [(2, -1.0, 0.0), (1, 2.0, 0.0)]
    assert candidates.itemsize == 12, "llama.h llama_token_data"
