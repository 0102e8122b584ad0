"""Answers that must match a schema, by the thousand, each judged by a validator that is not ours.

An answer that its token limit cuts off is no whole JSON and says nothing about the constraint; it is counted and asked
for again with another schema, until there are as many whole answers as were wanted.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import uvloop
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from benchmarks.load import RequestFailed, exchange, read_body
from benchmarks.schemas import SchemaWriter
from engines.request import JSON

TOKENS = 256
SUBJECTS = ("a fox", "the weather in Paris", "three friends", "a red house", "an order", "a story", "who you are")


@dataclass(slots=True)
class Constrained:
    """What came of it. `problems` tells the first of what must not be, with the schema's seed."""

    num_valid: int = 0
    num_invalid: int = 0
    num_refused: int = 0
    num_cut: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def num_whole(self) -> int:
        """Answers that could be judged."""
        return self.num_valid + self.num_invalid

    def note(self, problem: str) -> None:
        """Keep the first few."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)


MAX_PROBLEMS = 20


def run_constrained(
    base_url: str, model: str, *, count: int, clients: int, tell: Callable[[Constrained], None]
) -> Constrained:
    """`count` whole answers from concurrent clients, a schema each. `tell` is told after every answer."""
    result = Constrained()
    began = time.monotonic()
    uvloop.run(_run(base_url, model, count, clients, result, tell))
    result.seconds = time.monotonic() - began
    return result


async def _run(
    base_url: str, model: str, count: int, clients: int, result: Constrained, tell: Callable[[Constrained], None]
) -> None:
    seeds = iter(range(10 * count))  # so that an endless row of cut answers ends too

    async def client() -> None:
        for seed in seeds:
            if result.num_whole + result.num_refused >= count:
                return
            await _ask(base_url, model, seed, result)
            tell(result)

    await asyncio.gather(*(client() for _ in range(clients)))


async def _ask(base_url: str, model: str, seed: int, result: Constrained) -> None:
    schema = SchemaWriter(seed).schema()
    chance = random.Random(seed)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell me about {chance.choice(SUBJECTS)} as JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
        "temperature": chance.choice((0.0, 0.7, 1.2)),
        "seed": seed,
        "max_tokens": TOKENS,
    }
    _, pieces, _ = await exchange(base_url, "/v1/chat/completions", json.dumps(body).encode())
    try:
        answer = json.loads(b"".join(data for _, data in read_body(pieces)))
    except RequestFailed as error:
        result.num_refused += 1
        result.note(f"schema {seed} was refused: {str(error)[:500]}")
        return
    result.completion_tokens += answer["usage"]["completion_tokens"]
    [choice] = answer["choices"]
    if choice["finish_reason"] != "stop":
        result.num_cut += 1
    elif wrong := judge(choice["message"]["content"], schema):
        result.num_invalid += 1
        result.note(f"schema {seed}: {wrong}")
    else:
        result.num_valid += 1


def judge(text: str, schema: JSON) -> str:
    """What is wrong with an answer; empty when nothing is."""
    try:
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        return f"{text[:200]!r} is not JSON: {error}"
    wrong = best_match(Draft202012Validator(schema).iter_errors(value))
    return f"{text[:200]!r}: {wrong.message[:200]}" if wrong else ""


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _without_duplicates(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)
