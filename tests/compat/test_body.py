"""Bodies are read through the ASGI interface itself, so that a test decides where the pieces are cut."""

import contextlib
import gzip
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from compat.body import read_body
from engines.errors import BadRequest, BodyTooLarge, Cancelled

LIMIT_BYTES = 1000


def request(*chunks: bytes, leaves: bool = False, **headers: str) -> Request:
    """A request whose body arrives in these pieces."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.disconnect"} if leaves else {"type": "http.request", "body": b""})
    arriving = iter(messages)

    async def receive() -> Any:
        return next(arriving)

    raw_headers = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw_headers}, receive)


async def test_pieces_are_joined() -> None:
    """A body in several pieces is read whole."""
    assert await read_body(request(b"one", b"", b"two"), LIMIT_BYTES) == b"onetwo"


async def test_a_body_of_exactly_the_limit_is_read() -> None:
    """The limit itself is allowed, plain and compressed."""
    body = b"x" * LIMIT_BYTES
    assert await read_body(request(body), LIMIT_BYTES) == body
    assert await read_body(request(gzip.compress(body), content_encoding="gzip"), LIMIT_BYTES) == body


async def test_a_declared_length_above_the_limit_is_refused_before_reading() -> None:
    """Content-Length alone is enough to refuse."""
    with pytest.raises(BodyTooLarge):
        await read_body(request(b"short", content_length=str(LIMIT_BYTES + 1)), LIMIT_BYTES)


async def test_a_body_that_outgrows_the_limit_is_refused_at_once() -> None:
    """Reading stops at the piece that passes the limit, however much would follow."""
    http = request(b"x" * 600, b"x" * 600, b"never read")
    with pytest.raises(BodyTooLarge):
        await read_body(http, LIMIT_BYTES)
    assert (await http.receive())["body"] == b"never read"


@pytest.mark.parametrize("length", ["", "-1", "\xb2", "1e9", "abc"])
async def test_a_strange_content_length_is_ignored(length: str) -> None:
    """A header that is no number neither crashes nor decides anything."""
    assert await read_body(request(b"{}", content_length=length), LIMIT_BYTES) == b"{}"


def raw_deflate(data: bytes) -> bytes:
    """Deflate without a header, as some clients send it."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "raw deflate": raw_deflate,
    "identity": bytes,
}


@pytest.mark.parametrize("encoding", ENCODERS)
@given(body=st.binary(max_size=LIMIT_BYTES), cut=st.integers(1, 64))
async def test_compressed_bodies_come_back_whole_wherever_they_are_cut(encoding: str, body: bytes, cut: int) -> None:
    """Every encoding is undone, with and without deflate's header, in pieces of any size."""
    data = ENCODERS[encoding](body)
    chunks = [data[start : start + cut] for start in range(0, len(data), cut)]
    http = request(*chunks, content_encoding=encoding.removeprefix("raw "))
    assert await read_body(http, 2 * LIMIT_BYTES) == body


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_bomb_is_refused_without_being_inflated(encoding: str) -> None:
    """A small body that would inflate to 100 MB is refused as too large."""
    bomb = ENCODERS[encoding](bytes(100_000_000))
    with pytest.raises(BodyTooLarge):
        await read_body(request(bomb, content_encoding=encoding), 200_000)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@given(data=st.binary(max_size=200))
async def test_damaged_data_is_a_bad_request(encoding: str, data: bytes) -> None:
    """Whatever is not the encoding it claims to be is refused and never crashes."""
    with contextlib.suppress(BadRequest, BodyTooLarge):
        await read_body(request(data, content_encoding=encoding), LIMIT_BYTES)


@pytest.mark.parametrize(
    "data",
    [b"", gzip.compress(b"{}", mtime=0)[:-1], gzip.compress(b"{}", mtime=0) + b"more"],
    ids=["no", "less", "more"],
)
async def test_truncated_and_trailing_data_is_a_bad_request(data: bytes) -> None:
    """Compressed data must be exactly one complete stream."""
    with pytest.raises(BadRequest):
        await read_body(request(data, content_encoding="gzip"), LIMIT_BYTES)


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "zstd"])
async def test_an_unknown_encoding_is_a_bad_request(encoding: str) -> None:
    """The message names the encoding."""
    with pytest.raises(BadRequest, match=encoding):
        await read_body(request(b"{}", content_encoding=encoding), LIMIT_BYTES)


async def test_a_client_that_leaves_while_sending_is_cancelled() -> None:
    """Starlette's own exception does not leave this module."""
    with pytest.raises(Cancelled):
        await read_body(request(b"{", leaves=True), LIMIT_BYTES)
