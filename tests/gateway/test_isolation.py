"""What becomes of everybody else when one worker aborts, is killed, runs in circles or stops working."""

# ruff: noqa: ASYNC240  # a test may look at a path
from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
from fake_house import DIGEST, FakeHouse, ask, describe_model, fake_backend, fake_house, texts, until, worker_pids

from engines.backend import BackendConfiguration
from engines.errors import HeadwaterError, WorkerCrashed
from engines.request import Mode
from gateway.runner import Runner

CRASHES = [
    ("exit", "exit status 9"),
    ("abort", r"killed by SIGABRT(.|\n)*GGML_ASSERT\(everything is fine\) failed"),
    ("spin", r"hung and was ended: the event loop has been stuck for \d+ s(.|\n)*in _spin"),
    ("stall", r"hung and was ended: no step has finished for \d+ s, with 2 requests in hand"),
]


class LimitedHouse(FakeHouse):
    """A house whose workers are patient for a second."""

    def __init__(self, root: Path, **env: str) -> None:
        super().__init__(root, **env)
        self.backend = fake_backend(root, step_limit_s=1.0)


def add_other_model(root: Path) -> None:
    """A second model, whose weights are other bytes."""
    data = b"other weights"
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    (root / "models/blobs" / digest.replace(":", "-")).write_bytes(data)
    [manifest] = [path for path in (root / "models/manifests").rglob("latest") if path.is_file()]
    described = json.loads(manifest.read_text())
    for layer in described["layers"]:
        if layer["mediaType"].endswith("image.model"):
            layer.update(digest=digest, size=len(data))
    (manifest.parent.parent / "other").mkdir()
    (manifest.parent.parent / "other/latest").write_text(json.dumps(described))


@pytest.mark.parametrize(("crash", "words"), CRASHES, ids=[crash for crash, _ in CRASHES])
async def test_a_broken_worker_ends_alone_and_says_why(tmp_path: Path, crash: str, words: str) -> None:
    """Its requests get errors with its last words; another model's go on; the next request gets a fresh worker."""
    async with fake_house(tmp_path, {"tokens_per_s": 20}, LimitedHouse) as house:
        add_other_model(tmp_path)
        other = await house.dispatch.generate(ask(" ".join(["on"] * 100), model="other"))
        await anext(other)
        [survivor] = worker_pids()
        describe_model(tmp_path, crash_after=2, crash=crash, tokens_per_s=50)
        answers = [await house.dispatch.generate(ask("one two three four")) for _ in range(2)]
        ends = await asyncio.gather(*map(texts, answers), return_exceptions=True)
        for end in ends:
            assert isinstance(end, WorkerCrashed)
            with pytest.raises(WorkerCrashed, match=words):
                raise end
        assert worker_pids() == [survivor]
        describe_model(tmp_path)
        assert await texts(await house.dispatch.generate(ask("fine again"))) == ["fine", " again"]
        assert len(await texts(other)) == 99
        codes = [(row["status"], row["error_code"]) for row in house.rows()]
        assert sorted(codes) == [(200, ""), (200, ""), (500, "worker_crashed"), (500, "worker_crashed")]


async def test_a_worker_is_the_first_to_go_when_memory_runs_out(tmp_path: Path) -> None:
    """The system is told to choose it before the gateway."""
    async with fake_house(tmp_path) as house:
        await texts(await house.dispatch.generate(ask()))
        [pid] = worker_pids()
        if Path(f"/proc/{pid}/oom_score_adj").exists():
            assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) > int(
                Path("/proc/self/oom_score_adj").read_text()
            )


async def test_a_worker_that_never_answers_is_ended_by_its_parent(tmp_path: Path) -> None:
    """Whatever stops it, even where its own watchdog cannot run."""
    describe_model(tmp_path, tokens_per_s=20)
    exits: list[HeadwaterError] = []
    runner = Runner(
        fake_backend(tmp_path), tmp_path / "w.sock", model=DIGEST, model_ref="demo:latest", mode=Mode.COMPLETION,
        config=BackendConfiguration(), on_exit=exits.append, silence_s=0.8,
    )  # fmt: skip
    await runner.start(30)
    reply = await runner.generate(ask(" ".join(["on"] * 100)))
    await anext(reply)
    [pid] = worker_pids()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerCrashed, match="has not answered for 1 s and was ended"):
        await texts(reply)
    reply.close()
    assert [type(error) for error in exits] == [WorkerCrashed]
    await runner.stop()
    assert worker_pids() == []


async def test_progress_shows_while_a_model_is_loading(tmp_path: Path) -> None:
    """The runner's state and how far it is; once it is up, all of it."""
    async with fake_house(tmp_path, {"load_s": 1.0}) as house:
        loading = asyncio.create_task(house.dispatch.load(ask("")))
        await until(lambda: any(0 < status.load_progress < 1 for status in house.dispatch.list_runners()))
        assert [status.state for status in house.dispatch.list_runners()] == ["starting"]
        await loading
        assert [(s.state, s.load_progress) for s in house.dispatch.list_runners()] == [("ready", 1.0)]
