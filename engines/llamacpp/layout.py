"""How much a context holds: one request's window, the cells of all of them, the slots, the batch.

The engine makes its context by these numbers and the memory estimate counts with them, so both must be decided in one
place. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.inference import LoadConfig

DEFAULT_NUM_CTX = 4096
KEPT_SEQUENCES = 32
"""Slots beyond those that run, for prefixes of finished requests."""

MIN_STREAMS = 4
"""Fewer windows than this are shared by all, unless no more requests than that are to be served at once."""

_PAD = 256  # llama-context.cpp rounds n_ctx, or a stream's part of it, up to this

MAX_SLOTS = 256  # llama-cparams.h LLAMA_MAX_SEQ
MAX_MEASURED = 32
"""Prompt tokens of a step whose own likelihood is asked for: each needs a whole row of logits."""

MAX_BATCH = 8192
"""Tokens of a step beyond which nothing is won and everyone waits."""

UBATCH = 512
"""Tokens that llama.cpp computes at once, whatever the batch."""

SMALL_UBATCH = 128
"""The same without flash attention, where the scores of all cells are held at once; as fast, for a quarter of them."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`num_ctx`: one request's window in tokens. `num_cells`: of all. `num_batch`: most tokens of one step.

    `num_ubatch`: tokens computed at once. `num_outputs`: most rows of logits of one step. `is_unified`: whether the
    slots share the cells; else each has an equal part of them.
    """

    num_ctx: int
    num_cells: int
    num_slots: int
    num_batch: int
    num_ubatch: int
    num_outputs: int
    is_unified: bool

    @property
    def seen_cells(self) -> int:
        """Cells that a token may have to look at."""
        return self.num_cells if self.is_unified else self.num_cells // self.num_slots


def lay_out(config: LoadConfig, trained: int, *, is_recurrent: bool) -> Layout:
    """The layout of a model that was trained with a window of `trained` tokens, 0 when unknown.

    In one pool, finished sequences keep their slots, so there are more than can run; recurrent memory pays for each and
    has none. Streams need a window each: where there are few, one pool serves more requests at once.
    """
    num_ctx = _window(config.context_size, trained)
    windows = max(config.num_parallel, 1)
    is_unified = config.unified_cache or is_recurrent or windows < min(config.num_sequences, MIN_STREAMS)
    num_cells, num_slots = num_ctx * windows, max(config.num_sequences, 1) + (0 if is_recurrent else KEPT_SEQUENCES)
    if not is_unified:
        num_cells, num_slots = padded(num_ctx) * windows, windows
    num_slots = min(num_slots, MAX_SLOTS)
    num_batch = max(min(config.num_batch, num_cells, MAX_BATCH), num_slots)
    num_ubatch = min(num_batch, SMALL_UBATCH if config.flash_attention is False else UBATCH)
    return Layout(num_ctx, num_cells, num_slots, num_batch, num_ubatch, num_slots + MAX_MEASURED, is_unified)


def padded(num_cells: int) -> int:
    """As many cells as llama.cpp makes of so many."""
    return -(-num_cells // _PAD) * _PAD


def _window(asked: int | None, trained: int) -> int:
    """Tokens of one request's window: what was asked for, within what the model was trained with."""
    if asked is None:
        asked = DEFAULT_NUM_CTX
    elif asked <= 0:
        asked = trained or DEFAULT_NUM_CTX
    return min(asked, trained) if trained else asked
