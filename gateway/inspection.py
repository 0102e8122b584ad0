"""What every runner is and does at this moment, for whoever looks after the server.

What `/api/ps` says of a loaded model is there under the same names, and beyond it what the pool knows of the runner and
what its worker says of itself. Looking never loads, wakes or holds up anything.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time

import msgspec

from compat.ollama.listing import render_processes
from engines.request import FOREVER, JSON
from gateway.pool import Pool
from gateway.residents import Resident, State
from gateway.runner import Runner

PATIENCE_S = 1.0
"""How long a worker may take to answer; of one that takes longer, what it said last is told."""


async def inspect(pool: Pool[Runner]) -> dict[str, JSON]:
    """All runners, whatever their state, and the requests that wait for one."""
    ready = [resident.runner for resident in pool.residents if resident.state is State.READY]
    await asyncio.gather(*(runner.observe(PATIENCE_S) for runner in ready))
    now = pool.now()
    return {
        "runners": [_describe(pool, resident, now) for resident in pool.residents],
        "waiting": [
            {
                "name": waiter.card.name,
                "mode": waiter.key.mode.value,
                "context_length": waiter.key.num_ctx,
                "waited_s": round(now - waiter.since, 3),
            }
            for waiter in pool.waiting
        ],
    }


def _describe(pool: Pool[Runner], resident: Resident[Runner], now: float) -> dict[str, JSON]:
    status, health = pool.status(resident), resident.runner.health
    (listed,) = msgspec.json.decode(render_processes([status], time.time()))["models"]
    options = dataclasses.asdict(resident.key.options)
    return {
        **listed,
        "state": status.state,
        "backend": status.backend,
        "mode": status.mode.value,
        "load_progress": round(status.load_progress, 3),
        "expires_in_s": _finite(status.expires_at - time.time()),
        "keep_alive_s": _finite(resident.keep_alive_s),
        "pinned": resident.keep_alive_s == FOREVER,
        "idle_s": round(now - resident.last_used, 3) if resident.is_idle else 0.0,
        "draining": resident.is_draining,
        "in_flight": resident.num_active,
        "queued": sum(waiter.key.model == resident.key.model for waiter in pool.waiting),
        "served": resident.num_served,
        "options": {name: value for name, value in options.items() if value is not None},
        "pid": health.pid,
        "threads": health.num_threads,
        "rss": health.size_bytes,
        "expected_size": resident.need_bytes,
        "sequences": {"running": health.num_running, "waiting": health.num_waiting},
        "kv_cells": {"total": health.num_cells, "used": health.num_cells - health.num_free_cells},
        "prefixes": {
            name: health.totals.get(f"{name}_tokens", 0) for name in ("prefill", "reused", "saved", "restored")
        },
        "tokens": health.totals.get("sampled_tokens", 0),
        "tokens_per_s": _rate(health.totals),
    }


def _rate(totals: dict[str, float]) -> float:
    """Generated tokens for each second that the engine computed since the model was loaded; 0 before the first."""
    seconds = totals.get("decode_s", 0.0) + totals.get("overhead_s", 0.0)
    return round(totals.get("sampled_tokens", 0) / seconds, 1) if seconds > 0 else 0.0


def _finite(seconds: float) -> float | None:
    """JSON has no infinity: for ever is null."""
    return round(seconds, 3) if math.isfinite(seconds) else None
