"""One answer through time: its tokens, how many of them the KV cache holds, and when things happened.

A few numbers are stored and the rest is computed from them, so they cannot disagree. Whether a sequence is prefilling
or decoding is not a state: it is how many of its tokens are not in the cache yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from engines.llamacpp.detokenize import TextStream
from engines.llamacpp.kvcache import Tokens


class TokenChooser(Protocol):
    """Picks a sequence's next token."""

    def sample(self, index: int) -> int:
        """The token chosen from the logits at a batch index."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One choice of one request inside the engine.

    Attributes:
        tokens: prompt and generated tokens, an end-of-turn token included. num_prompt: how many are the prompt.
        num_ctx: the most tokens it may hold. max_tokens: the most it may generate.
        num_cached: how many leading tokens have their KV in `slot`. num_reused: how many of the prompt were there
            already when it was first admitted.
        prompt: the prompt as an array, shape (num_prompt,).
        arrived, scheduled, first_token, last_token: monotonic seconds; 0 until it happened.
    """

    tokens: list[int]
    num_ctx: int
    max_tokens: int
    sampler: TokenChooser
    text: TextStream
    arrived: float = 0.0
    num_prompt: int = field(init=False)
    prompt: Tokens = field(init=False, repr=False)
    num_cached: int = 0
    num_reused: int = 0
    slot: int | None = None
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.prompt = np.array(self.tokens, np.int32)

    @property
    def num_pending(self) -> int:
        """Tokens that are not in the KV cache yet; 1 while decoding."""
        return len(self.tokens) - self.num_cached

    @property
    def num_generated(self) -> int:
        """Generated tokens so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another token."""
        return len(self.tokens) >= self.num_ctx or self.num_generated >= self.max_tokens
