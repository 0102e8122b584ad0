"""Load on a server: N clients at once, each streaming one greedy answer, timed as its user sees it.

The machine that is measured is usually also this one, so bytes are only kept with their arrival times, and even HTTP is
read when all is over; through httpx a token costs as much processor time as it costs the gateway. What is exact: token
counts, which the server's last message gives. What is not: a chunk is taken to carry an equal share of its answer's
tokens.

Decode throughput is measured while all N clients decode together, from the last client's first token to the first
client's last one, as the sum of what each client gets in between. So prefill is left out, as in `benchmarks.bare`.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import string
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import urlsplit

import httptools

from engines.request import JSON

Piece = tuple[float, bytes]
"""When some bytes arrived, and the bytes."""

LIMIT_S = 600.0
"""Of one run; a server that hangs fails the benchmark instead of stopping it."""


class RequestFailed(Exception):
    """The server refused or broke off; the message is its own."""


@dataclass(frozen=True, slots=True)
class Line:
    """What one line of a stream says: whether it carries text, and the token counts if it is the one that has them."""

    has_text: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Dialect:
    """How to ask for greedy tokens (`body` takes model, prompt, tokens), and how to read the answer."""

    name: str
    path: str
    body: Callable[[str, str, int], JSON]
    read: Callable[[bytes], Line]


def read_ollama(line: bytes) -> Line:
    """One NDJSON line of `/api/chat`. Raises RequestFailed for an error."""
    chunk = _decode(line)
    return Line(bool(chunk["message"]["content"]), chunk.get("prompt_eval_count", 0), chunk.get("eval_count", 0))


def read_openai(line: bytes) -> Line:
    """One SSE line of `/v1/chat/completions`. Raises RequestFailed for an error."""
    if not line.startswith(b"data: ") or line == b"data: [DONE]":
        return Line()
    chunk = _decode(line.removeprefix(b"data: "))
    usage = chunk.get("usage") or {}
    has_text = any(choice["delta"].get("content") for choice in chunk["choices"])
    return Line(has_text, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))


def _decode(data: bytes) -> Mapping[str, JSON]:
    chunk: Mapping[str, JSON] = json.loads(data)
    if "error" in chunk:
        raise RequestFailed(data.decode("utf-8", "replace"))
    return chunk


def _ollama_body(model: str, prompt: str, tokens: int) -> JSON:
    options = {"temperature": 0, "num_predict": tokens}
    return {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True, "options": options}


def _openai_body(model: str, prompt: str, tokens: int) -> JSON:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": tokens,
    }


OLLAMA = Dialect("ollama", "/api/chat", _ollama_body, read_ollama)
OPENAI = Dialect("openai", "/v1/chat/completions", _openai_body, read_openai)


def make_prompts(count: int, length: int, seed: int) -> list[str]:
    """Distinct prompts of `length` characters, from their first one on as good as unrelated.

    With the models of `benchmarks.models` a character is a token; the chat template adds a few more.
    """
    letters = random.Random(seed)
    return ["".join(letters.choices(string.ascii_lowercase, k=length)) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Answer:
    """One client's answer in time: seconds from any one clock.

    Attributes:
        chunks: when each chunk with text arrived. ended: when the stream was over, its last message included.
    """

    sent: float
    chunks: tuple[float, ...]
    ended: float
    prompt_tokens: int
    completion_tokens: int

    def rate_between(self, start: float, end: float) -> float:
        """Tokens per second, over the whole gaps between chunks that arrived from `start` to `end`; 0 without any."""
        inside = [chunk for chunk in self.chunks if start <= chunk <= end]
        if len(inside) < 2:
            return 0.0
        tokens_per_chunk = self.completion_tokens / len(self.chunks)
        return (len(inside) - 1) * tokens_per_chunk / (inside[-1] - inside[0])


@dataclass(frozen=True, slots=True)
class LoadRates:
    """What the clients saw: tokens per second of all together, and seconds.

    Attributes:
        decode_tps: while all decode, see the module. wall_tps: from the first request sent to the last stream's end.
        ttft_s, gap_p50_s, gap_p95_s: until the first text (median), and between chunks of one client.
    """

    decode_tps: float
    wall_tps: float
    ttft_s: float
    gap_p50_s: float
    gap_p95_s: float
    prompt_tokens: int
    completion_tokens: int


def summarize(answers: Sequence[Answer]) -> LoadRates:
    """Rates and percentiles of answers that ran together.

    Raises:
        RequestFailed: an answer has no text, or there was no moment when all were decoding.
    """
    if not all(answer.chunks for answer in answers):
        raise RequestFailed("an answer has no text")
    start = max(answer.chunks[0] for answer in answers)
    end = min(answer.chunks[-1] for answer in answers)
    if start >= end:
        raise RequestFailed("the clients never decoded all at once; ask for more tokens")
    gaps = sorted(after - before for answer in answers for before, after in pairwise(answer.chunks))
    wall_s = max(answer.ended for answer in answers) - min(answer.sent for answer in answers)
    completion_tokens = sum(answer.completion_tokens for answer in answers)
    return LoadRates(
        decode_tps=sum(answer.rate_between(start, end) for answer in answers),
        wall_tps=completion_tokens / wall_s,
        ttft_s=statistics.median(answer.chunks[0] - answer.sent for answer in answers),
        gap_p50_s=statistics.median(gaps),
        gap_p95_s=gaps[int(0.95 * (len(gaps) - 1))],
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        completion_tokens=completion_tokens,
    )


async def run_load(base_url: str, dialect: Dialect, model: str, prompts: Sequence[str], tokens: int) -> list[Answer]:
    """One client for each prompt, each with a connection of its own, all at once.

    Raises:
        RequestFailed: one of them was refused or broke off.
    """
    url = urlsplit(base_url)
    assert url.hostname is not None
    bodies = [json.dumps(dialect.body(model, prompt, tokens)).encode() for prompt in prompts]
    asking = [_ask(url.hostname, url.port or 80, dialect.path, body) for body in bodies]
    exchanges = await asyncio.wait_for(asyncio.gather(*asking), LIMIT_S)
    return [read_answer(dialect, sent, read_body(received), ended) for sent, received, ended in exchanges]


async def _ask(host: str, port: int, path: str, body: bytes) -> tuple[float, list[Piece], float]:
    """When the request was sent, everything that came back, and when the server hung up."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    try:
        sent = time.perf_counter()
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = []
        while data := await reader.read(1 << 16):
            received.append((time.perf_counter(), data))
        return sent, received, time.perf_counter()
    finally:
        writer.close()


class _Response:
    """What httptools finds in a response; it calls these methods."""

    def __init__(self) -> None:
        self.body: list[Piece] = []
        self.arrived = 0.0
        self.is_complete = False

    def on_body(self, data: bytes) -> None:
        self.body.append((self.arrived, data))

    def on_message_complete(self) -> None:
        self.is_complete = True


def read_body(received: Sequence[Piece]) -> list[Piece]:
    """The body in what was received, without HTTP's framing. Raises RequestFailed unless it is a whole 200."""
    response = _Response()
    parser = httptools.HttpResponseParser(response)
    try:
        for response.arrived, data in received:
            parser.feed_data(data)
    except httptools.HttpParserError as error:
        raise RequestFailed(f"the response is no HTTP: {error}") from error
    if not response.is_complete:
        raise RequestFailed("the connection broke before the answer's end")
    if parser.get_status_code() != 200:
        raise RequestFailed(b"".join(data for _, data in response.body).decode("utf-8", "replace"))
    return response.body


def read_answer(dialect: Dialect, sent: float, pieces: Sequence[Piece], ended: float) -> Answer:
    """What the pieces of a stream amount to. A line arrives with the piece that completes it."""
    chunks: list[float] = []
    prompt_tokens = completion_tokens = 0
    rest = b""
    for arrived, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in (dialect.read(text) for text in map(bytes.strip, lines) if text):
            if line.has_text:
                chunks.append(arrived)
            prompt_tokens = line.prompt_tokens or prompt_tokens
            completion_tokens = line.completion_tokens or completion_tokens
    return Answer(sent, tuple(chunks), ended, prompt_tokens, completion_tokens)
