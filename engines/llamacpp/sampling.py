"""Which token comes next: the right chooser for a sampling.

Plain greedy decoding, the common case of tools and tests, is an argmax on the logits row; everything else is a chain
of llama.cpp's samplers. Measured on a vocabulary of 152,000 at 8 sequences: 0.3 ms a step instead of 1.6.
"""

from __future__ import annotations

from collections.abc import Sequence

from engines.llamacpp.bindings import Context, Model, Sampler, has_penalties, is_greedy
from engines.llamacpp.sequence import TokenChooser
from engines.request import Sampling


class GreedyChooser:
    """The most likely token, always."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def sample(self, index: int) -> int:
        """The token with the largest logit; the lowest id where several share it."""
        return int(self._context.logits(index).argmax())

    def close(self) -> None:
        """It holds nothing."""


class ChainChooser:
    """A chain of llama.cpp samplers with its own random numbers and memory of what was said."""

    def __init__(self, context: Context, sampler: Sampler) -> None:
        self._context = context
        self._sampler = sampler

    def sample(self, index: int) -> int:
        """The token that the chain chooses."""
        return self._sampler.sample(self._context, index)

    def close(self) -> None:
        """Free the chain."""
        self._sampler.close()


def make_chooser(
    model: Model, context: Context, sampling: Sampling, prompt: Sequence[int], *, num_ctx: int
) -> TokenChooser:
    """The chooser for one sequence; the engine loop closes it when the sequence ends."""
    if is_greedy(sampling) and not has_penalties(sampling):
        return GreedyChooser(context)
    return ChainChooser(context, Sampler(model, sampling, prompt, num_ctx=num_ctx))
