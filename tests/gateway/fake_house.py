"""A whole house on a temporary directory: real ledger, catalog, pool and worker processes; only the engine is fake."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from engines.events import Event, TextDelta
from engines.llamacpp.backend import LlamaCppBackend
from engines.model import ModelCard
from engines.request import GenerateRequest, Message, Origin
from engines.store.catalog import Catalog
from engines.store.seed import seed_demo
from gateway.app import House
from gateway.settings import Settings

ORIGIN = Origin("ollama/completion", "tester", "curl")
DIGEST = "sha256:" + "0" * 64
_ids = count()


class FakeHouse(House):
    """A house whose models are all the fake one that `model.json` describes, read anew by each worker."""

    def __init__(self, root: Path, **env: str) -> None:
        self.root = root
        settings = Settings.from_env(
            {"OLLAMA_HOST": "127.0.0.1:0", "OLLAMA_MODELS": f"{root}/models", "HEADWATER_DATA": f"{root}/data", **env}
        )
        super().__init__(settings, fake_backend(root))

    def rows(self) -> list[dict[str, Any]]:
        """What is committed in the ledger, as another process would see it."""
        with sqlite3.connect(self.root / "data" / "usage.db") as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("select * from requests order by rowid")]

    def row(self) -> dict[str, Any]:
        """The only one."""
        (row,) = self.rows()
        return row


def fake_backend(root: Path, **limits: float) -> LlamaCppBackend:
    """A backend of real processes around the fake engine."""
    return LlamaCppBackend(lambda digest: root / "model.json", engine="fake", grace_s=1.0, **limits)


def describe_model(root: Path, **says: Any) -> None:
    """What the next worker reads (engines/fake.py)."""
    (root / "model.json").write_text(json.dumps(says))


@asynccontextmanager
async def fake_house(
    root: Path, model: dict[str, Any] | None = None, kind: type[FakeHouse] = FakeHouse, **env: str
) -> AsyncIterator[FakeHouse]:
    """An open house; when it is closed, no worker and no socket may be left."""
    seed_demo(root / "models", root / "seeded")
    describe_model(root, **(model or {}))
    house = kind(root, **env)
    await house.open()
    try:
        yield house
    finally:
        await house.close()
        assert house.pool.residents == []
        assert worker_pids() == []
        assert await asyncio.to_thread(sockets_below, root) == []
        assert house.ledger.num_unrecorded == 0


def sockets_below(root: Path) -> list[Path]:
    """Every worker's socket."""
    return list(root.rglob("*.sock"))


async def until(condition: Callable[[], Any]) -> None:
    """Return when it holds, for what happens in another process and tells nobody."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within 10 s")


def worker_pids() -> list[int]:
    """Our workers that are there, dead ones that nobody has reaped included."""
    return [child.pid for child in psutil.Process().children(recursive=True) if _is_worker(child)]


def _is_worker(child: psutil.Process) -> bool:
    return child.status() == psutil.STATUS_ZOMBIE or "engines.worker" in child.cmdline()


def ask(text: str = "one two three", model: str = "demo", **fields: Any) -> GenerateRequest:
    """A chat of one message, under an id of its own."""
    return GenerateRequest(f"req_{next(_ids):032x}", model, ORIGIN, messages=(Message("user", text),), **fields)


async def texts(events: AsyncIterator[Event]) -> list[str]:
    """The text deltas of an answer that is read to its end."""
    return [event.text async for event in events if isinstance(event, TextDelta)]


def demo_digest(root: Path) -> str:
    """The digest of the only model."""
    return Catalog(root / "models").find("demo").digest


def demo_card(root: Path) -> ModelCard:
    """The only model of a new directory."""
    seed_demo(root / "models", root / "seeded")
    return Catalog(root / "models").find("demo")
