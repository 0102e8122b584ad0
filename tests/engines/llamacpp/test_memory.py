"""The memory estimate: its parts by hand, against llama.cpp's own buffers, and against headers from strangers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import SHAPES, write_model

from engines.errors import GGUFParseError
from engines.inference import LoadConfig
from engines.llamacpp.hparams import MAX_LAYERS, read_hyperparameters
from engines.llamacpp.layout import SMALL_UBATCH, lay_out
from engines.llamacpp.memory import estimate
from engines.model import TensorInfo
from engines.store.gguf import GGUFHeader, merge_parts, read_header

MIB = 1 << 20
CONFIG = LoadConfig(context_size=4096, num_parallel=4, num_sequences=32)

MEASURE = """
import ctypes, json, sys, psutil, llama_cpp as lib
path, cells, slots, ubatch, outputs, unified, flash, kind = sys.argv[1], *map(int, sys.argv[2:])
lines = []
log = lib.llama_log_callback(lambda level, text, data: lines.append(text.decode()))
lib.llama_log_set(log, ctypes.c_void_p(0))
model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
params = lib.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = cells, 512, ubatch, slots
params.n_outputs_max = outputs
params.kv_unified, params.flash_attn_type, params.type_k, params.type_v = bool(unified), flash, kind, kind
context = lib.llama_init_from_model(model, params)
print(json.dumps("".join(lines)))
"""
"""What llama.cpp reports of a context like the engine's. The real engine is measured in tests/e2e."""


def header(
    architecture: str = "llama", *, num_vocab: int = 1000, data_bytes: int = 10 * MIB, **says: Any
) -> GGUFHeader:
    """A header that says this; `a__b` stands for `a.b`."""
    numbers = {"block_count": 2, "embedding_length": 64, "attention.head_count": 4, "context_length": 8192}
    numbers |= {name.replace("__", "."): value for name, value in says.items()}
    metadata = {"general.architecture": architecture} | {f"{architecture}.{name}": v for name, v in numbers.items()}
    tensors = (TensorInfo("token_embd.weight", "F16", (64, num_vocab)),)
    return GGUFHeader(3, metadata, tensors, 64 * num_vocab, header_bytes=1000, data_bytes=data_bytes)


def cache_bytes(architecture: str = "llama", config: LoadConfig = CONFIG, **says: Any) -> int:
    """The cache of a model that says this."""
    return estimate(header(architecture, **says), config).cache_bytes


def test_a_cell_holds_k_and_v_of_every_layer() -> None:
    """16384 cells, 2 layers, 4 heads of 16 elements for K and as many for V, two bytes each."""
    assert cache_bytes() == 16384 * 2 * (64 + 64) * 2
    assert cache_bytes(attention__head_count_kv=1) == 16384 * 2 * (16 + 16) * 2
    assert cache_bytes(attention__head_count_kv=[1, 3]) == 16384 * (16 + 48) * 2 * 2
    assert cache_bytes(attention__key_length=32, attention__value_length=8) == 16384 * 2 * (128 + 32) * 2


def test_quantized_cells_are_smaller() -> None:
    """34 bytes for 32 elements at Q8_0, 18 at Q4_0, where 16-bit floats take 64."""
    sizes = [cache_bytes(config=LoadConfig(context_size=256, cache_type=kind)) for kind in ("f16", "q8_0", "q4_0")]
    assert sizes == [256 * 2 * 4 * size for size in (64, 34, 18)]


def test_compressed_attention_keeps_no_v() -> None:
    """What is kept is one row for all heads, from which both are computed."""
    says: dict[str, Any] = {"attention__head_count_kv": 1, "attention__key_length": 40, "attention__value_length": 32}
    compressed = cache_bytes("deepseek2", attention__key_length_mla=24, attention__value_length_mla=16, **says)
    assert compressed == 16384 * 2 * 40 * 2


def test_recurrent_models_pay_for_sequences_and_not_for_windows() -> None:
    """Their state is of one size, however long the text."""
    says: dict[str, Any] = {
        "attention__head_count": 0,
        "ssm__conv_kernel": 4,
        "ssm__inner_size": 128,
        "ssm__state_size": 16,
    }
    state = (3 * 128 + 16 * 128) * 4
    assert cache_bytes("mamba", **says) == 2 * 32 * state
    assert cache_bytes("mamba", LoadConfig(context_size=8192, num_sequences=4), **says) == 2 * 4 * state


def test_hybrid_models_pay_for_both() -> None:
    """Layers without K and V heads keep a state."""
    assert cache_bytes("lfm2", attention__head_count_kv=[0, 4], shortconv__l_cache=3) == 32 * 64 * 2 * 4 + 16384 * 256
    assert cache_bytes("qwen35", block_count=4, ssm__conv_kernel=4, ssm__inner_size=128, ssm__state_size=16) == (
        3 * 32 * (3 * 128 + 16 * 128) * 4 + 16384 * 256
    )


def test_layers_that_reuse_the_cells_of_others_keep_nothing() -> None:
    """As in gemma 4, and the draft head of a model that has one."""
    assert cache_bytes("gemma4", block_count=8, attention__shared_kv_layers=3) == 5 * cache_bytes() // 2
    assert cache_bytes("glm4moe", block_count=8, nextn_predict_layers=1) == 7 * cache_bytes() // 2


def test_encoders_keep_nothing() -> None:
    """They read a text once."""
    assert cache_bytes("bert") == 0


def test_parts_count_together() -> None:
    """The weights of a split model are in all of its files."""
    whole = estimate(header(data_bytes=30), CONFIG)
    assert estimate(merge_parts([header(data_bytes=20), GGUFHeader(3, {}, (), 0, 9, 10)]), CONFIG) == whole


def test_without_flash_attention_the_scores_are_kept() -> None:
    """One for every pair of token and cell, and head."""
    on, off = (estimate(header(), LoadConfig(context_size=8192, flash_attention=on)) for on in (True, False))
    assert off.compute_bytes > SMALL_UBATCH * 8192 * 4 * 4 > on.compute_bytes


def test_a_stream_is_a_window_for_each_request() -> None:
    """Padded as llama.cpp pads it. A token looks at its own alone."""
    config = LoadConfig(context_size=1000, num_parallel=4, num_sequences=32, unified_cache=False, flash_attention=False)
    layout = lay_out(config, 8192, is_recurrent=False)
    assert (layout.is_unified, layout.num_slots, layout.num_cells, layout.seen_cells) == (False, 4, 4096, 1024)
    assert estimate(header(), config).cache_bytes == 4096 * 2 * (64 + 64) * 2


def test_requests_share_the_cells_where_there_are_few_windows() -> None:
    """More of them are served together so, unless no more are to be; recurrent memory has no windows."""
    few = LoadConfig(context_size=1024, num_parallel=2, num_sequences=32, unified_cache=False)
    assert lay_out(few, 8192, is_recurrent=False).is_unified
    assert not lay_out(replace(few, num_sequences=2), 8192, is_recurrent=False).is_unified
    assert lay_out(replace(few, num_parallel=8), 8192, is_recurrent=True).is_unified


def test_accelerators_take_their_share_of_the_model() -> None:
    """All of it, none, or so many layers; the process stays where it is."""
    need = estimate(header(), CONFIG)
    assert [need.offloaded_bytes(3, layers) for layers in (-1, 0, 4, 99)] == [
        need.model_bytes, 0, need.model_bytes, need.model_bytes,
    ]  # fmt: skip
    assert need.offloaded_bytes(3, 1) == need.model_bytes // 4


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("unified", "flash_attention", "cache_type", "number"),
    [(True, True, "f16", 1), (True, False, "f16", 1), (True, True, "q8_0", 8), (False, False, "f16", 1)],
    ids=["flash", "plain", "q8_0", "streams"],
)
def test_it_is_what_llama_cpp_allocates(
    tmp_path: Path, name: str, unified: bool, flash_attention: bool, cache_type: str, number: int
) -> None:
    """Weights, cache and graph come to within 10 % of its own count, and the cache exactly."""
    path = write_model(SHAPES[name], tmp_path / "model.gguf")
    shape = read_hyperparameters(read_header(path, arrays=False))
    config = LoadConfig(
        context_size=4096,
        num_parallel=2 if unified else 4,
        num_sequences=8,
        unified_cache=unified,
        flash_attention=flash_attention,
        cache_type=cache_type,
    )
    need = estimate(read_header(path, arrays=False), config)
    layout = lay_out(config, shape.num_ctx, is_recurrent=shape.is_recurrent)
    shape_of = (layout.num_cells, layout.num_slots, layout.num_ubatch, layout.num_outputs)
    numbers = (*shape_of, int(layout.is_unified), int(flash_attention), number)
    argv = [sys.executable, "-c", MEASURE, str(path), *map(str, numbers)]
    said = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    sizes = {kind: float(size) for kind, size in re.findall(r"(\w+) buffer size = +([\d.]+) MiB", said)}
    cache = sum(float(size) for size in re.findall(r"(?:KV|RS) buffer size = +([\d.]+) MiB", said))
    assert need.cache_bytes / MIB == pytest.approx(cache, abs=0.1)
    assert need.weights_bytes / MIB == pytest.approx(sizes["model"], rel=0.01)
    reported = sizes["model"] + cache + sizes["compute"] + sizes["output"]
    estimated = (need.total_bytes - need.process_bytes) / MIB
    assert estimated == pytest.approx(reported, rel=0.1)


@pytest.mark.parametrize(
    "says",
    [
        {"block_count": 1 << 31},
        {"block_count": 0},
        {"block_count": MAX_LAYERS + 1},
        {"block_count": "two"},
        {"block_count": -1},
        {"embedding_length": 0},
        {"embedding_length": 1 << 40},
        {"attention__head_count": 0},
        {"attention__head_count": [1]},
        {"attention__head_count_kv": [1 << 60, 1]},
        {"attention__key_length": 1 << 62},
        {"context_length": 1 << 62},
        {"expert_count": 1 << 31, "expert_used_count": 2},
    ],
    ids=str,
)
def test_absurd_numbers_are_refused_by_name(says: dict[str, Any]) -> None:
    """Nothing is computed from them, let alone allocated."""
    name = next(iter(says)).replace("__", ".")
    with pytest.raises(GGUFParseError, match=f"llama.{re.escape(name)}"):
        estimate(header(**says), CONFIG)


NAMES = [
    "block_count", "embedding_length", "context_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "attention.sliding_window", "attention.key_length_mla",
    "attention.value_length_mla", "attention.sliding_window_pattern", "attention.recurrent_layers", "ssm.conv_kernel",
    "ssm.inner_size", "ssm.state_size", "ssm.group_count", "wkv.head_size", "shortconv.l_cache", "kda.head_dim",
    "expert_count", "expert_used_count", "feed_forward_length", "full_attention_interval", "nextn_predict_layers",
    "attention.shared_kv_layers", "vocab_size",
]  # fmt: skip
ARCHITECTURES = ["llama", "mamba", "lfm2", "qwen35", "gemma3", "gemma3n", "gemma4", "rwkv7", "kimi-linear", "bert", "?"]
NUMBERS = st.integers(-5, 600) | st.integers(-(2**63), 2**64) | st.booleans()
VALUES = NUMBERS | st.floats() | st.text(max_size=5) | st.none() | st.lists(NUMBERS, max_size=600)


@settings(max_examples=300, deadline=None)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    says=st.dictionaries(st.sampled_from(NAMES), VALUES),
    shape=st.lists(st.integers(0, 2**63), max_size=4),
    asked=st.integers(-1, 2**31),
)
def test_no_header_breaks_it(architecture: str, says: dict[str, Any], shape: list[int], asked: int) -> None:
    """Whatever a file says, the answer is a number that is not negative or a GGUFParseError, and comes at once."""
    plain = {"block_count": 2, "embedding_length": 64, "attention.head_count": 4}
    metadata = {f"{architecture}.{name}": value for name, value in (plain | says).items()}
    tensors = (TensorInfo("token_embd.weight", "F16", tuple(shape)),)
    file = GGUFHeader(3, {"general.architecture": architecture, **metadata}, tensors, 0, 100, 100)
    started = time.perf_counter()
    try:
        need = estimate(file, LoadConfig(context_size=asked, num_parallel=4))
    except GGUFParseError:
        pass
    else:
        assert min(need.weights_bytes, need.cache_bytes, need.compute_bytes, need.process_bytes) >= 0
    assert time.perf_counter() - started < 0.5
