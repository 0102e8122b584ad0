"""The embedding engine on real models with random weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from encoders import CLS, SEP, VOCABULARY, Encoder, write_encoder

from engines.errors import (
    BadRequest,
    Cancelled,
    ModelNotLoaded,
    PromptTooLong,
    ServerBusy,
    UnsupportedCapability,
    WorkerCrashed,
)
from engines.inference import LoadConfig
from engines.llamacpp.embedding import EmbeddingEngine, _fill, _normalizes, _vectors
from engines.request import EmbedRequest, GenerateRequest, LoadOptions, Mode, Origin, RerankRequest
from engines.store.gguf import GGUFHeader

DEMO = Path(__file__).parents[3] / "engines/store/demo/demo.gguf"
ORIGIN = Origin("ollama/embedding", "tester")
TEXTS = ("the cat", "dog", "", "king queen fish the cat", "a" * 30, "0 1 2")


def embed(*inputs: str | tuple[int, ...], **fields: Any) -> EmbedRequest:
    """A request for vectors."""
    return EmbedRequest("req_1", "m", ORIGIN, inputs, **fields)


@asynccontextmanager
async def loaded(path: Path, mode: Mode = Mode.EMBEDDING, **config: Any) -> AsyncIterator[EmbeddingEngine]:
    """An engine with a model, unloaded at the end."""
    engine = EmbeddingEngine(mode)
    await engine.load(path, LoadConfig(num_threads=1, **config))
    try:
        yield engine
    finally:
        await engine.unload()


async def vectors(engine: EmbeddingEngine, *inputs: str | tuple[int, ...], **fields: Any) -> npt.NDArray[np.float32]:
    """What a request gives."""
    computation = await engine.embed(embed(*inputs, **fields))
    return np.array(await computation.result(), np.float32)


def close(found: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether two vectors point the same way: attention in half precision depends on what else is in the batch."""
    return bool(np.dot(found, expected) / np.linalg.norm(found) / np.linalg.norm(expected) > 0.999)


@pytest.mark.parametrize("pooling", [gguf.PoolingType.MEAN, gguf.PoolingType.CLS, gguf.PoolingType.LAST])
async def test_a_batch_gives_what_each_text_alone_gives(tmp_path: Path, pooling: gguf.PoolingType) -> None:
    """For every way to pool, and the tokens are counted."""
    async with loaded(write_encoder(tmp_path / "m.gguf", Encoder(pooling=pooling))) as engine:
        together = await vectors(engine, *TEXTS)
        assert engine.stats().totals["steps"] == 1
        for text, found in zip(TEXTS, together, strict=True):
            (alone,) = await vectors(engine, text)
            assert close(found, alone), text
            assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)


async def test_a_model_without_pooling_gives_the_mean(tmp_path: Path) -> None:
    """As the same weights do that ask for it."""
    said = write_encoder(tmp_path / "said.gguf", Encoder(pooling=gguf.PoolingType.MEAN))
    unsaid = write_encoder(tmp_path / "unsaid.gguf", Encoder(pooling=None))
    async with loaded(said) as first, loaded(unsaid) as second:
        assert np.array_equal(await vectors(first, "the cat"), await vectors(second, "the cat"))


async def test_a_causal_model_reads_a_long_text_in_chunks() -> None:
    """And comes to the same vector as in one piece."""
    text = "What is the capital of France? " * 20
    async with loaded(DEMO) as whole, loaded(DEMO, num_batch=64) as chunked:
        (expected,), (found,) = await vectors(whole, text), await vectors(chunked, text)
        assert whole.stats().totals["steps"] == 1
        assert chunked.stats().totals["steps"] > 3
        assert whole.stats().totals["prefill_tokens"] == chunked.stats().totals["prefill_tokens"]
        assert close(found, expected)


async def test_texts_between_the_chunks_of_long_ones_are_right_too() -> None:
    """Nothing of a long text stays in the memory of the next batch."""
    async with loaded(DEMO, num_batch=64) as engine:
        (alone,) = await vectors(engine, "hello")
        mixed = await vectors(engine, "hello", "What is that? " * 40, "hello")
        assert close(mixed[0], alone)
        assert close(mixed[2], alone)


async def test_a_long_text_loses_its_end_but_not_what_the_model_adds(tmp_path: Path) -> None:
    """It is what the cut tokens give by themselves."""
    async with loaded(write_encoder(tmp_path / "m.gguf", Encoder(num_ctx=16))) as engine:
        cat = VOCABULARY.index("▁cat")
        computation = await engine.embed(embed("cat " * 40))
        (found,) = await computation.result()
        (expected,) = await vectors(engine, (CLS, *[cat] * 14, SEP))
        assert np.allclose(found, expected, atol=1e-6)
        assert (computation.usage.prompt_tokens, computation.usage.truncated_tokens) == (16, 26)
        (smaller,) = await vectors(engine, "cat " * 40, load=LoadOptions(num_ctx=8))
        assert np.allclose(smaller, (await vectors(engine, (CLS, *[cat] * 6, SEP)))[0], atol=1e-6)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (embed("cat " * 40, truncate=False), PromptTooLong, "maximum context length is 16"),
        (embed("cat " * 40, load=LoadOptions(num_ctx=2)), PromptTooLong, "maximum context length is 2"),
        (embed((len(VOCABULARY),)), BadRequest, "not in this model's vocabulary"),
        (embed((-1,)), BadRequest, "not in this model's vocabulary"),
        (embed(()), BadRequest, "empty"),
    ],
)
async def test_what_cannot_be_embedded_is_refused(
    tmp_path: Path, request_: EmbedRequest, error: type[Exception], words: str
) -> None:
    """Before anything is computed, and the engine goes on."""
    async with loaded(write_encoder(tmp_path / "m.gguf", Encoder(num_ctx=16))) as engine:
        with pytest.raises(error, match=words):
            await engine.embed(request_)
        assert engine.stats().totals["steps"] == 0
        assert len(await vectors(engine, "cat")) == 1


async def test_what_an_engine_is_not_for_is_refused(tmp_path: Path) -> None:
    """A reranker makes no vectors, an embedding model no scores, and neither answers."""
    mean = write_encoder(tmp_path / "mean.gguf")
    ranker = write_encoder(tmp_path / "ranker.gguf", Encoder(pooling=gguf.PoolingType.RANK, num_classes=1))
    none = write_encoder(tmp_path / "none.gguf", Encoder(pooling=gguf.PoolingType.NONE))
    ask = RerankRequest("req_1", "m", ORIGIN, "q", ("d",))
    for path in (ranker, none):
        async with loaded(path) as engine:
            with pytest.raises(UnsupportedCapability):
                await engine.embed(embed("a"))
    async with loaded(mean, Mode.RERANKING) as engine:
        with pytest.raises(UnsupportedCapability):
            await engine.rerank(ask)
        with pytest.raises(UnsupportedCapability):
            await engine.generate(GenerateRequest("req_1", "m", ORIGIN, prompt="a"))
    with pytest.raises(ModelNotLoaded):
        await EmbeddingEngine(Mode.EMBEDDING).embed(embed("a"))


async def test_a_reranker_scores_each_pair(tmp_path: Path) -> None:
    """The same whether pairs come together or one by one; a long document is cut."""
    path = write_encoder(tmp_path / "m.gguf", Encoder(pooling=gguf.PoolingType.RANK, num_classes=2, num_ctx=16))
    documents = ("the cat", "dog", "fish " * 40)
    async with loaded(path, Mode.RERANKING) as engine:
        together = await engine.rerank(RerankRequest("req_1", "m", ORIGIN, "king", documents))
        scores = await together.result()
        assert together.usage.truncated_tokens > 0
        for document, score in zip(documents, scores, strict=True):
            alone = await engine.rerank(RerankRequest("req_1", "m", ORIGIN, "king", (document,)))
            assert (await alone.result())[0] == pytest.approx(score, abs=5e-3)
        with pytest.raises(PromptTooLong):
            await engine.rerank(RerankRequest("req_1", "m", ORIGIN, "king", documents, truncate=False))


async def test_a_cancelled_request_stops_within_a_step() -> None:
    """And has cost what was computed until then."""
    async with loaded(DEMO, num_batch=64) as engine:
        computation = await engine.embed(embed(*["What is the capital of France? " * 40] * 50))
        while not computation.usage.prompt_tokens:  # noqa: ASYNC110  # a thread sets it, and says nothing
            await asyncio.sleep(0.001)
        await computation.aclose()
        cost = computation.usage.prompt_tokens
        steps = engine.stats().totals["steps"]
        with pytest.raises(Cancelled):
            await computation.result()
        await asyncio.sleep(0.05)
        assert engine.stats().totals["steps"] == steps
        assert computation.usage.prompt_tokens == cost < 50 * 300
        assert len(await vectors(engine, "hello")) == 1


async def test_unloading_ends_what_still_runs() -> None:
    """With an error that says why."""
    engine = EmbeddingEngine(Mode.EMBEDDING)
    await engine.load(DEMO, LoadConfig(num_threads=1))
    computation = await engine.embed(embed(*["What is the capital of France? " * 40] * 50))
    await engine.unload()
    with pytest.raises(ServerBusy):
        await computation.result()
    assert not engine.is_loaded()


async def test_a_failure_of_llama_cpp_ends_the_engine_loudly(tmp_path: Path) -> None:
    """Those who wait hear of it, and so does whoever runs the process."""
    failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    engine = EmbeddingEngine(Mode.EMBEDDING, on_failure=failure.set_result)
    await engine.load(write_encoder(tmp_path / "m.gguf"), LoadConfig(num_threads=1))

    def broken(num_sequences: int) -> Any:
        raise RuntimeError("out of order")

    engine._context.compute = broken  # type: ignore[method-assign]
    computation = await engine.embed(embed("cat"))
    with pytest.raises(WorkerCrashed, match="out of order"):
        await computation.result()
    with pytest.raises(WorkerCrashed):
        await engine.embed(embed("cat"))
    assert str(await failure) == "out of order"
    await engine.unload()


def test_a_row_of_zeros_stays_one() -> None:
    """It has no direction to keep."""
    rows = np.array([[0, 0, 0], [3, 4, 9]], np.float32)
    zeros, cut = _vectors(rows, dimensions=2, normalize=True)
    assert list(zeros) == [0, 0]
    assert list(cut) == pytest.approx([0.6, 0.8])
    assert np.array_equal(_vectors(rows, dimensions=None, normalize=False), rows)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"general.architecture": "bert", "tokenizer.ggml.model": "bert"}, True),
        ({"general.architecture": "bert", "tokenizer.ggml.model": "t5"}, False),
        ({"general.architecture": "nomic-bert"}, False),
        ({"general.architecture": "nomic-bert", "nomic-bert.normalize_embeddings": True}, True),
        ({"general.architecture": "qwen3"}, True),
    ],
)
def test_the_old_route_has_the_runners_own_length(metadata: dict[str, Any], expected: bool) -> None:
    """`spec/ollama.md` section 5.5."""
    assert _normalizes(GGUFHeader(3, metadata, (), 0)) is expected


@pytest.mark.parametrize(
    ("num_batch", "num_vocabulary", "fill"), [(512, 30522, 256), (512, 250_002, 134), (512, 10**6, 128), (32, 10, 32)]
)
def test_a_batch_is_as_large_as_it_helps(num_batch: int, num_vocabulary: int, fill: int) -> None:
    """Smaller for large vocabularies, whose logits have to have room, and never larger than asked for."""
    assert _fill(num_batch, num_vocabulary) == fill
