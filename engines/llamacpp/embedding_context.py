"""llama.cpp's context for vectors and scores. Calls are one to one with llama.h, for the loop thread alone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from engines.errors import ModelLoadFailed
from engines.llamacpp.capi import lib
from engines.llamacpp.context import DecodeFailed
from engines.llamacpp.model import Model

if TYPE_CHECKING:
    import numpy.typing as npt

Vectors: TypeAlias = "npt.NDArray[np.float32]"
"""One row for each input, shape (inputs, dimensions)."""


class EmbeddingContext:
    """A context that turns whole inputs into one vector each, many inputs in one batch.

    Every input is a sequence of its own, so none sees another. A batch is computed in one piece (`n_ubatch` is
    `n_batch`), because pooling does not reach across pieces. An encoder keeps no memory and reads an input in both
    directions, so an input must be in one batch; a causal model may read one in chunks, batch after batch.

    Args:
        pooling: llama.h's number, -1 for what the model says.
    """

    def __init__(
        self,
        model: Model,
        *,
        pooling: int,
        num_ctx: int,
        num_batch: int,
        num_sequences: int,
        num_threads: int,
        flash_attention: bool | None = None,
    ) -> None:
        if lib.llama_model_has_encoder(model.handle) and lib.llama_model_has_decoder(model.handle):
            raise ModelLoadFailed("llama.cpp makes no embeddings with models that have both an encoder and a decoder")
        params = lib.llama_context_default_params()
        params.n_ctx = max(num_ctx, num_batch)
        params.n_batch = params.n_ubatch = num_batch
        params.n_seq_max = num_sequences
        params.n_threads = params.n_threads_batch = num_threads
        params.pooling_type = pooling
        params.embeddings = params.kv_unified = params.no_perf = True
        if flash_attention is not None:
            params.flash_attn_type = int(flash_attention)
        self.handle = lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise ModelLoadFailed("llama.cpp could not create a context; there may not be enough memory for it")
        model.apply_adapters(self.handle)
        self.num_batch = int(lib.llama_n_batch(self.handle))
        self.num_sequences = num_sequences
        self.pooling = int(lib.llama_pooling_type(self.handle))
        has_scores = self.pooling == lib.LLAMA_POOLING_TYPE_RANK
        size = lib.llama_model_n_cls_out if has_scores else lib.llama_model_n_embd_out
        self.num_dimensions = int(size(model.handle))
        self._memory = lib.llama_get_memory(self.handle)
        has_encoder = bool(lib.llama_model_has_encoder(model.handle))
        self.can_split = bool(self._memory) and not has_encoder and bool(lib.llama_get_causal_attn(self.handle))
        self._compute = lib.llama_encode if has_encoder else lib.llama_decode
        self._make_batch()

    def _make_batch(self) -> None:
        """A batch over our own arrays, so that filling it is a few slice assignments and freeing it nothing."""
        size = self.num_batch
        self._token, self._pos, self._seq = (np.zeros(size, np.int32) for _ in range(3))
        self._num_seq, self._wants_output = np.ones(size, np.int32), np.ones(size, np.int8)
        self._seq_addresses = self._seq.ctypes.data + np.arange(size, dtype=np.uintp) * np.uintp(self._seq.itemsize)
        int32, address = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))
        self._batch = lib.llama_batch(
            token=self._token.ctypes.data_as(int32),
            pos=self._pos.ctypes.data_as(int32),
            n_seq_id=self._num_seq.ctypes.data_as(int32),
            seq_id=self._seq_addresses.ctypes.data_as(address),
            logits=self._wants_output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        self._count = 0

    def close(self) -> None:
        """Free the context."""
        if self.handle:
            lib.llama_free(self.handle)
            self.handle = None

    @property
    def num_threads(self) -> int:
        """Threads that compute."""
        return int(lib.llama_n_threads(self.handle))

    def set_threads(self, count: int) -> None:
        """Compute with so many threads from the next batch on."""
        lib.llama_set_n_threads(self.handle, count, count)

    def clear(self) -> None:
        """Forget every sequence and start a new batch."""
        self.clear_batch()
        if self._memory:
            lib.llama_memory_clear(self._memory, False)

    def clear_batch(self) -> None:
        """Start a new batch, which may go on with a sequence where `can_split` allows it."""
        self._count = 0

    def add(self, sequence: int, tokens: Sequence[int], position: int = 0) -> None:
        """Append `tokens` to a sequence, the first at `position`."""
        start, end = self._count, self._count + len(tokens)
        self._token[start:end] = tokens
        self._pos[start:end] = np.arange(position, position + len(tokens), dtype=np.int32)
        self._seq[start:end] = sequence
        self._count = end

    def compute(self, num_sequences: int) -> Vectors:
        """Compute the batch; one row for each of the sequences 0 to `num_sequences`.

        Raises:
            DecodeFailed: the context can no longer be trusted.
        """
        self._batch.n_tokens = self._count
        status = self._compute(self.handle, self._batch)
        if status != 0:
            raise DecodeFailed(f"llama.cpp returned {status} for a batch of {self._count} tokens")
        vectors = np.empty((num_sequences, self.num_dimensions), np.float32)
        start, row_bytes = vectors.ctypes.data, vectors.strides[0]
        for sequence in range(num_sequences):
            source = lib.llama_get_embeddings_seq(self.handle, sequence)
            if not source:
                raise DecodeFailed("llama.cpp pooled nothing")
            ctypes.memmove(start + sequence * row_bytes, source, row_bytes)
        return vectors
