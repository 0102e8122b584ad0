import json
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load import (
    OLLAMA,
    OPENAI,
    Answer,
    Dialect,
    Load,
    RequestFailed,
    percentile,
    read_answer,
    read_body,
)
from benchmarks.prompts import Writer
from engines.request import JSON

Stream = Callable[[list[str], int], bytes]


def ollama_stream(words: list[str], prompt_tokens: int) -> bytes:
    """What `/api/chat` streams, a word a chunk."""
    chunks: list[JSON] = [{"message": {"role": "assistant", "content": word}, "done": False} for word in words]
    counts = {"prompt_eval_count": prompt_tokens, "eval_count": len(words)}
    chunks.append({"message": {"role": "assistant", "content": ""}, "done": True} | counts)
    return b"".join(json.dumps(chunk).encode() + b"\n" for chunk in chunks)


def openai_stream(words: list[str], prompt_tokens: int) -> bytes:
    """What `/v1/chat/completions` streams, a word a chunk."""
    chunks: list[JSON] = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": None}]
    chunks += [{"choices": [{"index": 0, "delta": {"content": word}}], "usage": None} for word in words]
    chunks += [{"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(words)}}]
    lines = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"]
    return b"".join(f"data: {line}\n\n".encode() for line in lines)


STREAMS: list[tuple[Dialect, Stream]] = [(OLLAMA, ollama_stream), (OPENAI, openai_stream)]


@pytest.mark.parametrize(("dialect", "stream"), STREAMS, ids=["ollama", "openai"])
def test_token_counts_come_from_the_last_message(dialect: Dialect, stream: Stream) -> None:
    """Chunks are text with its time; counts are what the server says."""
    answer = read_answer(dialect, 1.0, [(2.0, stream(["a", "b"], 7))], 3.0)
    assert answer == Answer(1.0, (2.0, 2.0), 3.0, prompt_tokens=7, completion_tokens=2, text="ab")


@given(cuts=st.lists(st.integers(0, 400), max_size=12), which=st.sampled_from(STREAMS))
def test_a_line_arrives_with_the_piece_that_completes_it(cuts: list[int], which: tuple[Dialect, Stream]) -> None:
    """However the network cuts a stream, no chunk is lost and times never run backwards."""
    dialect, make_stream = which
    data = make_stream(["x"] * 5, 3)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [(float(i), data[a:b]) for i, (a, b) in enumerate(pairwise(edges))]
    answer = read_answer(dialect, -1.0, pieces, 99.0)
    assert len(answer.chunks) == 5
    assert list(answer.chunks) == sorted(answer.chunks)
    assert (answer.prompt_tokens, answer.completion_tokens) == (3, 5)


@pytest.mark.parametrize("line", [b'{"error":"boom"}\n', b'data: {"error":{"message":"boom"}}\n\n'])
def test_an_error_in_the_stream_fails_the_run(line: bytes) -> None:
    """A broken answer must not be measured as a short one."""
    dialect = OPENAI if line.startswith(b"data") else OLLAMA
    with pytest.raises(RequestFailed, match="boom"):
        read_answer(dialect, 0.0, [(1.0, line)], 2.0)


def chunked(*parts: bytes, status: bytes = b"200 OK") -> bytes:
    """A response as uvicorn streams it."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))
    return b"HTTP/1.1 " + status + b"\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n" + body


def test_a_body_keeps_its_arrival_times() -> None:
    """HTTP's framing is taken away and each piece keeps the time at which it came."""
    data = chunked(b"one", b"two")
    cut = data.index(b"two")
    assert read_body([(1.0, data[:cut]), (2.0, data[cut:])]) == [(1.0, b"one"), (2.0, b"two")]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (chunked(b"no such model", status=b"404 Not Found"), "no such model"),
        (chunked(b"one", b"two")[:-9], "broke"),
        (b"", "broke"),
        (b"SSH-2.0-OpenSSH\r\n", "no HTTP"),
    ],
    ids=["refused", "cut", "nothing", "not-http"],
)
def test_only_a_whole_answer_counts(data: bytes, said: str) -> None:
    """A refusal and a broken connection fail the run with what is known."""
    with pytest.raises(RequestFailed, match=said):
        read_body([(0.0, data)] if data else [])


def steady(start: float, count: int, gap: float, tokens_per_chunk: int = 1) -> Answer:
    """An answer sent at 0 whose chunks come at a steady pace, and whose stream ends a second after the last."""
    chunks = tuple(start + i * gap for i in range(count))
    return Answer(0.0, chunks, chunks[-1] + 1, 10, count * tokens_per_chunk)


def load_of(*answers: Answer) -> Load:
    """A run in which each client asked once."""
    return Load([[answer] for answer in answers], client_share=0.02)


def test_decode_counts_only_while_all_clients_decode() -> None:
    """Clients that start 5 s apart at 10 tokens/s each are 20 tokens/s together, however long one ran alone."""
    load = load_of(steady(1.0, 100, 0.1), steady(6.0, 100, 0.1))
    assert load.decode_tps == pytest.approx(20)
    numbers = load.numbers()
    assert numbers["wall_tps"] == pytest.approx(200 / 16.9)
    assert numbers["ttft_p50_s"] == pytest.approx(3.5)
    assert numbers["gap_p50_s"] == pytest.approx(0.1)
    assert load.completion_tokens == 200


def test_a_chunk_of_several_tokens_counts_as_several() -> None:
    """Servers may send two tokens in one chunk; the rate is in tokens."""
    assert load_of(steady(0.0, 50, 0.1, tokens_per_chunk=2)).decode_tps == pytest.approx(20)


def test_clients_that_never_decode_together_have_no_throughput() -> None:
    """A run too short to overlap is refused instead of being given a made-up number."""
    with pytest.raises(RequestFailed, match="more tokens"):
        _ = load_of(steady(0.0, 5, 0.1), steady(9.0, 5, 0.1)).decode_tps


def test_chunks_that_arrive_together_have_no_rate() -> None:
    """What came in one piece says nothing about how fast it was made."""
    assert Answer(0.0, (1.0, 1.0, 1.0), 2.0, 10, 3).rate_between(0.0, 9.0) == 0


def test_gaps_of_a_time_end_within_it() -> None:
    """What happened to others while a long prompt was read is told apart from before and after."""
    answer = Answer(0.0, (1.0, 2.0, 4.0, 7.0), 8.0, 10, 4)
    assert answer.gaps() == [1.0, 2.0, 3.0]
    assert answer.gaps(3.0, 5.0) == [2.0]


def test_a_percentile_is_one_of_the_values() -> None:
    """No value is made up between two that were measured."""
    assert percentile(range(101), 0.95) == 95
    assert percentile([7.0], 0.5) == 7.0
    assert percentile([1.0, 2.0], 0.95) == 2.0


def test_texts_differ_from_their_first_words_on() -> None:
    """No server can answer one prompt from the cached prefix of another, and a text's length is its words."""
    writer = Writer(1)
    texts = [writer.text(64) for _ in range(16)]
    assert {text.count(" ") for text in texts} == {64}
    assert len({text[:20] for text in texts}) == len(texts)
    assert Writer(1).text(64) == texts[0]
