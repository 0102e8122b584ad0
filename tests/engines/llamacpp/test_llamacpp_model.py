from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.llamacpp import model as model_module
from engines.llamacpp.model import Model
from engines.llamacpp.sampler import fold_seed

DEMO = Path(__file__).parents[3] / "engines/store/demo/demo.gguf"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The demo model's vocabulary."""
    model = Model(DEMO, num_gpu=0)
    yield model
    model.close()


words = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<think>", "<|", "|>", "user", " ", "  ", "\n", "é", "🙂", "Paris"]
)


@given(text=st.lists(words, max_size=30).map("".join), add_special=st.booleans())
def test_long_texts_are_tokenized_like_short_ones(model: Model, text: str, add_special: bool) -> None:
    """Cutting a text at markers, as is done with long ones, does not change its tokens."""
    whole = model.tokenize(text, add_special=add_special, parse_special=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "_LONG_TEXT", 0)
        patch.setattr(model_module, "_MARKERS_AT_ONCE", 2)
        assert model.tokenize(text, add_special=add_special, parse_special=True) == whole


def test_markers_do_not_make_tokenizing_slow(model: Model) -> None:
    """A megabyte of markers, for which llama.cpp alone takes half a minute."""
    started = time.monotonic()
    tokens = model.tokenize("<|im_end|>x" * 100_000, add_special=False, parse_special=True)
    assert len(tokens) == 200_000
    assert time.monotonic() - started < 10


@given(text=st.text())
def test_tokens_spell_the_text(model: Model, text: str) -> None:
    """Every text comes back from its tokens."""
    tokens = model.tokenize(text, add_special=False, parse_special=False)
    assert b"".join(model.piece(token) for token in tokens).decode() == text


def test_markers_are_tokens_only_when_they_are_to_be(model: Model) -> None:
    """`parse_special` decides; as a token, a marker has no text unless it is asked for."""
    [marker] = model.tokenize("<|im_end|>", add_special=False, parse_special=True)
    assert model.is_end(marker)
    assert model.piece(marker) == b""
    assert model.piece(marker, special=True) == b"<|im_end|>"
    assert len(model.tokenize("<|im_end|>", add_special=False, parse_special=False)) > 1


def test_the_file_says_what_the_model_is(model: Model) -> None:
    """Facts of the demo model."""
    assert (model.num_ctx_train, model.num_tokens) == (4096, 1984)
    assert 2_700_000 < model.num_parameters < 2_800_000
    assert "<tool_call>" in (model.chat_template() or "")
    assert model.chat_template("tool_use") is None
    assert not model.is_recurrent


@given(seed=st.integers(-(2**70), 2**70))
def test_seeds_are_folded_to_32_bits(seed: int) -> None:
    """Any integer is a seed, and none is the number that asks llama.cpp for a random one."""
    folded = fold_seed(seed)
    assert 0 <= folded < 0xFFFFFFFF
    if seed >= 0:
        assert folded == fold_seed(seed)
        assert seed >= 2**32 - 1 or folded == seed


def test_a_run_without_a_break_is_cut_but_loses_nothing(model: Model) -> None:
    """Some tokenizers recurse once a character of a run, so a long one never reaches llama.cpp whole."""
    text = "a" * 20_000 + "<|im_end|>" + " " * 9_000
    assert max(map(len, [text[s:e] for s, e in pairwise([0, *model._cuts(text, True), len(text)])])) <= 8192
    tokens = model.tokenize(text, add_special=False, parse_special=True)
    assert b"".join(model.piece(token, special=True) for token in tokens).decode() == text
