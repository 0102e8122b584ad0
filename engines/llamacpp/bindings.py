"""llama.cpp's C API as small objects: Model, Context, EmbeddingContext, Sampler. The only file that calls it.

Nothing here schedules or decides; calls are one to one with llama.h of llama-cpp-python 0.3.36. Its one surprise: the
objects are not thread-safe, and apart from Model's read-only vocabulary calls only the engine's loop thread may use
them. Calls into C release the GIL, so the event loop keeps running while llama.cpp decodes.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from llguidance import LLTokenizer

from engines.errors import ModelLoadFailed
from engines.llamacpp.capi import lib
from engines.request import Sampling

if TYPE_CHECKING:
    import numpy.typing as npt  # takes a tenth of the worker's start

Logits: TypeAlias = "npt.NDArray[np.float32]"
"""One row of logits, shape (n_vocab,). A view into llama.cpp's buffer: valid until the next decode."""

Vectors: TypeAlias = "npt.NDArray[np.float32]"
"""One row for each input, shape (inputs, dimensions)."""

_RUN = re.compile(r"\S{4096}|\s{4096}")
_LONG_TEXT = 16 * 1024
_MARKERS_AT_ONCE = 256
_SPECIAL_ATTRIBUTES = lib.LLAMA_TOKEN_ATTR_UNKNOWN | lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED

_CACHE_TYPES = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0, "q4_0": lib.GGML_TYPE_Q4_0}

RANDOM_SEED = 0xFFFFFFFF  # llama.h LLAMA_DEFAULT_SEED: asks for a random one, so it cannot be a seed


_WARN = 3  # ggml.h ggml_log_level: 1 debug, 2 info, 3 warn, 4 error, 5 continues the line before


@lib.llama_log_callback  # type: ignore[untyped-decorator]  # the binding has no types
def _log(level: int, text: bytes, _user_data: object) -> None:
    """llama.cpp's warnings and errors on stderr, where the parent keeps the end of them; its chatter nowhere."""
    if _WARN <= level <= _WARN + 1 and b"n_ctx_train" not in text:  # our pool of cells is meant to exceed one window
        sys.stderr.write(text.decode("utf-8", "replace"))
        sys.stderr.flush()


lib.llama_log_set(_log, ctypes.c_void_p(0))


class OutOfCells(Exception):
    """The KV cache has no room for the batch (llama_decode returned 1); nothing was changed."""


class DecodeFailed(Exception):
    """llama_decode failed for good; the contents of the KV cache are unknown."""


class Model:
    """The weights and the vocabulary of one GGUF.

    Raises:
        ModelLoadFailed: llama.cpp refused the file; its own words are on stderr.
    """

    def __init__(
        self,
        path: Path,
        *,
        parts: Sequence[str] = (),
        adapters: Sequence[str] = (),
        num_gpu: int = -1,
        main_gpu: int | None = None,
        tensor_split: Sequence[float] = (),
        use_mmap: bool | None = None,
        use_mlock: bool = False,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = num_gpu
        if main_gpu is not None and lib.llama_supports_gpu_offload():  # without a device, none is the main one
            params.main_gpu = main_gpu
            params.split_mode = lib.LLAMA_SPLIT_MODE_NONE
        if tensor_split:
            shares = tuple(tensor_split[: lib.LLAMA_MAX_DEVICES])
            self._split = (ctypes.c_float * lib.LLAMA_MAX_DEVICES)(*shares)  # kept: C holds the pointer
            params.tensor_split = self._split
        params.load_mode = _load_mode(use_mmap, use_mlock=use_mlock)
        self._progress = lib.llama_progress_callback(_progress_to(on_progress))  # kept: C holds the pointer
        params.progress_callback = self._progress
        if parts:
            paths = (ctypes.c_char_p * len(parts))(*map(os.fsencode, parts))
            self.handle = lib.llama_model_load_from_splits(paths, len(parts), params)
        else:
            self.handle = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise ModelLoadFailed(f"llama.cpp could not load {path.name}")
        self.adapters = [self._load_adapter(adapter) for adapter in adapters]
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.num_tokens = int(lib.llama_vocab_n_tokens(self.vocab))
        self.num_ctx_train = int(lib.llama_model_n_ctx_train(self.handle))
        self.num_parameters = int(lib.llama_model_n_params(self.handle))
        self.size_bytes = int(lib.llama_model_size(self.handle))
        self.adds_bos = bool(lib.llama_vocab_get_add_bos(self.vocab))
        self.is_recurrent = bool(lib.llama_model_is_recurrent(self.handle) or lib.llama_model_is_hybrid(self.handle))
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._ends: dict[int, bool] = {}

    def _load_adapter(self, path: str) -> object:
        """A LoRA adapter, which is freed with the model."""
        adapter = lib.llama_adapter_lora_init(self.handle, os.fsencode(path))
        if not adapter:
            self.close()
            raise ModelLoadFailed(f"llama.cpp could not load the adapter {Path(path).name}: is it for this model?")
        return adapter

    def apply_adapters(self, context: object) -> None:
        """Let every adapter take part in every request of a context, in full."""
        count = len(self.adapters)
        handles = (lib.llama_adapter_lora_p_ctypes * count)(*self.adapters)
        scales = (ctypes.c_float * count)(*[1.0] * count)
        if count and lib.llama_set_adapters_lora(context, handles, count, scales) != 0:
            lib.llama_free(context)
            raise ModelLoadFailed("llama.cpp could not apply the adapters")

    def close(self) -> None:
        """Free the weights. Contexts on them must be closed first."""
        if self.handle:
            lib.llama_model_free(self.handle)
            self.handle = None

    def chat_template(self, variant: str | None = None) -> str | None:
        """The GGUF's Jinja chat template, or a named variant such as `tool_use`; None when there is none."""
        text = lib.llama_model_chat_template(self.handle, variant.encode() if variant else None)
        return text.decode("utf-8", "replace") if text else None

    def special_text(self, which: str) -> str:
        """The text of the `bos` or `eos` token, empty when the vocabulary has none."""
        token = lib.llama_vocab_bos(self.vocab) if which == "bos" else lib.llama_vocab_eos(self.vocab)
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def infill_texts(self) -> tuple[str, str, str] | None:
        """The tokens for filling a gap, as text: before its beginning, before its end, before what fills it."""
        marks = [getattr(lib, f"llama_vocab_fim_{name}")(self.vocab) for name in ("pre", "suf", "mid")]
        if min(marks) < 0:
            return None
        before, after, middle = (self.piece(mark, special=True).decode("utf-8", "replace") for mark in marks)
        return before, after, middle

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The token ids of `text`.

        `add_special` adds BOS and EOS where the vocabulary wants them; `parse_special` reads markers such as
        `<|im_start|>` as control tokens.
        """
        cuts = self._cuts(text, parse_special)
        if not cuts:
            return self._tokenize(text, add_special, parse_special)
        pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
        tokens = [token for piece in pieces for token in self._tokenize(piece, False, parse_special)]
        around = self._tokenize("", add_special, True)  # BOS, EOS, both or nothing
        return [*around[: self.adds_bos], *tokens, *around[self.adds_bos :]]

    def _cuts(self, text: str, parse_special: bool) -> list[int]:
        """Where to cut a text that llama.cpp could not bear whole.

        Its pre-tokenizers match runs of one kind of character by recursion, and some 20,000 of them overflow the stack
        (unicode.cpp, std::regex); and it takes quadratic time in the number of markers (tokenizer_st_partition).
        """
        cuts = [run.end() for run in _RUN.finditer(text)]
        if parse_special and (cuts or len(text) >= _LONG_TEXT):
            markers = [marker.span() for marker in self._markers.finditer(text)]
            starts = [start for start, _ in markers]
            for i, cut in enumerate(cuts):  # never inside a marker
                at = bisect_right(starts, cut) - 1
                if at >= 0 and cut < markers[at][1]:
                    cuts[i] = starts[at]
            cuts += starts[_MARKERS_AT_ONCE::_MARKERS_AT_ONCE]
        return sorted(set(cuts) - {0, len(text)})

    def _tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        tokens = (lib.llama_token * size)()
        count = lib.llama_tokenize(self.vocab, data, len(data), tokens, size, add_special, parse_special)
        if count < 0:  # the size needed, negated (llama.h)
            tokens = (lib.llama_token * -count)()
            count = lib.llama_tokenize(self.vocab, data, len(data), tokens, -count, add_special, parse_special)
        return list(tokens[:count])

    @cached_property
    def _markers(self) -> re.Pattern[str]:
        """Matches every token that is read as a whole wherever it stands in a text."""
        tokens = range(self.num_tokens)
        special = (token for token in tokens if lib.llama_vocab_get_attr(self.vocab, token) & _SPECIAL_ATTRIBUTES)
        texts = {self.piece(token, special=True).decode("utf-8", "replace") for token in special} - {""}
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that `token` stands for, perhaps half a character; control tokens are empty unless `special`."""
        key = (token, special)
        found = self._pieces.get(key)
        if found is None:
            found = self._pieces[key] = self._read_piece(token, special)
        return found

    def _read_piece(self, token: int, special: bool) -> bytes:
        size = 128
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = lib.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    @property
    def end_token(self) -> int:
        """The token that ends a turn or, without one, the text."""
        end_of_turn = int(lib.llama_vocab_eot(self.vocab))
        return end_of_turn if end_of_turn >= 0 else int(lib.llama_vocab_eos(self.vocab))

    @cached_property
    def end_tokens(self) -> list[int]:
        """Every token that ends a generation. The first look takes some 50 ms for a large vocabulary."""
        return [token for token in range(self.num_tokens) if lib.llama_vocab_is_eog(self.vocab, token)]

    def single_token(self, text: str) -> int | None:
        """The one token that spells `text`, or None when it takes several."""
        tokens = self.tokenize(text, add_special=False, parse_special=True)
        return tokens[0] if len(tokens) == 1 else None

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation (end of turn, of sequence, of text)."""
        known = self._ends.get(token)
        if known is None:
            known = self._ends[token] = bool(lib.llama_vocab_is_eog(self.vocab, token))
        return known


def _progress_to(on_progress: Callable[[float], None] | None) -> Callable[[float, object], bool]:
    def report(fraction: float, _user_data: object) -> bool:
        if on_progress is not None:
            on_progress(fraction)
        return True

    return report


def _load_mode(use_mmap: bool | None, *, use_mlock: bool) -> int:
    if use_mlock:
        return int(lib.LLAMA_LOAD_MODE_MLOCK if use_mmap is False else lib.LLAMA_LOAD_MODE_MMAP_MLOCK)
    if use_mmap is None:
        return int(lib.LLAMA_LOAD_MODE_AUTO)
    return int(lib.LLAMA_LOAD_MODE_MMAP if use_mmap else lib.LLAMA_LOAD_MODE_NONE)


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


CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""One token that may come next: llama.h `llama_token_data`."""

Candidates: TypeAlias = "npt.NDArray[np.void]"
"""Tokens to choose among, shape (n,), of dtype CANDIDATE."""


class Sampler:
    """A chain of llama.cpp samplers for one sequence, in llama-server's order (common/sampling.cpp).

    Args:
        model: for the vocabulary, and what it was trained with.
        sampling: every field said; see `Sampling` for what is off. bias: what is added to which token's logit.
        history: the prompt, whose last tokens the penalties look at.
    """

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        history: Sequence[int],
        *,
        num_ctx: int,
        bias: Sequence[tuple[int, float]] = (),
    ) -> None:
        params = lib.llama_sampler_chain_default_params()
        params.no_perf = True
        self.chain = lib.llama_sampler_chain_init(params)
        self._array = lib.llama_token_data_array()
        self._add_bias(model, bias)
        self._add_penalties(model, sampling, num_ctx)
        window = num_ctx if has_dry(sampling) else penalty_window(sampling, num_ctx)
        for token in history[-window:] if window else ():
            lib.llama_sampler_accept(self.chain, token)
        seed = fold_seed(sampling.seed)
        if is_greedy(sampling):
            self._add(lib.llama_sampler_init_greedy())
        elif sampling.mirostat in (1, 2):
            self._add(self._temperature(sampling))
            self._add(_mirostat(model, sampling, seed))
        else:
            self._add_filters(model, sampling, seed)
            self._add(self._temperature(sampling))
            self._add(lib.llama_sampler_init_dist(seed))

    def _add(self, sampler: object) -> None:
        lib.llama_sampler_chain_add(self.chain, sampler)

    def _add_bias(self, model: Model, bias: Sequence[tuple[int, float]]) -> None:
        if bias:
            entries = (lib.llama_logit_bias * len(bias))(*bias)
            self._add(lib.llama_sampler_init_logit_bias(model.num_tokens, len(bias), entries))

    def _add_penalties(self, model: Model, sampling: Sampling, num_ctx: int) -> None:
        window = penalty_window(sampling, num_ctx)
        if window:
            self._add(
                lib.llama_sampler_init_penalties(
                    model.num_tokens,
                    window,
                    sampling.repeat_penalty or 1.0,
                    sampling.frequency_penalty or 0.0,
                    sampling.presence_penalty or 0.0,
                )
            )
        if has_dry(sampling):
            last = sampling.dry_penalty_last_n
            breakers = [text.encode("utf-8", "replace") for text in sampling.dry_sequence_breakers or ()]
            self._add(
                lib.llama_sampler_init_dry(
                    model.vocab,
                    sampling.dry_multiplier,
                    sampling.dry_base,
                    sampling.dry_allowed_length,
                    num_ctx if last is None or last < 0 else min(last, num_ctx),
                    (ctypes.c_char_p * len(breakers))(*breakers),
                    len(breakers),
                )
            )

    def _add_filters(self, model: Model, sampling: Sampling, seed: int) -> None:
        if sampling.top_n_sigma and sampling.top_n_sigma > 0:
            self._add(lib.llama_sampler_init_top_n_sigma(sampling.top_n_sigma))
        if sampling.top_k and 0 < sampling.top_k < model.num_tokens:
            self._add(lib.llama_sampler_init_top_k(sampling.top_k))
        if sampling.typical_p is not None and sampling.typical_p < 1:
            self._add(lib.llama_sampler_init_typical(sampling.typical_p, 1))
        if sampling.top_p is not None and sampling.top_p < 1:
            self._add(lib.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p:
            self._add(lib.llama_sampler_init_min_p(sampling.min_p, 1))
        if has_xtc(sampling):
            self._add(lib.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold or 0.0, 1, seed))

    @staticmethod
    def _temperature(sampling: Sampling) -> object:
        temperature = sampling.temperature or 0.0
        if sampling.dynatemp_range:
            exponent = 1.0 if sampling.dynatemp_exponent is None else sampling.dynatemp_exponent
            return lib.llama_sampler_init_temp_ext(temperature, sampling.dynatemp_range, exponent)
        return lib.llama_sampler_init_temp(temperature)

    def sample(self, context: Context, index: int) -> int:
        """Choose the next token from the logits at a batch index, and remember it."""
        return int(lib.llama_sampler_sample(self.chain, context.handle, index))

    def choose(self, candidates: Candidates) -> int:
        """Choose among the candidates alone, whose array is overwritten, and remember what was chosen."""
        pointer = ctypes.cast(candidates.ctypes.data, ctypes.POINTER(lib.llama_token_data))
        array = self._array
        array.data, array.size, array.selected, array.sorted = pointer, len(candidates), -1, False
        lib.llama_sampler_apply(self.chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        lib.llama_sampler_accept(self.chain, token)
        return token

    def close(self) -> None:
        """Free the chain. Harmless when done twice."""
        if self.chain:
            lib.llama_sampler_free(self.chain)
            self.chain = None

    def __del__(self) -> None:  # of a request that was cancelled before anyone ran it
        self.close()


def _mirostat(model: Model, sampling: Sampling, seed: int) -> object:
    tau = 5.0 if sampling.mirostat_tau is None else sampling.mirostat_tau
    eta = 0.1 if sampling.mirostat_eta is None else sampling.mirostat_eta
    if sampling.mirostat == 1:
        return lib.llama_sampler_init_mirostat(model.num_tokens, seed, tau, eta, 100)  # 100: as in llama-server
    return lib.llama_sampler_init_mirostat_v2(seed, tau, eta)


def is_greedy(sampling: Sampling) -> bool:
    """Whether the most likely token is always the one."""
    return sampling.top_k == 1 or ((sampling.temperature or 0.0) <= 0 and not has_xtc(sampling))


def has_xtc(sampling: Sampling) -> bool:
    """Whether the likeliest tokens are left out now and then; llama.cpp turns thresholds above 0.5 off."""
    return (sampling.xtc_probability or 0.0) > 0 and (sampling.xtc_threshold or 0.0) <= 0.5


def has_dry(sampling: Sampling) -> bool:
    """Whether sequences that were said before are penalised."""
    return (
        bool(sampling.dry_multiplier)
        and sampling.dry_base is not None
        and sampling.dry_base >= 1
        and sampling.dry_penalty_last_n != 0
    )


def penalty_window(sampling: Sampling, num_ctx: int) -> int:
    """How many of the last tokens change the logits of those like them; 0 when none does."""
    said = (sampling.repeat_penalty or 1.0, sampling.frequency_penalty or 0.0, sampling.presence_penalty or 0.0)
    if said == (1.0, 0.0, 0.0):
        return 0
    last = sampling.repeat_last_n or 0
    return num_ctx if last < 0 else min(last, num_ctx)


def fold_seed(seed: int | None) -> int:
    """A seed as llama.cpp takes it: 32 bits. Unsaid and negative ones are random."""
    if seed is None or seed < 0:
        return int.from_bytes(os.urandom(4)) & 0x7FFFFFFF
    folded = seed & 0xFFFFFFFF
    return folded if folded != RANDOM_SEED else RANDOM_SEED - 1


def guidance_tokenizer(model: Model) -> LLTokenizer:
    """The vocabulary as llguidance needs it, every token that ends a generation included. Takes about a second."""
    from llguidance.llamacpp import lltokenizer_from_vocab  # noqa: PLC0415  # looks for llama_cpp, see capi

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # llguidance 1.3 uses llama_token_get_attr, once a token
        return lltokenizer_from_vocab(model.vocab, eos_token=[model.end_token, *model.end_tokens])


def version() -> str:
    """The version of the binding, which names the llama.cpp it carries."""
    return importlib.metadata.version("llama-cpp-python")


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


def rerank_joints(model: Model) -> tuple[list[int], list[int], list[int]]:
    """The special tokens before a query, between it and a document, and after that, where the vocabulary wants them."""
    sep = int(lib.llama_vocab_sep(model.vocab))
    end = int(lib.llama_vocab_eos(model.vocab))
    end = end if end >= 0 else sep
    closing = [end] if lib.llama_vocab_get_add_eos(model.vocab) else []
    separator = [sep] if lib.llama_vocab_get_add_sep(model.vocab) else []
    return [int(lib.llama_vocab_bos(model.vocab))] if model.adds_bos else [], [*closing, *separator], closing


def quantize(source: Path, target: Path, kind: str, on_tensor: Callable[[int, int], None]) -> bool:
    """Write a model's weights anew as another type, such as `Q4_K_M`, or as they are with `COPY`; whether that worked.

    A model that is split becomes one file; `source` is its first part then, under the name that llama.cpp gives parts.
    `on_tensor` is told each tensor's number, from 1, and how many there are. llama.cpp's own words are on stderr.
    """
    lib.llama_backend_init()
    params = lib.llama_model_quantize_default_params()
    params.only_copy = kind == "COPY"
    if not params.only_copy:
        params.ftype = getattr(lib, "LLAMA_FTYPE_ALL_F32" if kind == "F32" else f"LLAMA_FTYPE_MOSTLY_{kind}")

    @lib.llama_log_callback  # type: ignore[untyped-decorator]  # the binding has no types
    def listen(level: int, text: bytes, user_data: object) -> None:
        if tensor := re.match(rb"\[ *(\d+)/ *(\d+)\]", text):
            on_tensor(int(tensor[1]), int(tensor[2]))
        _log(level, text, user_data)

    lib.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        return int(lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))) == 0
    finally:
        lib.llama_log_set(_log, ctypes.c_void_p(0))
