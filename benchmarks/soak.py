"""Mixed load for long: does memory stay flat, does anything leak, and is every token accounted for?

Clients of both dialects ask for short and long answers, streaming and not, and a share of them hangs up somewhere on
the way. In the end the engine's own totals must equal the sum of the ledger's rows, there must be one row for each
request, nothing may run, and all KV cells must be free or reusable.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from dataclasses import dataclass, field

import httpx
import psutil

from benchmarks.server import Server

QUESTIONS = (
    "What is the capital of France?",
    "Tell me a story about a fox.",
    "Why is the sky blue?",
    "Count from 3 to 9.",
    "Who are you?",
)


@dataclass(slots=True)
class Soak:
    """What was done and found. Memory in bytes, of the server and its workers together."""

    num_sent: int = 0
    num_left: int = 0
    num_failed: int = 0
    seconds: float = 0.0
    memory: list[int] = field(default_factory=list)
    ledger: dict[str, float] = field(default_factory=dict)
    engine: dict[str, float] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """What must not be, in words."""
        found = []
        if self.ledger["num_requests"] != self.num_sent:
            found.append(f"{self.num_sent} requests but {self.ledger['num_requests']:.0f} rows")
        if self.ledger["completion_tokens"] != self.engine["sampled_tokens_total"]:
            found.append(f"rows say {self.ledger['completion_tokens']:.0f} tokens, "
                         f"the engine {self.engine['sampled_tokens_total']:.0f}")  # fmt: skip
        if self.engine["kv_cells_free"] != self.engine["kv_cells"] or self.engine["sequences_running"]:
            found.append(f"cells or sequences are still held: {self.engine}")
        if self.num_failed:
            found.append(f"{self.num_failed} requests failed")
        return found


async def soak(server: Server, model: str, *, num_requests: int, num_clients: int, leaving: float) -> Soak:
    """Send `num_requests`, of which the share `leaving` hangs up early, and compare the books."""
    result, chance = Soak(), random.Random(1)
    todo = iter(range(num_requests))
    started = time.monotonic()
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(base_url=server.base_url, timeout=120, limits=limits) as http:

        async def client() -> None:
            for number in todo:
                if number % max(num_requests // 20, 1) == 0:
                    result.memory.append(_memory(server.pid))
                await _ask(http, model, result, chance, leaving)

        await asyncio.gather(*(client() for _ in range(num_clients)))
        result.seconds = time.monotonic() - started
        await asyncio.sleep(1)  # the last who left are being recorded
        result.memory.append(_memory(server.pid))
        result.ledger = (await http.get("/admin/usage")).json()["totals"]
        result.engine = _engine_numbers((await http.get("/metrics")).text)
    return result


async def _ask(http: httpx.AsyncClient, model: str, result: Soak, chance: random.Random, leaving: float) -> None:
    messages = [{"role": "user", "content": chance.choice(QUESTIONS)}]
    limit, seed, stream = chance.choice((5, 40, 200)), chance.randrange(1000), chance.random() < 0.7
    body = {"model": model, "messages": messages, "stream": stream}
    if chance.random() < 0.5:
        path, body["options"] = "/api/chat", {"num_predict": limit, "seed": seed}
    else:
        path, body["max_tokens"], body["seed"] = "/v1/chat/completions", limit, seed
    patience_s = chance.uniform(0, 0.3) if chance.random() < leaving else None
    result.num_sent += 1
    try:
        async with asyncio.timeout(patience_s):
            async with http.stream("POST", path, json=body) as response:
                async for _ in response.aiter_raw():
                    pass
                result.num_failed += response.status_code != 200
    except TimeoutError:
        result.num_left += 1


def _memory(pid: int) -> int:
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


def _engine_numbers(text: str) -> dict[str, float]:
    pattern = re.compile(r"^headwater_engine_(\w+)\{[^}]*\} (\S+)$", re.MULTILINE)
    return {found[1]: float(found[2]) for found in pattern.finditer(text)}
