"""llama.cpp's samplers: a chain for each sequence. Calls are one to one with llama.h, for the loop thread alone."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from engines.llamacpp.capi import lib
from engines.llamacpp.context import Context
from engines.llamacpp.model import Model
from engines.request import Sampling

if TYPE_CHECKING:
    import numpy.typing as npt

RANDOM_SEED = 0xFFFFFFFF  # llama.h LLAMA_DEFAULT_SEED: asks for a random one, so it cannot be a seed

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
