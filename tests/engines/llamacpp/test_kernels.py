"""The kernels against arithmetic, and llama.cpp calling them."""

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.llamacpp.header import suits_kernels
from engines.llamacpp.kernels import library
from engines.model import TensorInfo
from engines.store.gguf import GGUFHeader

needs_kernels = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())

DEMO = Path(__file__).parents[3] / "engines/store/demo/demo.gguf"
WEIGHTS = [Type.Q4_0, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K]
F32 = Type.F32


class Params(ctypes.Structure):
    """ggml_compute_params: without a pool of threads each takes its share."""

    _fields_ = (
        *(("ith", ctypes.c_int), ("nth", ctypes.c_int), ("wsize", ctypes.c_size_t)),
        *(("wdata", ctypes.c_void_p), ("threadpool", ctypes.c_void_p)),
    )


def copied() -> ctypes.CDLL:
    """A copy of the library, which nobody else in this process uses or binds."""
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(shutil.copy(library.LIBRARY, folder))


def callable_as_ggml_does(kernels: ctypes.CDLL) -> Callable[..., bool]:
    """The function that takes the place of llama.cpp's."""
    function = kernels.llamafile_sgemm
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.restype = ctypes.c_bool
    function.argtypes = [ctypes.POINTER(Params), number, number, number, pointer, number, pointer, number, pointer]
    function.argtypes += [number, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return function


@cache
def unbound() -> Callable[..., bool]:
    """The function without llama.cpp's behind it, and without its counter."""
    return callable_as_ggml_does(copied())


def random_weights(kind: Type, rows: int, blocks: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of any bytes but for their scales, and the numbers they stand for."""
    raw = random.integers(0, 256, (rows, blocks, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    scales = {Type.Q6_K: [208], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2]}.get(kind, [0])
    for at in scales:
        halves = random.uniform(-0.1, 0.1, (rows, blocks)).astype(np.float16)
        raw[:, :, at : at + 2] = halves.view(np.uint8).reshape(rows, blocks, 2)
    raw = raw.reshape(rows, -1)
    return raw, quants.dequantize(raw, kind)


def random_activations(
    kind: Type, columns: int, depth: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """As ggml quantizes what flows through a model, and the numbers they stand for."""
    numbers = random.normal(size=(columns, depth)).astype(np.float32)
    if kind is Type.Q8_0:
        raw = quants.quantize(numbers, kind)
        return raw, quants.dequantize(raw, kind)
    blocks = numbers.reshape(columns, -1, 256)
    scales = np.abs(blocks).max(-1, keepdims=True) / 127
    values = np.round(blocks / scales).astype(np.int8)
    parts = [scales.view(np.uint8).reshape(columns, -1, 4), values.view(np.uint8)]
    parts += [np.zeros((columns, blocks.shape[1], 32), np.uint8)]  # sums, which the kernels make themselves
    return np.concatenate(parts, -1).reshape(columns, -1), (values * scales).reshape(columns, -1)


def product(kind: Type, weights: np.ndarray, activations: np.ndarray, rows: int, num_threads: int = 1) -> np.ndarray:
    """The whole product, (columns, rows), each thread's share after the other's. Weights may have columns to spare."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    of_activations = Type.Q8_0 if values == 32 else Type.Q8_K
    blocks = activations.shape[1] // gguf.GGML_QUANT_SIZES[of_activations][1]
    out = np.full((len(activations), rows), np.nan, np.float32)
    for thread in range(num_threads):
        params = Params(thread, num_threads)
        arguments = (weights.ctypes.data, weights.shape[1] // size, activations.ctypes.data, blocks, out.ctypes.data)
        assert unbound()(params, rows, len(out), blocks, *arguments, rows, kind, of_activations, F32)
    return out


@needs_kernels
@given(
    kind=st.sampled_from(WEIGHTS),
    rows=st.integers(1, 70),
    columns=st.integers(1, 40),
    blocks=st.integers(1, 9),
    spare=st.integers(0, 2),
    num_threads=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_product_is_that_of_the_numbers(
    kind: Type, rows: int, columns: int, blocks: int, spare: int, num_threads: int, seed: int
) -> None:
    """For every type, of every shape, by any number of threads, of matrices that are parts of wider ones."""
    random = np.random.default_rng(seed)
    weights, w = random_weights(kind, rows, blocks + spare, random)
    values = gguf.GGML_QUANT_SIZES[kind][0]
    activations, a = random_activations(Type.Q8_0 if values == 32 else Type.Q8_K, columns, blocks * values, random)
    w = w[:, : blocks * values].astype(np.float64)
    exact, size = a.astype(np.float64) @ w.T, np.abs(a).astype(np.float64) @ np.abs(w).T
    assert np.all(np.abs(product(kind, weights, activations, rows, num_threads) - exact) <= 1e-5 * size + 1e-9)


@needs_kernels
@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_column_does_not_depend_on_the_others(kind: Type) -> None:
    """One sequence gets the same numbers alone and in any crowd, to the last bit: also beyond one panel of columns."""
    random = np.random.default_rng(1)
    values = gguf.GGML_QUANT_SIZES[kind][0]
    weights, _ = random_weights(kind, 33, 4096 // values, random)
    activations, _ = random_activations(Type.Q8_0 if values == 32 else Type.Q8_K, 400, 4096, random)
    together = product(kind, weights, activations, 33)
    for first, last in ((0, 1), (7, 19), (300, 313)):
        apart = product(kind, weights, np.ascontiguousarray(activations[first:last]), 33)
        assert np.array_equal(apart, together[first:last])


@needs_kernels
def test_what_is_not_quantized_yet_is_declined() -> None:
    """A no to floats makes ggml quantize them and ask again; other types are a no as long as llama.cpp is not bound."""
    for kind, of_activations, of_result in ((8, 0, 0), (12, 8, 0), (8, 8, 1), (1, 0, 0)):
        assert not unbound()(Params(0, 1), 16, 1, 1, None, 1, None, 1, None, 16, kind, of_activations, of_result)


_ASK_THE_DEMO = """
import ctypes, json, sys
from pathlib import Path
from engines.llamacpp.capi import has_kernels, lib
from engines.llamacpp.kernels import library
from engines.llamacpp.model import Model
import numpy as np
asked = set()
if has_kernels:
    # what llama.cpp's own function would be asked
    signature = ctypes.CFUNCTYPE(ctypes.c_bool, *[ctypes.c_void_p] * 10, *[ctypes.c_int] * 3)
    note = signature(lambda *arguments: bool(asked.add(arguments[10])))
    library.load().headwater_kernels_bind(note, None)
model = Model(Path(sys.argv[1]), num_gpu=0)
params = lib.llama_context_default_params()
params.n_ctx, params.flash_attn_type = 64, 0
context = lib.llama_init_from_model(model.handle, params)
tokens = (lib.llama_token * 9)(*range(9))
assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, 9)) == 0
logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (model.num_tokens,))
print(json.dumps({"has_kernels": has_kernels, "asked": sorted(asked), "logits": logits.tolist()}))
"""


class Told(NamedTuple):
    """Of a process of its own: what llama.cpp's own function was asked for, and the logits after a few tokens."""

    has_kernels: bool
    asked: list[int]
    logits: list[float]


def ask_the_demo(**environment: str) -> Told:
    """Nine tokens of the demo, in an environment."""
    argv = [sys.executable, "-c", _ASK_THE_DEMO, str(DEMO)]
    done = subprocess.run(argv, env=os.environ | environment, capture_output=True, text=True, check=True)
    return Told(**json.loads(done.stdout))


@needs_kernels
def test_llama_cpp_computes_with_them() -> None:
    """The demo's Q8_0 weights go to the kernels alone, its attention to llama.cpp, and the answer stays the same."""
    ours, theirs = ask_the_demo(), ask_the_demo(HEADWATER_KERNELS="0")
    assert (ours.has_kernels, theirs.has_kernels) == (True, False)
    assert ours.asked
    assert Type.Q8_0 not in ours.asked
    a, b = np.array(ours.logits), np.array(theirs.logits)
    assert a.argmax() == b.argmax()
    assert np.abs(a - b).max() < 0.02 * np.abs(b).max()


@needs_kernels
@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("num_threads", [2, 8, 16])
def test_no_thread_is_idle_while_there_are_rows_for_it(kind: Type, num_threads: int) -> None:
    """Small matrices, such as those of K and V, are shared by many threads as well."""
    random, (values, size) = np.random.default_rng(1), gguf.GGML_QUANT_SIZES[kind]
    of_activations = Type.Q8_0 if values == 32 else Type.Q8_K
    weights, _ = random_weights(kind, 256, 256 // values, random)
    activations, _ = random_activations(of_activations, 1, 256, random)
    shares = []
    for thread in range(num_threads):
        out = np.full((1, 256), np.nan, np.float32)
        arguments = (weights.ctypes.data, weights.shape[1] // size, activations.ctypes.data, 1, out.ctypes.data)
        unbound()(Params(thread, num_threads), 256, 1, 256 // values, *arguments, 256, kind, of_activations, F32)
        shares.append(np.count_nonzero(~np.isnan(out)))
    assert shares == [256 // num_threads] * num_threads


@needs_kernels
@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_chunks_are_taken_by_whoever_is_free(kind: Type) -> None:
    """By four threads and ggml's counter, which each asks until nothing is left, over several panels of columns."""
    random, (values, _) = np.random.default_rng(1), gguf.GGML_QUANT_SIZES[kind]
    of_activations = Type.Q8_0 if values == 32 else Type.Q8_K
    weights, _ = random_weights(kind, 500, 4096 // values, random)
    activations, _ = random_activations(of_activations, 400, 4096, random)
    kernels, chunks = copied(), itertools.count(4)  # every thread begins with the chunk of its own number
    take = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)(lambda _pool, _count: next(chunks))
    kernels.headwater_kernels_bind(None, take)
    out = np.full((400, 500), np.nan, np.float32)

    def compute(thread: int) -> bool:
        params = Params(thread, 4, 0, activations.ctypes.data, 1)
        blocks = 4096 // values
        matrices = (weights.ctypes.data, blocks, activations.ctypes.data, blocks, out.ctypes.data)
        return callable_as_ggml_does(kernels)(params, 500, 400, blocks, *matrices, 500, kind, of_activations, F32)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compute, range(4)))
    assert np.array_equal(out, product(kind, weights, activations, 500))
    assert next(chunks) > 20


def test_kernels_are_there_wherever_they_can_be_compiled() -> None:
    """The tests above are for machines that have them; that this one has none must have a better reason."""
    reason = library.why_not()
    assert not reason.startswith("llama-cpp-python is")
    assert shutil.which("c++") is None or not reason.startswith("they were not compiled")


@needs_kernels
def test_a_library_that_cannot_be_loaded_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that was compiled elsewhere, say: the model is served all the same, and the log says what is wrong."""
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libheadwater_kernels.so")
    library.LIBRARY.write_bytes(b"no library")
    library.load.cache_clear()
    try:
        assert library.load() is None
    finally:
        library.load.cache_clear()
    assert "cannot be loaded" in caplog.text


@needs_kernels
def test_a_llama_cpp_without_the_function_is_not_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It was built in another way."""
    assert not library.bind(ctypes.CDLL(str(library.LIBRARY)), tmp_path)
    assert "built in another way" in caplog.text


@needs_kernels
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("HEADWATER_KERNELS", "0", "HEADWATER_KERNELS turns them off"),
        ("LLAMA_CPP_LIB_PATH", "/opt/llama", "LLAMA_CPP_LIB_PATH names another llama.cpp"),
    ],
)
def test_environment_can_rule_them_out(monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str) -> None:
    """By intent, or because another library is loaded than the one they were tried with."""
    monkeypatch.setenv(name, value)
    assert library.why_not().startswith(reason)


def test_kernels_are_for_the_llama_cpp_that_they_were_tried_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another may call its function in another way."""
    monkeypatch.setattr(library, "TRIED", "0.0.1")
    monkeypatch.setattr(library, "FEATURES", frozenset())
    monkeypatch.setattr(library, "LIBRARY", DEMO)
    assert "0.0.1" in library.why_not()


def test_processor_without_the_instructions_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end with SIGILL."""
    monkeypatch.setattr(library, "FEATURES", frozenset({"avx1024"}))
    assert library.why_not() == "the processor lacks avx1024"


@pytest.mark.parametrize(
    ("types", "experts", "suits"),
    [
        (("Q4_K", "Q6_K", "F32"), 0, True),
        (("Q8_0", "Q5_0", "F16"), 0, True),
        (("Q3_K", "Q4_K", "F32"), 0, False),
        (("Q4_0", "IQ4_NL"), 0, False),
        (("Q4_K", "F32"), 8, False),
    ],
)
def test_models_that_llama_cpp_has_more_for_are_left_to_it(types: tuple[str, ...], experts: int, suits: bool) -> None:
    """Experts, and types that it repacks or tiles and that the kernels do not know."""
    shape = {"block_count": 1, "embedding_length": 64, "attention.head_count": 1, "expert_count": experts}
    metadata = {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in shape.items()}
    tensors = tuple(TensorInfo(f"blk.0.{i}", kind, (64, 64)) for i, kind in enumerate(types))
    assert suits_kernels(GGUFHeader(3, metadata, tensors, 0)) is suits
