"""What is told of runners: real workers around the fake engine, asked over HTTP as a browser would."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_house import FakeHouse, ask, fake_house, texts, until, worker_pids

from engines.request import FOREVER, LoadOptions
from gateway.admin import DASHBOARD, PAGE
from gateway.app import make_app


async def get(house: FakeHouse, path: str, client: str = "127.0.0.1") -> httpx.Response:
    """What the whole app answers to somebody at an address."""
    transport = httpx.ASGITransport(make_app(house), client=(client, 50000))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:11434") as http:
        return await http.get(path)


async def runners(house: FakeHouse) -> list[dict[str, Any]]:
    """All runners as they are told."""
    found: list[dict[str, Any]] = (await get(house, "/admin/runners")).json()["runners"]
    return found


async def test_a_runner_is_told_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    """Everything that `/api/ps` says, under the same names and in the same form, and what pool and worker add."""
    async with fake_house(tmp_path) as house:
        request = ask(load=LoadOptions(num_ctx=512, num_batch=8), keep_alive_s=FOREVER)
        await texts(await house.dispatch.generate(request))
        (listed,) = (await get(house, "/api/ps")).json()["models"]
        (told,) = await runners(house)
        assert listed.keys() <= told.keys()
        same = listed.keys() - {"expires_at", "size"}  # which move with the time
        assert {name: told[name] for name in same} == {name: listed[name] for name in same}
        assert [told["pid"]] == worker_pids()
        assert told["rss"] == told["size"] > 0
        assert told["threads"] > 0
        assert (told["state"], told["mode"], told["backend"]) == ("ready", "completion", "llama.cpp")
        assert (told["pinned"], told["keep_alive_s"], told["expires_in_s"]) == (True, None, None)
        assert (told["in_flight"], told["queued"], told["served"]) == (0, 0, 1)
        assert (told["load_progress"], told["options"]) == (1.0, {"num_batch": 8})
        assert told["idle_s"] >= 0


async def test_requests_in_flight_and_waiting_are_counted(tmp_path: Path) -> None:
    """Those that are served, and those that have no place yet."""
    async with fake_house(tmp_path, {"tokens_per_s": 100}, OLLAMA_NUM_PARALLEL="1") as house:
        running = await house.dispatch.generate(ask("one " * 1000))
        waiting = asyncio.create_task(house.dispatch.generate(ask()))
        await until(lambda: house.pool.waiting)
        found = (await get(house, "/admin/runners")).json()
        (told,), (waiter,) = found["runners"], found["waiting"]
        assert (told["in_flight"], told["queued"], told["sequences"]["running"]) == (1, 1, 1)
        assert (waiter["name"], waiter["mode"], waiter["context_length"]) == ("demo:latest", "completion", 4096)
        assert waiter["waited_s"] >= 0
        waiting.cancel()
        await asyncio.wait([waiting])
        await running.aclose()  # type: ignore[attr-defined]


async def test_a_load_shows_how_far_it_is(tmp_path: Path) -> None:
    """From 0 to 1, which the page shows in percent."""
    async with fake_house(tmp_path, {"load_s": 3.0}) as house:
        loading = asyncio.create_task(house.dispatch.load(ask()))
        await until(lambda: house.pool.residents and 0 < house.pool.residents[0].runner.load_progress < 1)
        (told,) = await runners(house)
        assert told["state"] == "starting"
        assert 0 < told["load_progress"] < 1
        loading.cancel()
        await asyncio.wait([loading])


async def test_a_worker_that_does_not_answer_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said last is told."""
    monkeypatch.setattr("gateway.inspection.PATIENCE_S", 0.2)
    async with fake_house(tmp_path) as house:
        await texts(await house.dispatch.generate(ask()))
        (pid,) = worker_pids()
        os.kill(pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(5):
                (told,) = await runners(house)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (told["pid"], told["state"]) == (pid, "ready")


async def test_nothing_loaded_is_two_empty_lists(tmp_path: Path) -> None:
    """And loads nothing."""
    async with fake_house(tmp_path) as house:
        assert (await get(house, "/admin/runners")).json() == {"runners": [], "waiting": []}
        assert worker_pids() == []


@pytest.mark.parametrize(("path", "name", "media_type"), PAGE)
async def test_the_page_is_served_and_may_ask_nobody_else(
    tmp_path: Path, path: str, name: str, media_type: str
) -> None:
    """Not even if a name that a client made up found its way into it."""
    async with fake_house(tmp_path) as house:
        answer = await get(house, path)
        assert (answer.status_code, answer.content) == (200, (DASHBOARD / name).read_bytes())
        assert answer.headers["content-type"] == f"{media_type}; charset=utf-8"
        assert answer.headers["content-security-policy"] == "default-src 'self'; frame-ancestors 'none'"
        assert not re.search(r"innerHTML|https?://", answer.text)


@pytest.mark.parametrize("path", ["/admin", "/admin/runners", "/admin/page.js"])
async def test_strangers_see_nothing(tmp_path: Path, path: str) -> None:
    """As everything of the administrator's."""
    async with fake_house(tmp_path) as house:
        assert (await get(house, path, client="192.0.2.1")).status_code == 403
