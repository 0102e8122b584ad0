"""Mixed load for long: does memory stay flat, does anything leak, and is every token accounted for?

Clients of both dialects ask for short and long answers, streaming and not, several choices, log-probabilities,
answers that match a schema, and embeddings; a share of them hangs up somewhere on the way. In the end the engines' own
totals must equal the sum of the ledger's rows, there must be one row for each request, nothing may run, all KV cells
must be free or reusable, and memory must be where it was after the first quarter.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean

import httpx
import psutil

from benchmarks.schemas import SchemaWriter
from benchmarks.server import Server
from engines.request import JSON

CHAT = "chat"
EMBED = "embed"
"""Names of the two models that are asked."""

QUESTIONS = (
    "What is the capital of France?",
    "Tell me a story about a fox.",
    "Why is the sky blue?",
    "Count from 3 to 9.",
    "Who are you?",
)
NUM_SAMPLES = 40  # of memory, in equal steps
MAX_GROWTH = 1.05  # of memory from the second quarter's mean to the last one's
SETTLED_S = 30.0
SETTINGS = {"HEADWATER_PREFIX_MEMORY": "16MiB"}
"""Of the server: what it keeps by intent is small, so that what it should not keep shows."""

Request = tuple[str, dict[str, JSON]]
"""Path and body."""


@dataclass(slots=True)
class Soak:
    """What was done and found. Memory in bytes, of the server and its workers together.

    Attributes:
        num_sent: requests that were sent whole. num_cut_short: those whose client left while it sent, so that nobody
            can say whether the server had all of it.
    """

    num_sent: int = 0
    num_cut_short: int = 0
    num_left: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    memory: list[int] = field(default_factory=list)
    ledger: dict[str, float] = field(default_factory=dict)
    engine: dict[str, float] = field(default_factory=dict)

    @property
    def growth(self) -> float:
        """Memory of the last quarter beside that of the second one; 1 while there are too few samples to say."""
        quarter = len(self.memory) // 4
        return mean(self.memory[-quarter:]) / mean(self.memory[quarter : 2 * quarter]) if quarter else 1.0

    @property
    def problems(self) -> list[str]:
        """What must not be, in words."""
        found = [f"{count} times: {failure}" for failure, count in self.failures.most_common()]
        if not 0 <= self.ledger["num_requests"] - self.num_sent <= self.num_cut_short:
            found.append(f"{self.num_sent} requests but {self.ledger['num_requests']:.0f} rows")
        if self.ledger["completion_tokens"] != self.engine["sampled_tokens_total"]:
            found.append(f"rows say {self.ledger['completion_tokens']:.0f} tokens, "
                         f"the engines {self.engine['sampled_tokens_total']:.0f}")  # fmt: skip
        if self.engine["kv_cells_free"] != self.engine["kv_cells"] or self.engine["sequences_running"]:
            found.append(f"cells or sequences are still held: {self.engine}")
        if self.growth > MAX_GROWTH:
            found.append(f"memory grew by {self.growth - 1:.0%} after the first quarter")
        return found


async def soak(
    server: Server,
    *,
    num_requests: int,
    num_clients: int,
    leaving: float,
    limit_s: float = float("inf"),
    tell: Callable[[int], None] = lambda num_sent: None,
) -> Soak:
    """Send `num_requests`, of which the share `leaving` hangs up early, and compare the books.

    The server has the models CHAT and EMBED. It ends with the last request or after `limit_s`, whichever comes first;
    `tell` is told how many were sent.
    """
    result, chance = Soak(), random.Random(1)
    began = time.monotonic()
    todo = iter(range(num_requests))
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(base_url=server.base_url, timeout=300, limits=limits) as http:

        async def client() -> None:
            for _ in todo:
                elapsed_s = time.monotonic() - began
                if elapsed_s > limit_s:
                    return
                share = max(result.num_sent / num_requests, elapsed_s / limit_s)
                if share >= len(result.memory) / NUM_SAMPLES:
                    result.memory.append(_memory(server.pid))
                tell(result.num_sent)
                await _ask(http, result, chance, leaving)

        await asyncio.gather(*(client() for _ in range(num_clients)))
        result.seconds = time.monotonic() - began
        result.ledger, result.engine = await _settled_books(http, result.num_sent)
        result.memory.append(_memory(server.pid))
    return result


async def _settled_books(http: httpx.AsyncClient, num_sent: int) -> tuple[dict[str, float], dict[str, float]]:
    """The ledger's totals and the engines' numbers, once the last who left are recorded and nothing runs."""
    deadline = time.monotonic() + SETTLED_S
    while True:
        ledger = (await http.get("/admin/usage")).json()["totals"]
        engine = _engine_numbers((await http.get("/metrics")).text)
        is_settled = ledger["num_requests"] >= num_sent and not engine["sequences_running"]
        if is_settled or time.monotonic() > deadline:
            return ledger, engine
        await asyncio.sleep(0.5)


async def _ask(http: httpx.AsyncClient, result: Soak, chance: random.Random, leaving: float) -> None:
    path, body = make_request(chance)
    patience_s = chance.uniform(0, 0.3) if chance.random() < leaving else None
    steps: set[str] = set()

    async def on_trace(event: str, _info: object) -> None:
        steps.add(event)

    try:
        sending = http.stream("POST", path, json=body, extensions={"trace": on_trace})
        async with asyncio.timeout(patience_s), sending as response:
            answer = b"".join([piece async for piece in response.aiter_raw()])
        if response.status_code != 200 or b'"error"' in answer:
            result.failures[f"{path} {response.status_code} {answer[-300:].decode(errors='replace')}"] += 1
    except TimeoutError:
        result.num_left += 1
    except httpx.HTTPError as error:
        result.failures[f"{path} {error!r}"] += 1
    is_sent, is_begun = (f"http11.send_request_{step}" in steps for step in ("body.complete", "headers.started"))
    result.num_sent += is_sent
    result.num_cut_short += is_begun and not is_sent


def make_request(chance: random.Random) -> Request:
    """One of all that clients ask for."""
    kinds: tuple[Callable[[random.Random], Request], ...] = (
        _ollama,
        _openai,
        _choices,
        _logprobs,
        _schema,
        _embeddings,
    )
    [kind] = chance.choices(kinds, weights=(4, 4, 1, 1, 1, 1))
    return kind(chance)


def _messages(chance: random.Random) -> JSON:
    return [{"role": "user", "content": chance.choice(QUESTIONS)}]


def _ollama(chance: random.Random) -> Request:
    options = {"num_predict": chance.choice((5, 40, 200)), "seed": chance.randrange(1000)}
    return "/api/chat", {
        "model": CHAT,
        "messages": _messages(chance),
        "stream": chance.random() < 0.7,
        "options": options,
    }


def _openai(chance: random.Random) -> Request:
    return "/v1/chat/completions", {
        "model": CHAT,
        "messages": _messages(chance),
        "stream": chance.random() < 0.7,
        "max_tokens": chance.choice((5, 40, 200)),
        "seed": chance.randrange(1000),
    }


def _choices(chance: random.Random) -> Request:
    path, body = _openai(chance)
    return path, body | {"n": chance.randint(2, 4)}


def _logprobs(chance: random.Random) -> Request:
    path, body = _openai(chance)
    return path, body | {"logprobs": True, "top_logprobs": chance.randint(0, 5)}


def _schema(chance: random.Random) -> Request:
    path, body = _openai(chance)
    schema = SchemaWriter(chance.randrange(1000)).schema()
    return path, body | {
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        "max_tokens": 200,
    }


def _embeddings(chance: random.Random) -> Request:
    return "/v1/embeddings", {"model": EMBED, "input": chance.choices(QUESTIONS, k=chance.randint(1, 8))}


def _memory(pid: int) -> int:
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


def _engine_numbers(text: str) -> dict[str, float]:
    """The sums over all workers."""
    pattern = re.compile(r"^headwater_engine_(\w+)\{[^}]*\} (\S+)$", re.MULTILINE)
    sums: dict[str, float] = defaultdict(float)
    for name, value in pattern.findall(text):
        sums[name] += float(value)
    return sums
