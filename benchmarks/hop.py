"""Scenario `hop`: how much later an answer comes through the gateway than straight from the worker's socket.

Asked of the demo model, whose tokens cost next to nothing, one request after the other and alternately. The whole
answer includes waiting for the ledger's commit, which its last event does; the first token does not.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator

import httpx

from benchmarks.load import OPENAI, RequestFailed, ask, run_load
from benchmarks.scenario import Bench, Sample, Scenario
from benchmarks.server import DEMO, Worker, run_server
from benchmarks.targets import HEADWATER
from engines.request import GenerateRequest, Origin, Sampling
from engines.wire import encode_request, path_of

PROMPT = "The capital of France is"
DIRECT = "worker's socket"


def measure(bench: Bench) -> Iterator[Sample]:
    """Medians of many answers each way."""
    with bench.forgiving(HEADWATER), run_server({"demo": DEMO}) as server:
        run_load(server.base_url, OPENAI, "demo", [[ask(PROMPT, 1)]])
        worker = server.worker_of(DEMO)
        for turn in range(bench.rounds):
            bench.tell(f"round {turn + 1} of {bench.rounds}")
            pairs = list(_pairs(server.base_url, worker, bench.size(200, 5)))
            for part, case in enumerate(("first byte", "whole answer")):
                for way, via in enumerate((DIRECT, HEADWATER)):
                    seconds = statistics.median(pair[way][part] for pair in pairs)
                    yield Sample(case, via, turn, {"latency_p50_s": seconds})


def _pairs(base_url: str, worker: Worker, count: int) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """Seconds until the first byte and until the last, from the worker and through the gateway."""
    request = GenerateRequest(
        id="req_hop",
        model="demo",
        origin=Origin("benchmark", "benchmark"),
        prompt=PROMPT,
        sampling=Sampling(temperature=0, max_tokens=1),
    )
    direct_body = encode_request(request, worker.model)
    gateway_body = json.dumps({"model": "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 1, "stream": True})
    with (
        httpx.Client(transport=httpx.HTTPTransport(uds=str(worker.socket)), base_url="http://worker") as direct,
        httpx.Client(base_url=base_url, trust_env=False) as gateway,
    ):
        for _ in range(count):
            yield (
                _time(direct, path_of(request), direct_body),
                _time(gateway, "/v1/completions", gateway_body.encode()),
            )


def _time(http: httpx.Client, path: str, body: bytes) -> tuple[float, float]:
    sent = time.perf_counter()
    with http.stream("POST", path, content=body, headers={"Content-Type": "application/json"}) as response:
        pieces = response.iter_raw()
        start = next(pieces, b"")
        first = time.perf_counter()
        rest = b"".join(pieces)
    whole = time.perf_counter()
    if response.status_code != 200:
        raise RequestFailed((start + rest).decode("utf-8", "replace"))
    return first - sent, whole - sent


HOP = Scenario(
    "hop",
    "a one-token answer of the demo model through the gateway and from the worker; the last byte waits for the ledger",
    measure,
    ("latency_p50_s",),
)
