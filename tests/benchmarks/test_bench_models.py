from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the extra `bench` is not installed")

from benchmarks.bare import BareOptions, run_bare
from benchmarks.models import SHAPES, Shape, ensure_model, make_vocabulary, random_q4_0, random_q8_0
from benchmarks.server import install
from engines.store.catalog import Catalog
from engines.store.gguf import read_header

TINY = Shape("tiny", num_layers=2, num_embd=64, num_heads=2, num_kv_heads=1, num_ff=128, num_vocab=512, num_ctx=512)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few kilobytes."""
    return ensure_model(TINY, tmp_path_factory.mktemp("models"))


def test_the_header_has_the_shape(tiny: Path) -> None:
    """What is written is what was asked for, and Headwater's own reader agrees."""
    header = read_header(tiny)
    assert (header.architecture, header.file_type) == ("qwen2", "Q8_0")
    assert header.metadata["qwen2.block_count"] == 2
    shapes = {tensor.name: (tensor.type, tensor.shape) for tensor in header.tensors}
    assert shapes["token_embd.weight"] == ("Q8_0", (64, 512))
    assert shapes["blk.1.ffn_down.weight"] == ("Q8_0", (128, 64))
    assert shapes["blk.0.attn_k.bias"] == ("F32", (32,))


def test_a_model_is_written_once(tiny: Path) -> None:
    """The second call finds the file and leaves it alone."""
    before = tiny.stat().st_mtime_ns
    assert ensure_model(TINY, tiny.parent) == tiny
    assert tiny.stat().st_mtime_ns == before
    assert [path.name for path in tiny.parent.iterdir()] == [tiny.name]


@pytest.mark.parametrize("num_vocab", [512, max(shape.num_vocab for shape in SHAPES.values())])
def test_every_token_is_another_text(num_vocab: int) -> None:
    """Vocabularies of all sizes are whole and without duplicates."""
    tokens = make_vocabulary(num_vocab)
    assert len(tokens) == len(set(tokens)) == num_vocab


def test_random_matrices_keep_variance() -> None:
    """What goes through a layer neither vanishes nor explodes, so logits are numbers."""
    blocks = random_q8_0(np.random.default_rng(1), 256, 512, 1.0).reshape(256, 16, 34)
    scales = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    weights = scales * blocks[..., 2:].view(np.int8)
    assert weights.std() * 512**0.5 == pytest.approx(1.04, abs=0.05)


def test_four_bits_keep_variance_too() -> None:
    """A byte is two weights from -8 to 7, in units of its block's scale."""
    blocks = random_q4_0(np.random.default_rng(1), 256, 512, 1.0).reshape(256, 16, 18)
    scales = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    pairs = blocks[..., 2:].astype(np.int16)
    weights = scales * np.concatenate([(pairs & 15) - 8, (pairs >> 4) - 8], axis=-1)
    assert weights.std() * 512**0.5 == pytest.approx(1.04, abs=0.06)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "nomic-137m", "smollm-135m-embed"])
def test_every_kind_has_a_miniature(name: str, tmp_path: Path) -> None:
    """What a quick run takes is of the same architecture and quantization as what it stands for."""
    shape = SHAPES[name]
    header = read_header(ensure_model(shape.miniature, tmp_path))
    assert (header.architecture, header.file_type) == (shape.architecture, shape.quantization)
    pooling = header.metadata.get(f"{shape.architecture}.pooling_type")
    assert pooling == (None if shape.pooling is None else shape.pooling.value)


def test_an_installed_model_is_in_the_catalog(tiny: Path, tmp_path: Path) -> None:
    """The store takes a link for a blob, so half a gigabyte is never copied."""
    install(tmp_path, "bench", tiny)
    card = Catalog(tmp_path).find("bench")
    assert (card.name, card.family, card.quantization) == ("bench:latest", "qwen2", "Q8_0")
    assert card.weights.is_symlink()


def test_bare_llama_cpp_decodes_it(tiny: Path) -> None:
    """The limit is measured in a process of its own and gives both rates."""
    options = BareOptions(str(tiny), sequences=2, prompt=20, tokens=8, num_cells=512, num_sequences=4, num_batch=16)
    rates = run_bare(options)
    assert rates.prefill_tps > 0
    assert rates.decode_tps > 0
