"""One request's way through a whole house, with each end that it can come to."""

import asyncio
import hashlib
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_house import FakeHouse, ask, demo_card, demo_digest, describe_model, fake_house, texts, until, worker_pids

from compat.streams import aclose
from engines.errors import (
    HeadwaterError,
    ModelLoadFailed,
    ModelNotFound,
    PromptTooLong,
    RemoteModel,
    ServerBusy,
    WorkerCrashed,
)
from engines.events import ChoiceFinished, Finished, FinishReason, TextDelta
from engines.library import CreateRequest
from engines.model import ModelCard
from engines.options import OptionTypeError
from engines.request import FOREVER, LoadOptions, Message, Mode, Sampling
from gateway.dispatch import _complete
from gateway.policy import DEFAULT_NUM_CTX, MIN_NUM_CTX, LoadPolicy
from gateway.residents import RunnerKey

LONG = " ".join(f"word{n}" for n in range(300))


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[FakeHouse]:
    """A house with a fast model."""
    async with fake_house(tmp_path) as opened:
        yield opened


async def test_an_answer_is_events_and_a_row(house: FakeHouse) -> None:
    """Everything that the ledger knows of a request that went well."""
    *said, finished = [event async for event in await house.dispatch.generate(ask("one two three", stream=True))]
    assert said == [
        TextDelta("one"),
        TextDelta(" two"),
        TextDelta(" three"),
        ChoiceFinished(FinishReason.STOP),
    ]
    assert isinstance(finished, Finished)
    expected = {
        "surface": "ollama/completion",
        "caller": "tester",
        "model": "demo:latest",
        "model_digest": demo_digest(house.root),
        "backend": "llama.cpp",
        "mode": "completion",
        "status": 200,
        "finish_reason": "stop",
        "error_code": "",
        "stream": 1,
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "wasted_tokens": 0,
    }
    row = house.row()
    assert {name: row[name] for name in expected} == expected
    assert row["load_s"] == finished.timings.load_s > 0
    assert row["queue_s"] == 0
    assert row["ttft_s"] == finished.timings.ttft_s > row["load_s"]
    assert row["total_s"] >= row["ttft_s"]
    assert row["decode_s"] > 0
    assert repr(house.pool) == "<Pool [demo:latest:ready:0] waiting=0>"
    assert house.accounts.in_flight() == []


async def test_the_row_is_committed_before_the_last_event(house: FakeHouse) -> None:
    """Not a moment later."""
    async for event in await house.dispatch.generate(ask()):
        assert len(house.rows()) == isinstance(event, Finished)


async def test_a_loaded_model_has_no_load_time(house: FakeHouse) -> None:
    """Only who waited for the load is charged with it."""
    for _ in range(2):
        await texts(await house.dispatch.generate(ask()))
    first, second = house.rows()
    assert first["load_s"] > 0
    assert second["load_s"] == 0
    assert second["queue_s"] < first["load_s"]


async def test_a_prompt_is_rendered_by_the_worker_and_costs_a_load(house: FakeHouse) -> None:
    """The model is there afterwards; nothing was generated."""
    assert await house.dispatch.render(ask("one two")) == "one two"
    row = house.row()
    assert (row["status"], row["finish_reason"], row["completion_tokens"]) == (200, "load", 0)
    assert repr(house.pool) == "<Pool [demo:latest:ready:0] waiting=0>"


def test_the_model_s_own_template_goes_with_the_request_where_it_is_used(tmp_path: Path) -> None:
    """Unless the request brings one, or the weights' own is used."""
    card = replace(demo_card(tmp_path), template="{{ .Prompt }}", go_template="{{ .Prompt }}")
    assert _complete(ask(), card).template == "{{ .Prompt }}"
    assert _complete(ask(template="{{ .System }}"), card).template == "{{ .System }}"
    assert _complete(ask(), replace(card, go_template="")).template is None


async def test_waiting_for_a_place_is_queue_time(tmp_path: Path) -> None:
    """One place, two requests; the waiting one is seen waiting."""
    async with fake_house(tmp_path, {"tokens_per_s": 200}, OLLAMA_NUM_PARALLEL="1") as house:
        first = await house.dispatch.generate(ask(" ".join("x" * 40)))
        second = asyncio.create_task(house.dispatch.generate(ask()))
        await until(house.accounts.waiting)
        assert [origin.caller for origin in house.accounts.waiting()] == ["tester"]
        await texts(first)
        await texts(await second)
        assert house.rows()[1]["queue_s"] > 0.1
        assert house.rows()[1]["load_s"] == 0


async def test_a_prompt_that_is_too_long_is_refused_before_streaming(tmp_path: Path) -> None:
    """A real status, a row, and the place given back."""
    async with fake_house(tmp_path, {"num_ctx": 3}) as house:
        with pytest.raises(PromptTooLong):
            await house.dispatch.generate(ask("one two three four"))
        row = house.row()
        assert (row["status"], row["finish_reason"], row["error_code"]) == (400, "refused", "context_length_exceeded")
        assert repr(house.pool) == "<Pool [demo:latest:ready:0] waiting=0>"


async def test_an_unknown_model_is_refused(house: FakeHouse) -> None:
    """The ledger has the name as it was typed, and no digest."""
    with pytest.raises(ModelNotFound):
        await house.dispatch.generate(ask(model="Nope:1b"))
    row = house.row()
    assert (row["status"], row["error_code"], row["model"], row["model_digest"]) == (
        404,
        "model_not_found",
        "Nope:1b",
        "",
    )


async def test_a_failed_load_is_an_error_with_the_workers_words(tmp_path: Path) -> None:
    """For everybody who waited; a row each."""
    async with fake_house(tmp_path, {"fail": "out of memory"}) as house:
        failed = await asyncio.gather(*(house.dispatch.generate(ask()) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in failed] == [ModelLoadFailed] * 3
        assert all("out of memory" in str(error) for error in failed)
        assert [(row["status"], row["finish_reason"], row["error_code"]) for row in house.rows()] == [
            (500, "error", "model_load_failed")
        ] * 3
        assert repr(house.pool) == "<Pool [] waiting=0>"


async def test_a_load_that_takes_too_long_is_an_error(tmp_path: Path) -> None:
    """The operator's limit is kept, and nothing stays behind."""
    async with fake_house(tmp_path, {"load_s": 60}, OLLAMA_LOAD_TIMEOUT="500ms") as house:
        with pytest.raises(ModelLoadFailed, match="not ready within"):
            await house.dispatch.generate(ask())
        await until(lambda: worker_pids() == [])


async def test_a_caller_who_leaves_is_charged_for_what_was_generated(tmp_path: Path) -> None:
    """The engine counts, not the client; what nobody read is wasted."""
    async with fake_house(tmp_path, {"tokens_per_s": 300}) as house:
        events = await house.dispatch.generate(ask(LONG))
        for _ in range(3):
            await anext(events)
        await texts(await house.dispatch.generate(ask("meanwhile the worker goes on ahead of us")))
        await aclose(events)
        assert repr(house.pool) == "<Pool [demo:latest:ready:0] waiting=0>"
        row = house.rows()[-1]
        assert (row["status"], row["finish_reason"], row["error_code"]) == (499, "cancel", "")
        assert row["prompt_tokens"] == 300
        assert 3 < row["completion_tokens"] < 300
        assert row["wasted_tokens"] == row["completion_tokens"] - 3
        await aclose(events)
        assert len(house.rows()) == 2
        assert [event async for event in events] == []


async def test_a_caller_who_leaves_before_the_first_event_gives_its_place_back(tmp_path: Path) -> None:
    """Although nothing of the answer was ever started."""
    async with fake_house(tmp_path, {"tokens_per_s": 10}) as house:
        await aclose(await house.dispatch.generate(ask(LONG)))
        assert repr(house.pool) == "<Pool [demo:latest:ready:0] waiting=0>"
        row = house.row()
        assert (row["finish_reason"], row["prompt_tokens"]) == ("cancel", 300)
        assert row["wasted_tokens"] == row["completion_tokens"]


async def test_leaving_survives_being_cancelled_itself(tmp_path: Path) -> None:
    """The record and the place do not depend on anybody's patience."""
    async with fake_house(tmp_path, {"tokens_per_s": 10}) as house:
        closing = asyncio.ensure_future(aclose(await house.dispatch.generate(ask(LONG))))
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await until(house.rows)
        assert house.row()["finish_reason"] == "cancel"
        assert repr(house.pool) == "<Pool [demo:latest:ready:0] waiting=0>"


async def test_a_reader_cancelled_at_the_very_end_is_still_recorded_whole(house: FakeHouse) -> None:
    """Between the worker's last event and ours; what was generated was generated."""
    for num_turns in range(12):
        events = await house.dispatch.generate(ask("one two"))
        for _ in range(3):
            await anext(events)
        reading = asyncio.ensure_future(anext(events))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait({reading})
        await aclose(events)
        await house.accounts.close()
        assert len(house.rows()) == num_turns + 1
        assert house.rows()[-1]["completion_tokens"] == 2
    assert repr(house.pool) == "<Pool [demo:latest:ready:0] waiting=0>"


async def test_a_worker_killed_in_the_middle_is_an_error_and_the_next_request_gets_a_fresh_one(tmp_path: Path) -> None:
    """The row has what had been generated; nobody is left waiting."""
    async with fake_house(tmp_path, {"tokens_per_s": 50}) as house:
        events = await house.dispatch.generate(ask(LONG))
        await anext(events)
        (pid,) = worker_pids()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerCrashed, match="killed by SIGKILL"):
            await texts(events)
        row = house.row()
        assert (row["status"], row["finish_reason"], row["error_code"]) == (500, "error", "worker_crashed")
        assert (row["prompt_tokens"], row["model"]) == (300, "demo:latest")
        assert row["completion_tokens"] >= 1
        assert await texts(await house.dispatch.generate(ask("again"))) == ["again"]
        assert pid not in worker_pids()
        assert repr(house.pool) == "<Pool [demo:latest:ready:0] waiting=0>"


async def test_a_model_that_crashes_every_worker_backs_off(tmp_path: Path) -> None:
    """The third request is answered with the last error at once."""
    async with fake_house(tmp_path, {"crash_after": 1}) as house:
        for _ in range(2):
            with pytest.raises(WorkerCrashed, match="exit status 9"):
                await texts(await house.dispatch.generate(ask()))
        with pytest.raises(WorkerCrashed, match="exit status 9"):
            await house.dispatch.generate(ask())
        assert [row["error_code"] for row in house.rows()] == ["worker_crashed"] * 3
        assert [row["completion_tokens"] for row in house.rows()] == [1, 1, 0]
        await until(lambda: worker_pids() == [])


async def test_a_model_that_was_mended_loads_after_a_failure(tmp_path: Path) -> None:
    """One failure does not stick."""
    async with fake_house(tmp_path, {"fail": "half a file"}) as house:
        with pytest.raises(ModelLoadFailed):
            await house.dispatch.generate(ask())
        describe_model(tmp_path)
        assert await texts(await house.dispatch.generate(ask("fine"))) == ["fine"]


async def test_load_and_unload_are_on_record_and_cost_nothing(house: FakeHouse) -> None:
    """What is resident shows in between."""
    await house.dispatch.load(ask("", keep_alive_s=FOREVER))
    (runner,) = house.dispatch.list_runners()
    assert (runner.model.name, runner.state, runner.num_active) == ("demo:latest", "ready", 0)
    assert runner.expires_at == FOREVER
    await house.dispatch.unload(ask(""))
    await until(lambda: house.dispatch.list_runners() == [])
    await house.dispatch.unload(ask(""))
    assert [(row["finish_reason"], row["status"], row["prompt_tokens"]) for row in house.rows()] == [
        ("load", 200, 0),
        ("unload", 200, 0),
        ("unload", 200, 0),
    ]


async def test_a_failed_load_request_is_on_record(tmp_path: Path) -> None:
    """As an error, with its code."""
    async with fake_house(tmp_path, {"fail": "no"}) as house:
        with pytest.raises(ModelLoadFailed):
            await house.dispatch.load(ask(""))
        assert house.row()["error_code"] == "model_load_failed"


async def test_a_full_queue_is_a_refusal_on_record(tmp_path: Path) -> None:
    """And those who have a place go on."""
    async with fake_house(tmp_path, {"tokens_per_s": 300}, OLLAMA_NUM_PARALLEL="1", OLLAMA_MAX_QUEUE="1") as house:
        running = await house.dispatch.generate(ask("one two three"))
        waiting = asyncio.create_task(house.dispatch.generate(ask()))
        await until(house.accounts.waiting)
        with pytest.raises(ServerBusy):
            await house.dispatch.generate(ask())
        row = house.row()
        assert (row["status"], row["finish_reason"], row["error_code"]) == (503, "refused", "server_busy")
        assert len(await texts(running)) == 3
        assert len(await texts(await waiting)) == 3


async def test_closing_the_house_ends_running_requests_on_record(tmp_path: Path) -> None:
    """A reader gets an error instead of silence, and nothing of it is lost."""
    async with fake_house(tmp_path, {"tokens_per_s": 20}) as house:
        events = await house.dispatch.generate(ask(LONG))
        reading = asyncio.create_task(texts(events))
        await house.pool.close()
        with pytest.raises(HeadwaterError):
            await reading
        with pytest.raises(ServerBusy):
            await house.dispatch.generate(ask())
        assert [row["finish_reason"] for row in house.rows()] == ["error", "refused"]


async def test_a_crowd_that_comes_and_goes_leaves_one_row_each_and_no_place_taken(tmp_path: Path) -> None:
    """Whatever each of them does, at whatever moment."""
    chance = random.Random(7)
    async with fake_house(tmp_path, {"tokens_per_s": 400}, OLLAMA_NUM_PARALLEL="4") as house:

        async def visit(leaves_after: int | None) -> None:
            events = await house.dispatch.generate(ask("a b c d e f g h"))
            try:
                for _ in range(leaves_after if leaves_after is not None else 10):
                    await anext(events)
            finally:
                await aclose(events)

        visits = [asyncio.create_task(visit(chance.choice([None, 0, 1, 5, 9]))) for _ in range(60)]
        for visitor in chance.sample(visits, 20):
            for _ in range(chance.randrange(100)):
                await asyncio.sleep(0)
            visitor.cancel()
        await asyncio.wait(visits)
        assert {type(task.exception()) for task in visits if not task.cancelled()} == {type(None)}
        assert repr(house.pool) == "<Pool [demo:latest:ready:0] waiting=0>"
        await house.accounts.close()
        num_never_admitted = len(house.accounts._open)  # theirs is the middleware's to settle
        assert len(house.rows()) + num_never_admitted == 60


def key_of(house: FakeHouse, card: ModelCard, **load: Any) -> RunnerKey:
    """Which runner a request with these load options needs."""
    request = house.settings.load_policy.apply(ask(load=LoadOptions(**load)), card)
    return house.dispatch._key(request, card)


async def test_the_window_is_what_request_model_and_server_say_in_that_order(tmp_path: Path) -> None:
    """And never more than the model was trained with."""

    def window(house: FakeHouse, asked: int | None = None, said: int | None = None, trained: int = 512) -> int:
        card = replace(house.dispatch._catalog.find("demo"), context_length=trained, parameters={"num_ctx": said})
        return key_of(house, card, num_ctx=asked).num_ctx

    async with fake_house(tmp_path) as house:
        assert window(house, trained=0) == DEFAULT_NUM_CTX
        assert window(house) == 512
        assert window(house, 100, 200) == 100
        assert window(house, None, 200) == 200
        assert window(house, 10**9) == 512
        assert window(house, 1) == window(house, -5) == MIN_NUM_CTX
    async with fake_house(tmp_path, OLLAMA_CONTEXT_LENGTH="300") as house:
        assert window(house) == 300
        assert window(house, 400) == 400


async def test_requests_share_a_runner_by_weights_and_load_options(house: FakeHouse) -> None:
    """Not by name; the window is left to the pool."""
    card = house.dispatch._catalog.find("demo")
    alias = replace(card, name="alias:latest", digest="0" * 64)
    plain = key_of(house, card)
    assert plain == key_of(house, alias)
    assert plain.mode is Mode.COMPLETION
    assert plain != key_of(house, card, num_batch=8)
    assert key_of(house, card, num_ctx=8).options == plain.options


async def test_a_models_own_parameter_of_a_wrong_type_is_refused(house: FakeHouse) -> None:
    """It is found before a worker is started."""
    card = replace(house.dispatch._catalog.find("demo"), parameters={"num_ctx": "many"})
    with pytest.raises(OptionTypeError):
        key_of(house, card)


async def test_gaps_are_filled_by_the_model_and_then_by_the_dialect(house: FakeHouse) -> None:
    """What the client said stays."""
    card = replace(
        house.dispatch._catalog.find("demo"),
        parameters={"temperature": 0.1, "top_k": 7, "num_ctx": 9},
    )
    request = ask(
        "hi", sampling=Sampling(temperature=0.9), defaults=Sampling(temperature=0.5, top_k=40, top_p=0.8), num_choices=1
    )
    completed = _complete(LoadPolicy().apply(request, card), card)
    assert (completed.sampling.temperature, completed.sampling.top_k, completed.sampling.top_p) == (0.9, 7, 0.8)
    assert completed.load.num_ctx == 9
    own = replace(request, messages=(Message("system", "Mine."), Message("user", "hi")))
    assert _complete(own, card).messages == own.messages
    raw = replace(request, messages=None, prompt="hi")
    assert _complete(raw, card).messages is None


async def test_a_model_that_runs_elsewhere_is_refused_for_every_dialect(house: FakeHouse) -> None:
    """Before anything is loaded, and on record."""
    config = json.dumps({"remote_host": "https://ollama.com", "remote_model": "big"}).encode()
    digest = hashlib.sha256(config).hexdigest()
    (house.root / f"models/blobs/sha256-{digest}").write_bytes(config)
    layer = {"mediaType": "application/json", "digest": f"sha256:{digest}", "size": len(config)}
    manifest = house.root / "models/manifests/registry.ollama.ai/library/far/latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "config": layer, "layers": []}))
    with pytest.raises(RemoteModel):
        await house.dispatch.generate(ask(model="far"))
    assert house.pool.residents == []
    assert (house.row()["status"], house.row()["error_code"]) == (403, "remote_model")
    assert (await house.dispatch.find("far")).is_remote
    async for _ in await house.library.create(CreateRequest(name="mine", base="far", system="Be brief.")):
        pass
    assert (await house.dispatch.find("mine")).remote_model == "big"
