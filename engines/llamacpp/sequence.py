"""One answer through time: its tokens, how many of them the KV cache holds, and when things happened.

A few numbers are stored and the rest is computed from them, so they cannot disagree. Whether a sequence is prefilling
or decoding is not a state: it is how many of its tokens are not in the cache yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from engines.events import TokenLogprob
from engines.llamacpp.detokenize import TextStream
from engines.llamacpp.kvcache import Tokens
from engines.request import Priority


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
        tokens: prompt and generated tokens, an end-of-turn token included, without those that a full window lost.
        num_prompt: how many the prompt had. num_shifted: how many tokens the window lost.
        num_ctx: the most tokens it may hold. max_tokens: the most it may generate.
        num_keep: leading tokens that a full window keeps; None ends the answer there instead.
        num_logprobs: likely alternatives to tell of each token, None for not even the token's own.
        echoes: the prompt's tokens are measured as well, so every one of them is computed.
        num_cached: how many leading tokens have their KV in `slot`. num_reused: how many of the prompt were there
            already when it was first admitted.
        prompt: what others may share of it, as an array: the prompt, or what the window kept when it lost its middle.
        is_moved: its cells were closed up, so they are not what computing its tokens anew would give.
        arrived, scheduled, first_token, last_token: monotonic seconds; 0 until it happened.
    """

    tokens: list[int]
    num_ctx: int
    max_tokens: int
    sampler: TokenChooser
    text: TextStream
    priority: Priority = Priority.NORMAL
    num_keep: int | None = None
    num_logprobs: int | None = None
    echoes: bool = False
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    arrived: float = 0.0
    num_prompt: int = field(init=False)
    prompt: Tokens = field(init=False, repr=False)
    num_cached: int = 0
    num_reused: int = 0
    num_shifted: int = 0
    is_moved: bool = False
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
        return len(self.tokens) + self.num_shifted - self.num_prompt

    @property
    def fills_window(self) -> bool:
        """Whether its window has no room for another token."""
        return len(self.tokens) >= self.num_ctx

    @property
    def is_full(self) -> bool:
        """Whether it must end here."""
        return self.num_generated >= self.max_tokens or (self.fills_window and self.num_keep is None)

    def shift(self) -> tuple[int, int]:
        """Lose the older half of what lies behind the tokens to keep (`spec/ollama.md` section 8.4).

        Returns:
            How many leading tokens stay, and how many behind them are gone. What the cache holds is for others to mend.
        """
        assert self.num_keep is not None
        keep = min(self.num_keep, self.num_ctx // 2 - 1)
        lost = (len(self.tokens) - keep) // 2
        del self.tokens[keep : keep + lost]
        self.num_shifted += lost
        return keep, lost

    def restart(self) -> None:
        """Nothing of it is in the cache any more; what it has said so far will be computed together with its prompt."""
        self.num_cached = 0
        self.is_moved = False
        self.prompt = np.array(self.tokens, np.int32)
