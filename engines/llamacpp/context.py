"""llama.cpp's context for text: the KV cache and the batch that feeds it. Calls are one to one with llama.h.

Nothing here schedules or decides. A context is not thread-safe: only the engine's loop thread may use one. Calls into C
release the GIL, so the event loop keeps running while llama.cpp decodes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from engines.errors import ModelLoadFailed
from engines.llamacpp.capi import lib
from engines.llamacpp.model import Model

if TYPE_CHECKING:
    import numpy.typing as npt  # takes a tenth of the worker's start

Logits: TypeAlias = "npt.NDArray[np.float32]"
"""One row of logits, shape (n_vocab,). A view into llama.cpp's buffer: valid until the next decode."""

_CACHE_TYPES = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0, "q4_0": lib.GGML_TYPE_Q4_0}


class OutOfCells(Exception):
    """The KV cache has no room for the batch (llama_decode returned 1); nothing was changed."""


class DecodeFailed(Exception):
    """llama_decode failed for good; the contents of the KV cache are unknown."""


class Context:
    """One KV cache and the batch buffer that feeds it.

    Either all sequences share one pool of `num_cells` cells (`kv_unified`), so a short sequence costs what it holds and
    no more, but each token looks at everyone's cells; or each is a stream with an equal part of them, and prefixes are
    copied cell by cell. Positions of a sequence must be contiguous from 0; llama_decode refuses a gap.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_cells: int,
        num_sequences: int,
        num_batch: int,
        num_ubatch: int,
        num_outputs: int,
        num_threads: int,
        is_unified: bool = True,
        flash_attention: bool | None = None,
        cache_type: str = "f16",
    ) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = num_cells
        params.n_batch = num_batch
        params.n_ubatch = num_ubatch
        params.n_seq_max = num_sequences
        params.n_outputs_max = num_outputs  # rows of logits of a step; llama.cpp aborts when asked for more
        params.n_threads = params.n_threads_batch = num_threads
        params.kv_unified = self._is_unified = is_unified
        params.swa_full = True  # the cells behind a sliding window stay, so that prefixes can be shared and kept
        params.no_perf = True
        params.type_k = params.type_v = _CACHE_TYPES[cache_type]
        if flash_attention is not None:
            params.flash_attn_type = int(flash_attention)  # llama.h llama_flash_attn_type: 0 disabled, 1 enabled
        self.handle = lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise ModelLoadFailed("llama.cpp could not create a context; there may not be enough memory for it")
        model.apply_adapters(self.handle)
        self.num_cells = int(lib.llama_n_ctx(self.handle))
        self.num_batch = int(lib.llama_n_batch(self.handle))
        self._num_tokens = model.num_tokens
        self._memory = lib.llama_get_memory(self.handle)
        self._batch = lib.llama_batch_init(self.num_batch, 0, 1)
        # Views over the C arrays: filling a batch is a few slice assignments, not a loop over tokens.
        self._token = np.ctypeslib.as_array(self._batch.token, (self.num_batch,))
        self._pos = np.ctypeslib.as_array(self._batch.pos, (self.num_batch,))
        self._wants_logits = np.ctypeslib.as_array(self._batch.logits, (self.num_batch,))
        np.ctypeslib.as_array(self._batch.n_seq_id, (self.num_batch,))[:] = 1
        # seq_id is an array of pointers to one-element arrays; each element is found once and kept as a view.
        self._seq_ids = [np.ctypeslib.as_array(self._batch.seq_id[i], (1,)) for i in range(self.num_batch)]
        self._count = 0

    def close(self) -> None:
        """Free the cache and the batch."""
        if self.handle:
            lib.llama_batch_free(self._batch)
            lib.llama_free(self.handle)
            self.handle = None

    @property
    def num_threads(self) -> int:
        """Threads that compute."""
        return int(lib.llama_n_threads(self.handle))

    def set_threads(self, count: int) -> None:
        """Compute with so many threads from the next decode on."""
        lib.llama_set_n_threads(self.handle, count, count)

    def clear_batch(self) -> None:
        """Start a new batch."""
        self._count = 0

    def add(self, slot: int, tokens: Sequence[int], position: int, *, wants_logits: bool, wants_all: bool) -> int:
        """Append `tokens` of the sequence in `slot`, the first at `position`.

        Returns:
            The batch index of the last one, whose logits are computed when `wants_logits`. With `wants_all` those of
            every one are; a batch may ask for `num_outputs` in all.
        """
        start, end = self._count, self._count + len(tokens)
        self._token[start:end] = tokens
        self._pos[start:end] = range(position, position + len(tokens))
        self._wants_logits[start:end] = wants_all
        self._wants_logits[end - 1] = wants_logits or wants_all
        for i in range(start, end):
            self._seq_ids[i][0] = slot
        self._count = end
        return end - 1

    def decode(self) -> None:
        """Compute the batch.

        Raises:
            OutOfCells: no room; nothing changed. DecodeFailed: the context can no longer be trusted.
        """
        self._batch.n_tokens = self._count
        status = lib.llama_decode(self.handle, self._batch)
        if status == 1:
            raise OutOfCells
        if status != 0:
            raise DecodeFailed(f"llama_decode returned {status}")

    def logits(self, index: int) -> Logits:
        """The logits at a batch index that asked for them."""
        row = lib.llama_get_logits_ith(self.handle, index)
        return np.ctypeslib.as_array(row, (self._num_tokens,))

    def copy(self, source: int, slot: int, count: int) -> None:
        """Let the empty `slot` begin with the first `count` positions of `source`.

        In one pool that costs metadata and no cells. Between streams llama.cpp copies whole windows; a state is what is
        in use.

        Raises:
            DecodeFailed: llama.cpp does not take its own state.
        """
        if self._is_unified:
            lib.llama_memory_seq_cp(self._memory, source, slot, 0, count)
            return
        self._put(slot, self.state(source))
        self.remove(slot, count)

    def swap(self, one: int, other: int) -> None:
        """Let each of two slots hold what the other held; either may be empty. Raises DecodeFailed as `copy` does."""
        states = [self.state(slot) if self._holds(slot) else None for slot in (one, other)]
        self.remove(one)
        self.remove(other)
        for slot, state in zip((other, one), states, strict=True):
            if state is not None:
                self._put(slot, state)

    def _holds(self, slot: int) -> bool:
        return bool(lib.llama_memory_seq_pos_max(self._memory, slot) >= 0)

    def _put(self, slot: int, state: memoryview) -> None:
        if not self.set_state(slot, state):
            raise DecodeFailed(f"a state of {len(state)} bytes could not be moved to slot {slot}")

    def remove(self, slot: int, start: int = 0) -> None:
        """Forget everything in `slot` from position `start` on; cells that nobody else shares are free again."""
        lib.llama_memory_seq_rm(self._memory, slot, start, -1)

    @property
    def can_shift(self) -> bool:
        """Whether positions can be moved after the fact."""
        return bool(lib.llama_memory_can_shift(self._memory))

    def close_up(self, slot: int, start: int, count: int) -> None:
        """Forget `count` positions of `slot` from `start` on and move what follows there; nobody else may hold it."""
        lib.llama_memory_seq_rm(self._memory, slot, start, start + count)
        lib.llama_memory_seq_add(self._memory, slot, start + count, -1, -count)

    def state(self, slot: int) -> memoryview:
        """Everything that `slot` holds, as bytes that `set_state` takes; empty when llama.cpp cannot say."""
        size = int(lib.llama_state_seq_get_size(self.handle, slot))
        data = np.empty(size, np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = int(lib.llama_state_seq_get_data(self.handle, pointer, size, slot))
        return data.data[:written]

    def set_state(self, slot: int, state: bytes | memoryview) -> bool:
        """Fill the empty `slot` with a state of a context like this one; False, and still empty, when there is no room.

        llama.cpp checks shapes and types and nothing else: only states whose origin is certain may come here.
        """
        data = np.frombuffer(state, np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if lib.llama_state_seq_set_data(self.handle, pointer, len(data), slot):
            return True
        self.remove(slot)
        return False
