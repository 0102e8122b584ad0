"""A GGUF as llama.cpp holds it: weights and vocabulary. Calls are one to one with llama.h.

The vocabulary is read-only, so any thread may ask for it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from llguidance import LLTokenizer

from engines.errors import ModelLoadFailed
from engines.llamacpp.capi import has_kernels, lib

_RUN = re.compile(r"\S{4096}|\s{4096}")
_LONG_TEXT = 16 * 1024
_MARKERS_AT_ONCE = 256
_SPECIAL_ATTRIBUTES = lib.LLAMA_TOKEN_ATTR_UNKNOWN | lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED


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
        suits_kernels: bool = True,
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
        if has_kernels and suits_kernels:
            params.use_extra_bufts = False  # weights as they are in the file, which the kernels read
            os.environ.setdefault("GGML_CPU_TILED_MM", "0")  # llama.cpp's other way with wide batches
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


def rerank_joints(model: Model) -> tuple[list[int], list[int], list[int]]:
    """The special tokens before a query, between it and a document, and after that, where the vocabulary wants them."""
    sep = int(lib.llama_vocab_sep(model.vocab))
    end = int(lib.llama_vocab_eos(model.vocab))
    end = end if end >= 0 else sep
    closing = [end] if lib.llama_vocab_get_add_eos(model.vocab) else []
    separator = [sep] if lib.llama_vocab_get_add_sep(model.vocab) else []
    return [int(lib.llama_vocab_bos(model.vocab))] if model.adds_bos else [], [*closing, *separator], closing


def guidance_tokenizer(model: Model) -> LLTokenizer:
    """The vocabulary as llguidance needs it, every token that ends a generation included. Takes about a second."""
    from llguidance.llamacpp import lltokenizer_from_vocab  # noqa: PLC0415  # looks for llama_cpp, see capi

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # llguidance 1.3 uses llama_token_get_attr, once a token
        return lltokenizer_from_vocab(model.vocab, eos_token=[model.end_token, *model.end_tokens])


def version() -> str:
    """The version of the binding, which names the llama.cpp it carries."""
    return importlib.metadata.version("llama-cpp-python")
