"""Load on a server: clients at once, each asking one thing after another, timed as its user sees the answers.

The machine that is measured is usually also this one, so bytes are only kept with their arrival times, and even HTTP is
read when all is over; through httpx a token costs as much processor time as it costs the gateway. `Load.client_share`
says what the clients took all the same. What is exact: token counts, which the server's last message gives. What is
not: a chunk is taken to carry an equal share of its answer's tokens.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import urlsplit

import httptools
import uvloop

from engines.request import JSON

Piece = tuple[float, bytes]
"""When some bytes arrived, and the bytes."""

LIMIT_S = 900.0
"""Of one run; a server that hangs fails the benchmark instead of stopping it."""


class RequestFailed(Exception):
    """The server refused or broke off; the message is its own."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One chat request for greedy tokens.

    Attributes:
        messages: role and content of each. tokens: how many to generate, which a model of random weights always does.
        at_s: not before this long after the run's beginning. client: the software it seems to come from.
    """

    messages: tuple[tuple[str, str], ...]
    tokens: int
    at_s: float = 0.0
    client: str = "headwater-benchmarks"


def ask(text: str, tokens: int, *, system: str = "", at_s: float = 0.0, client: str = "headwater-benchmarks") -> Ask:
    """A request of one user message, after a system message if there is one."""
    messages = (("system", system),) if system else ()
    return Ask((*messages, ("user", text)), tokens, at_s, client)


@dataclass(frozen=True, slots=True)
class Line:
    """What one line of a stream says: its text, and the token counts if it is the one that has them."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Dialect:
    """How to ask (`body` takes a model and a request), and how to read the answer."""

    name: str
    path: str
    body: Callable[[str, Ask], JSON]
    read: Callable[[bytes], Line]


def read_ollama(line: bytes) -> Line:
    """One NDJSON line of `/api/chat`. Raises RequestFailed for an error."""
    chunk = _decode(line)
    return Line(chunk["message"]["content"], chunk.get("prompt_eval_count", 0), chunk.get("eval_count", 0))


def read_openai(line: bytes) -> Line:
    """One SSE line of `/v1/chat/completions`. Raises RequestFailed for an error."""
    if not line.startswith(b"data: ") or line == b"data: [DONE]":
        return Line()
    chunk = _decode(line.removeprefix(b"data: "))
    usage = chunk.get("usage") or {}
    text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    return Line(text, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))


def _decode(data: bytes) -> Mapping[str, JSON]:
    chunk: Mapping[str, JSON] = json.loads(data)
    if "error" in chunk:
        raise RequestFailed(data.decode("utf-8", "replace"))
    return chunk


def _messages(request: Ask) -> list[JSON]:
    return [{"role": role, "content": content} for role, content in request.messages]


def _ollama_body(model: str, request: Ask) -> JSON:
    options = {"temperature": 0, "num_predict": request.tokens}
    return {"model": model, "messages": _messages(request), "stream": True, "options": options}


def _openai_body(model: str, request: Ask) -> JSON:
    return {
        "model": model,
        "messages": _messages(request),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": request.tokens,
    }


OLLAMA = Dialect("ollama", "/api/chat", _ollama_body, read_ollama)
OPENAI = Dialect("openai", "/v1/chat/completions", _openai_body, read_openai)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer in time: seconds from any one clock.

    Attributes:
        chunks: when each chunk with text arrived. ended: when the stream was over, its last message included.
    """

    sent: float
    chunks: tuple[float, ...]
    ended: float
    prompt_tokens: int
    completion_tokens: int
    text: str = ""

    @property
    def ttft_s(self) -> float:
        """Until the first text."""
        return self.chunks[0] - self.sent

    def gaps(self, start: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between chunks, of those gaps that end within the time from `start` to `end`."""
        return [after - before for before, after in pairwise(self.chunks) if start <= after <= end]

    def rate_between(self, start: float, end: float) -> float:
        """Tokens per second, over the whole gaps between chunks that arrived from `start` to `end`; 0 without any."""
        inside = [chunk for chunk in self.chunks if start <= chunk <= end]
        if len(inside) < 2 or inside[0] == inside[-1]:
            return 0.0
        tokens_per_chunk = self.completion_tokens / len(self.chunks)
        return (len(inside) - 1) * tokens_per_chunk / (inside[-1] - inside[0])


@dataclass(frozen=True, slots=True)
class Load:
    """What came of a run.

    Attributes:
        clients: each client's answers, in order. client_share: processor time of all clients, as a share of one core.
    """

    clients: list[list[Answer]]
    client_share: float

    @property
    def answers(self) -> list[Answer]:
        """Those of all clients."""
        return [answer for answers in self.clients for answer in answers]

    @property
    def wall_s(self) -> float:
        """From the first request sent to the last stream's end."""
        return max(answer.ended for answer in self.answers) - min(answer.sent for answer in self.answers)

    @property
    def completion_tokens(self) -> int:
        """Of all answers."""
        return sum(answer.completion_tokens for answer in self.answers)

    @property
    def decode_tps(self) -> float:
        """Tokens per second of all first answers together while all of them are being generated.

        That is from the last client's first token to the first client's last one, so prefill is left out, as in
        `benchmarks.bare`.

        Raises:
            RequestFailed: there was no such moment.
        """
        firsts = [answers[0] for answers in self.clients]
        start = max(answer.chunks[0] for answer in firsts)
        end = min(answer.chunks[-1] for answer in firsts)
        if start >= end:
            raise RequestFailed("the clients never decoded all at once; ask for more tokens")
        return sum(answer.rate_between(start, end) for answer in firsts)

    def numbers(self) -> dict[str, float]:
        """What its users saw: throughput over the whole run, time to first text, gaps between chunks."""
        ttfts = [answer.ttft_s for answer in self.answers]
        gaps = [gap for answer in self.answers for gap in answer.gaps()] or [0.0]
        return {
            "wall_tps": self.completion_tokens / self.wall_s,
            "ttft_p50_s": statistics.median(ttfts),
            "ttft_p95_s": percentile(ttfts, 0.95),
            "gap_p50_s": statistics.median(gaps),
            "gap_p95_s": percentile(gaps, 0.95),
            "client_share": self.client_share,
        }


def percentile(values: Iterable[float], share: float) -> float:
    """The least of the values that at least the given share of them does not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def run_load(
    base_url: str,
    dialect: Dialect,
    model: str,
    clients: Sequence[Sequence[Ask]],
    background: Sequence[Iterator[Ask]] = (),
) -> Load:
    """One client for each list of requests, all at once, each asking one after another on new connections.

    Those in the background go on until the others are done; their answers come last.

    Raises:
        RequestFailed: a request was refused, broke off, or ended before the tokens that were asked for.
    """
    used, began = time.process_time(), time.perf_counter()
    exchanges = uvloop.run(asyncio.wait_for(_run(base_url, dialect, model, clients, background), LIMIT_S))
    share = (time.process_time() - used) / (time.perf_counter() - began)
    answers = [[_read_exchange(dialect, *exchange) for exchange in client] for client in exchanges]
    return Load(answers, share)


Exchange = tuple[Ask, float, list[Piece], float]
"""What was asked, when, everything that came back, and when the server hung up."""


async def _run(
    base_url: str,
    dialect: Dialect,
    model: str,
    clients: Sequence[Sequence[Ask]],
    background: Sequence[Iterator[Ask]],
) -> list[list[Exchange]]:
    began = time.perf_counter()
    over = False

    async def client(requests: Iterable[Ask]) -> list[Exchange]:
        done = []
        for request in requests:
            await asyncio.sleep(request.at_s - (time.perf_counter() - began))
            body = json.dumps(dialect.body(model, request)).encode()
            done.append((request, *await exchange(base_url, dialect.path, body, request.client)))
        return done

    def until_over(requests: Iterator[Ask]) -> Iterator[Ask]:
        while not over:
            yield next(requests)

    behind = [asyncio.ensure_future(client(until_over(requests))) for requests in background]
    before = await asyncio.gather(*(client(requests) for requests in clients))
    over = True
    return [*before, *await asyncio.gather(*behind)]


async def exchange(base_url: str, path: str, body: bytes, client: str = "") -> tuple[float, list[Piece], float]:
    """Post a body on a new connection: when it was sent, everything that came back, and when the server hung up."""
    url = urlsplit(base_url)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\nUser-Agent: {client}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    assert url.hostname is not None
    try:
        transport, received = await loop.create_connection(
            lambda: _Receiver(loop.create_future()), url.hostname, url.port or 80
        )
    except OSError as error:
        raise RequestFailed(f"{base_url} does not answer: {error}") from error
    try:
        sent = time.perf_counter()
        transport.write(head.encode() + body)
        await received.closed
        return sent, received.pieces, time.perf_counter()
    finally:
        transport.close()


class _Receiver(asyncio.Protocol):
    """Keeps what arrives; the cheapest that asyncio has."""

    def __init__(self, closed: asyncio.Future[None]) -> None:
        self.closed = closed
        self.pieces: list[Piece] = []

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


def post(base_url: str, path: str, bodies: Sequence[Sequence[JSON]]) -> tuple[list[JSON], list[float], float]:
    """Whole answers instead of streams: one client for each list of bodies, one after another.

    Returns:
        The answers, how long each took, and how long all of them did, in seconds.

    Raises:
        RequestFailed: one of them was refused or broke off.
    """
    encoded = [[json.dumps(body).encode() for body in client] for client in bodies]

    async def client(own: Sequence[bytes]) -> list[tuple[float, list[Piece], float]]:
        return [await exchange(base_url, path, body) for body in own]

    async def run() -> list[list[tuple[float, list[Piece], float]]]:
        return await asyncio.gather(*(client(own) for own in encoded))

    began = time.perf_counter()
    exchanges = [each for own in uvloop.run(asyncio.wait_for(run(), LIMIT_S)) for each in own]
    wall_s = time.perf_counter() - began
    answers = [json.loads(b"".join(data for _, data in read_body(pieces))) for _, pieces, _ in exchanges]
    return answers, [ended - sent for sent, _, ended in exchanges], wall_s


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


def _read_exchange(dialect: Dialect, request: Ask, sent: float, pieces: Sequence[Piece], ended: float) -> Answer:
    answer = read_answer(dialect, sent, read_body(pieces), ended)
    if answer.completion_tokens != request.tokens or not answer.chunks:
        raise RequestFailed(f"{request.tokens} tokens were asked for and {answer.completion_tokens} came")
    return answer


def read_answer(dialect: Dialect, sent: float, pieces: Sequence[Piece], ended: float) -> Answer:
    """What the pieces of a stream amount to. A line arrives with the piece that completes it."""
    chunks: list[float] = []
    texts: list[str] = []
    prompt_tokens = completion_tokens = 0
    rest = b""
    for arrived, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in (dialect.read(text) for text in map(bytes.strip, lines) if text):
            if line.text:
                chunks.append(arrived)
                texts.append(line.text)
            prompt_tokens = line.prompt_tokens or prompt_tokens
            completion_tokens = line.completion_tokens or completion_tokens
    return Answer(sent, tuple(chunks), ended, prompt_tokens, completion_tokens, "".join(texts))
