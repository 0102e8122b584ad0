"""Token ids by way of real workers around the fake engine."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fake_house import ORIGIN, ask, fake_house, texts, worker_pids

from engines.errors import BadRequest, ModelNotFound
from engines.request import LoadOptions, TokenizeRequest

_ids = count()


def tokenize(model: str = "demo", **fields: Any) -> TokenizeRequest:
    """A request under an id of its own."""
    return TokenizeRequest(f"req_{next(_ids):032x}", model, ORIGIN, **fields)


async def test_a_model_is_loaded_for_its_tokens(tmp_path: Path) -> None:
    """Both ways, and on record as a load that cost no tokens."""
    async with fake_house(tmp_path) as house:
        there = await house.dispatch.tokenize(tokenize(text="hi"))
        assert there.tokens == (104, 105)
        assert there.timings.load_s > 0
        back = await house.dispatch.tokenize(tokenize(tokens=there.tokens))
        assert (back.text, back.timings.load_s) == ("hi", 0.0)
        rows = house.rows()
    assert [(row["status"], row["finish_reason"], row["prompt_tokens"]) for row in rows] == [(200, "load", 0)] * 2


async def test_a_loaded_model_answers_as_it_is(tmp_path: Path) -> None:
    """Neither the options that it was loaded with nor those of the request make it load again."""
    async with fake_house(tmp_path) as house:
        small = LoadOptions(num_ctx=64, num_thread=1)
        assert await texts(await house.dispatch.generate(ask(load=small)))
        before = worker_pids()
        assert (await house.dispatch.tokenize(tokenize(text="hi"))).tokens == (104, 105)
        assert (await house.dispatch.tokenize(tokenize(text="hi", load=LoadOptions(num_ctx=99)))).tokens
        assert worker_pids() == before
        assert house.pool.residents[0].num_active == 0


async def test_an_unknown_id_is_refused_and_the_worker_lives(tmp_path: Path) -> None:
    """It is in the ledger as a refusal."""
    async with fake_house(tmp_path) as house:
        with pytest.raises(BadRequest, match="token 2000000000 is not in this model's vocabulary"):
            await house.dispatch.tokenize(tokenize(tokens=(2_000_000_000,)))
        assert (await house.dispatch.tokenize(tokenize(tokens=(104,)))).text == "h"
        assert len(worker_pids()) == 1
        assert [row["status"] for row in house.rows()] == [400, 200]


async def test_an_unknown_model_is_not_found(tmp_path: Path) -> None:
    """Before anything is loaded."""
    async with fake_house(tmp_path) as house:
        with pytest.raises(ModelNotFound):
            await house.dispatch.tokenize(tokenize("nobody", text="hi"))
        assert house.pool.residents == []
