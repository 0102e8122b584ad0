"""Embeddings and reranking on their way through the house: one row each, whatever the end."""

from __future__ import annotations

import asyncio
import os
import signal
from array import array
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from encoders import Encoder, write_encoder
from fake_house import ORIGIN, ask, describe_model, fake_house, texts, until, worker_pids
from store_samples import OllamaDirectory

from engines.errors import ModelNotFound, PromptTooLong, UnsupportedCapability, WorkerCrashed
from engines.request import EmbedRequest, Mode, RerankRequest

_ids = count()


def embed(*inputs: str | tuple[int, ...], model: str = "demo", **fields: Any) -> EmbedRequest:
    """A request under an id of its own."""
    return EmbedRequest(f"req_{next(_ids):032x}", model, ORIGIN, inputs, **fields)


def rerank(query: str, *documents: str, model: str = "ranker", **fields: Any) -> RerankRequest:
    """A request under an id of its own."""
    return RerankRequest(f"req_{next(_ids):032x}", model, ORIGIN, query, documents, **fields)


def install_ranker(root: Path) -> None:
    """A reranker beside the demo."""
    directory = OllamaDirectory(root / "models")
    weights = write_encoder(root / "ranker.gguf", Encoder(pooling=None, num_classes=1)).read_bytes()
    directory.model("registry.ollama.ai/library/ranker/latest", [directory.layer("model", weights)])


async def test_many_texts_are_one_row(tmp_path: Path) -> None:
    """With the tokens of all of them, and the time that the load took."""
    async with fake_house(tmp_path, {"load_s": 0.2}) as house:
        found = await house.dispatch.embed(embed("one two", "three", (1, 2, 3)))
        row = house.row()
    assert len(found.vectors) == 3
    assert (row["prompt_tokens"], row["completion_tokens"], row["mode"]) == (6, 0, "embedding")
    assert (row["status"], row["finish_reason"], row["model"]) == (200, "stop", "demo:latest")
    assert row["load_s"] >= 0.2
    assert found.timings.load_s == pytest.approx(row["load_s"])


async def test_vectors_arrive_as_the_engine_made_them(tmp_path: Path) -> None:
    """Not a bit is lost between the processes."""
    async with fake_house(tmp_path) as house:
        first, again = (await house.dispatch.embed(embed("one", "one"))).vectors
        (short,) = (await house.dispatch.embed(embed("one", dimensions=2))).vectors
    assert first == again
    assert isinstance(first, array)
    assert sum(number * number for number in first) == pytest.approx(1)
    assert len(short) == 2


async def test_no_input_only_loads_the_model(tmp_path: Path) -> None:
    """In the mode of its next request, and on record as a load."""
    async with fake_house(tmp_path) as house:
        assert (await house.dispatch.embed(embed(keep_alive_s=60))).vectors == ()
        (status,) = house.pool.statuses()
        assert house.row()["finish_reason"] == "load"
    assert (status.mode, status.num_active) == (Mode.EMBEDDING, 0)


async def test_scores_come_from_a_runner_of_their_own(tmp_path: Path) -> None:
    """In the documents' order, one row for all."""
    async with fake_house(tmp_path) as house:
        install_ranker(tmp_path)
        found = await house.dispatch.rerank(rerank("a b", "b", "a b c", "d"))
        row = house.row()
        (status,) = house.pool.statuses()
    assert found.scores == (1.0, 2.0, 0.0)
    assert (row["mode"], row["prompt_tokens"]) == ("reranking", 11)
    assert status.mode is Mode.RERANKING


async def test_what_a_model_cannot_do_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    """By the name that people know, and on record."""
    async with fake_house(tmp_path) as house:
        install_ranker(tmp_path)
        with pytest.raises(UnsupportedCapability, match='"ranker:latest" does not support embedding'):
            await house.dispatch.embed(embed("one", model="ranker"))
        with pytest.raises(UnsupportedCapability, match='"demo:latest" does not support rerank'):
            await house.dispatch.rerank(rerank("a", "b", model="demo"))
        assert house.pool.statuses() == []
        assert [(row["status"], row["error_code"], row["finish_reason"]) for row in house.rows()] == [
            (400, "unsupported_capability", "refused"),
            (400, "unsupported_capability", "refused"),
        ]


async def test_an_engines_refusal_is_a_refused_row(tmp_path: Path) -> None:
    """And the place on the runner is free again."""
    async with fake_house(tmp_path, {"num_ctx": 2}) as house:
        with pytest.raises(PromptTooLong):
            await house.dispatch.embed(embed("one two three", truncate=False))
        assert (house.row()["status"], house.row()["error_code"]) == (400, "context_length_exceeded")
        assert [status.num_active for status in house.pool.statuses()] == [0]


async def test_an_unknown_model_is_on_record(tmp_path: Path) -> None:
    """Before anything is loaded."""
    async with fake_house(tmp_path) as house:
        with pytest.raises(ModelNotFound):
            await house.dispatch.embed(embed("one", model="nowhere"))
        assert house.row()["error_code"] == "model_not_found"


async def test_a_caller_who_leaves_is_booked_with_what_it_has_cost(tmp_path: Path) -> None:
    """Half of the words, here, and the worker is idle at once."""
    async with fake_house(tmp_path, {"tokens_per_s": 100}) as house:
        await house.dispatch.embed(embed("warm"))
        asking = asyncio.create_task(house.dispatch.embed(embed("word " * 1000)))
        await until(lambda: house.pool.statuses()[0].num_active == 1)
        await asyncio.sleep(0.3)
        asking.cancel()
        await asyncio.wait({asking})
        row = house.rows()[-1]
        assert [status.num_active for status in house.pool.statuses()] == [0]
    assert asking.cancelled()
    assert (row["status"], row["finish_reason"]) == (499, "cancel")
    assert 10 <= row["prompt_tokens"] <= 200


async def test_a_caller_who_leaves_the_queue_is_booked_with_nothing(tmp_path: Path) -> None:
    """While the model loads."""
    async with fake_house(tmp_path, {"load_s": 0.5}) as house:
        asking = asyncio.create_task(house.dispatch.embed(embed("one")))
        await until(house.accounts.waiting)
        asking.cancel()
        await asyncio.wait({asking})
        assert (house.row()["status"], house.row()["prompt_tokens"]) == (499, 0)


async def test_a_worker_that_dies_is_an_error_for_its_callers(tmp_path: Path) -> None:
    """And the next request gets a new one."""
    async with fake_house(tmp_path, {"tokens_per_s": 10}) as house:
        asking = asyncio.create_task(house.dispatch.embed(embed("word " * 100)))
        await until(lambda: any(status.num_active for status in house.pool.statuses()))
        os.kill(worker_pids()[0], signal.SIGKILL)
        with pytest.raises(WorkerCrashed):
            await asking
        describe_model(tmp_path)
        assert (await house.dispatch.embed(embed("one"))).vectors
        assert [row["error_code"] for row in house.rows()] == ["worker_crashed", ""]


async def test_a_model_serves_both_modes_side_by_side(tmp_path: Path) -> None:
    """Each on a runner of its own; one does not evict the other."""
    async with fake_house(tmp_path) as house:
        await house.dispatch.embed(embed("one"))
        assert await texts(await house.dispatch.generate(ask("one two")))
        assert {status.mode for status in house.pool.statuses()} == {Mode.EMBEDDING, Mode.COMPLETION}
