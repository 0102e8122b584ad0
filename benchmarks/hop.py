"""The gateway hop: how much later an answer comes through the gateway than straight from the worker's socket.

Asked of the demo model, whose tokens cost next to nothing, one request after the other and alternately. The whole
answer includes waiting for the ledger's commit, which its last event does; the first token does not.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass

import httpx

from benchmarks.load import RequestFailed
from benchmarks.server import Worker
from engines.request import GenerateRequest, Origin, Sampling
from engines.wire import encode_request, path_of

PROMPT = "The capital of France is"


@dataclass(frozen=True, slots=True)
class Hop:
    """Medians in seconds, until the first byte of the answer's body and until its last."""

    direct_first_s: float
    direct_whole_s: float
    gateway_first_s: float
    gateway_whole_s: float

    @property
    def first_s(self) -> float:
        """What the gateway adds until the first byte."""
        return self.gateway_first_s - self.direct_first_s

    @property
    def whole_s(self) -> float:
        """What the gateway adds to the whole answer, its accounting included."""
        return self.gateway_whole_s - self.direct_whole_s


def measure_hop(base_url: str, model: str, worker: Worker, count: int) -> Hop:
    """Medians of `count` answers each way. Raises RequestFailed when one is refused."""
    request = GenerateRequest(
        id="req_hop",
        model=model,
        origin=Origin("benchmark", "benchmark"),
        prompt=PROMPT,
        sampling=Sampling(temperature=0, max_tokens=1),
    )
    direct_body = encode_request(request, worker.model)
    gateway_body = json.dumps({"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 1, "stream": True})
    with (
        httpx.Client(transport=httpx.HTTPTransport(uds=str(worker.socket)), base_url="http://worker") as direct,
        httpx.Client(base_url=base_url, trust_env=False) as gateway,
    ):
        pairs = [
            (_time(direct, path_of(request), direct_body), _time(gateway, "/v1/completions", gateway_body.encode()))
            for _ in range(count)
        ]
    return Hop(*(statistics.median(pair[way][part] for pair in pairs) for way in (0, 1) for part in (0, 1)))


def _time(http: httpx.Client, path: str, body: bytes) -> tuple[float, float]:
    """Seconds until the first byte of the body, and until the last."""
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
