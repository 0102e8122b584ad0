"""Scenario `embeddings`: a thousand short texts, in lists and one by one, from an encoder and from a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.load import RequestFailed, percentile, post
from benchmarks.prompts import Writer
from benchmarks.scenario import Bench, Sample, Scenario
from benchmarks.targets import Running, Spec
from engines.request import JSON

MODELS = ("nomic-137m", "smollm-135m-embed")
LIST = 50
CLIENTS = 8
PATH = "/v1/embeddings"


def measure(bench: Bench) -> Iterator[Sample]:
    """Lists of 50 from one client, and single texts from eight."""
    for shape in MODELS:
        with bench.servers(Spec(bench.model(shape), CLIENTS, 8192, embeddings=True)) as servers:
            for case, split in ((f"lists of {LIST}", _lists), (f"singly, {CLIENTS} clients", _singles)):
                measure_it = partial(_embed_all, bench.size(1000, 20), split)
                yield from bench.each(servers, f"{shape}, {case}", measure_it)


Split = Callable[[list[str]], list[list[list[str]]]]
"""Texts into each client's requests."""


def _lists(texts: list[str]) -> list[list[list[str]]]:
    return [[texts[start : start + LIST] for start in range(0, len(texts), LIST)]]


def _singles(texts: list[str]) -> list[list[list[str]]]:
    return [[[text] for text in texts[client::CLIENTS]] for client in range(CLIENTS)]


def _embed_all(num_texts: int, split: Split, server: Running, turn: int) -> dict[str, float]:
    writer = Writer(turn)
    _embed(server, [[[writer.text(4)]]])  # the model is loaded by its first request
    return _embed(server, split([writer.text(writer.between(8, 32)) for _ in range(num_texts)]))


def _embed(server: Running, asked: list[list[list[str]]]) -> dict[str, float]:
    """Each client's lists of texts, one request each. Raises RequestFailed when a vector is missing."""
    bodies: list[list[JSON]] = [
        [{"model": server.model, "input": texts if len(texts) > 1 else texts[0]} for texts in client]
        for client in asked
    ]
    answers, latencies, wall_s = post(server.base_url, PATH, bodies)
    num_texts = sum(len(texts) for client in asked for texts in client)
    num_vectors = sum(bool(item["embedding"]) for answer in answers for item in answer["data"])
    if num_vectors != num_texts:
        raise RequestFailed(f"{num_texts} texts were sent and {num_vectors} vectors came back")
    return {"texts_per_s": num_texts / wall_s, "latency_p50_s": percentile(latencies, 0.5)}


EMBEDDINGS = Scenario(
    "embeddings",
    "1,000 texts of 8 to 32 tokens through /v1/embeddings, on nomic's shape and on a 135 M decoder",
    measure,
    ("texts_per_s",),
)
