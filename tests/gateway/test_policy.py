"""Ceilings and pins: what one client's options may do to a model that others use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_house import FakeHouse, ask, demo_card, fake_house, texts, worker_pids

from engines.model import ModelCard
from engines.request import FOREVER, LoadOptions
from gateway.policy import KEEP_ALIVE, PINNABLE, LoadPolicy

PINNED = LoadPolicy(pinned=frozenset(PINNABLE))


@pytest.fixture
def card(tmp_path: Path) -> ModelCard:
    """A model that says nothing of itself."""
    return demo_card(tmp_path)


def test_what_is_said_counts_without_a_policy(card: ModelCard) -> None:
    """Ollama's own way."""
    load = LoadOptions(num_ctx=99, num_batch=8, num_gpu=2, main_gpu=1, use_mmap=False, num_thread=3)
    request = ask(load=load, keep_alive_s=FOREVER)
    assert LoadPolicy().apply(request, card) == request


def test_every_load_option_can_be_pinned(card: ModelCard) -> None:
    """Then the request says nothing any more, whatever makes a model load again."""
    load = LoadOptions(num_ctx=99, num_batch=8, num_gpu=2, main_gpu=1, use_mmap=False, num_thread=3)
    met = PINNED.apply(ask(load=load, keep_alive_s=0.0), card)
    assert (met.load, met.keep_alive_s) == (LoadOptions(), None)


def test_one_pin_leaves_the_other_options_alone(card: ModelCard) -> None:
    """Each by its name."""
    policy = LoadPolicy(pinned=frozenset({"num_thread", KEEP_ALIVE}))
    met = policy.apply(ask(load=LoadOptions(num_ctx=99, num_thread=3), keep_alive_s=1.0), card)
    assert (met.load, met.keep_alive_s) == (LoadOptions(num_ctx=99), None)


def test_a_models_own_options_are_the_servers_word(card: ModelCard) -> None:
    """They stay where a request may not speak."""
    card = _with(card, num_ctx=64, num_thread=2)
    assert PINNED.apply(ask(load=LoadOptions(num_ctx=99)), card).load == LoadOptions(num_ctx=64, num_thread=2)


def test_the_largest_window_holds_for_everybody(card: ModelCard) -> None:
    """For requests, models and the server's own default."""
    policy = LoadPolicy(num_ctx=300, max_num_ctx=128)
    asked = policy.apply(ask(load=LoadOptions(num_ctx=10**6)), card)
    assert asked.load.num_ctx == policy.window(asked.load, card) == 128
    assert policy.apply(ask(), _with(card, num_ctx=200)).load.num_ctx == 128
    assert policy.apply(ask(load=LoadOptions(num_ctx=64)), card).load.num_ctx == 64
    assert policy.window(policy.apply(ask(), card).load, card) == 128


@pytest.mark.parametrize(("said", "expected"), [(FOREVER, 60.0), (61.0, 60.0), (5.0, 5.0), (0.0, 0.0), (None, None)])
def test_the_longest_stay_holds_for_every_request(card: ModelCard, said: float | None, expected: float | None) -> None:
    """A model may always leave sooner."""
    assert LoadPolicy(max_keep_alive_s=60.0).apply(ask(keep_alive_s=said), card).keep_alive_s == expected


@pytest.mark.parametrize("load", [LoadOptions(num_gpu=-1), LoadOptions(num_thread=0)])
def test_what_leaves_the_choice_to_us_is_not_said(card: ModelCard, load: LoadOptions) -> None:
    """So that it is no other runner than the one for silence."""
    assert LoadPolicy().apply(ask(load=load), card).load == LoadOptions()


async def talk(house: FakeHouse, keep_alive_s: float | None = None, **load: Any) -> list[int]:
    """The workers after a request with these options."""
    assert await texts(await house.dispatch.generate(ask(load=LoadOptions(**load), keep_alive_s=keep_alive_s)))
    return worker_pids()


async def test_without_pins_options_reload_the_model(tmp_path: Path) -> None:
    """Smaller windows, and layers that a client leaves open, excepted."""
    async with fake_house(tmp_path) as house:
        first = await talk(house, num_ctx=100, num_gpu=1)
        assert await talk(house, num_ctx=50) == first
        assert await talk(house, num_ctx=100, num_gpu=-1) == first
        second = await talk(house, num_ctx=200)
        assert second != first
        assert await talk(house, num_ctx=200, num_thread=1) != second


async def test_under_pins_no_options_reload_the_model(tmp_path: Path) -> None:
    """Neither a larger window nor a smaller one, nor anything else; nor does it leave when one client says so."""
    async with fake_house(tmp_path, HEADWATER_PINNED_OPTIONS="all", OLLAMA_CONTEXT_LENGTH="100") as house:
        first = await talk(house)
        assert await talk(house, num_ctx=50) == first
        assert await talk(house, num_ctx=500) == first
        assert await talk(house, num_batch=8, num_gpu=0, main_gpu=1, use_mmap=False, num_thread=1) == first
        assert await talk(house, keep_alive_s=0.0) == first
        assert await talk(house, keep_alive_s=FOREVER) == first
        (resident,) = house.pool.residents
        assert (resident.key.num_ctx, resident.keep_alive_s) == (100, 300.0)
        await house.dispatch.unload(ask())
        assert resident.keep_alive_s == 0.0


async def test_ceilings_bound_what_is_loaded(tmp_path: Path) -> None:
    """And how long it stays, the server's own default included."""
    async with fake_house(tmp_path, HEADWATER_MAX_CONTEXT="128", HEADWATER_MAX_KEEP_ALIVE="60s") as house:
        await talk(house)
        (resident,) = house.pool.residents
        assert (resident.key.num_ctx, resident.keep_alive_s) == (128, 60.0)
        await talk(house, num_ctx=4000, keep_alive_s=FOREVER)
        assert house.pool.residents == [resident]
        assert resident.keep_alive_s == 60.0


def _with(card: ModelCard, **parameters: int) -> ModelCard:
    return replace(card, parameters=parameters)
