"""A request's body: read in pieces, inflated when it was compressed, and never larger than the limit.

Owns Content-Length, Content-Encoding and the limit; what the bytes mean is left to each dialect. The limit counts
inflated bytes, and inflating stops there, so a small bomb is refused as cheaply as a large body.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request

from engines.errors import BadRequest, BodyTooLarge, Cancelled

T = TypeVar("T")

LARGE_BYTES = 256 * 1024

_GZIP_WBITS = zlib.MAX_WBITS | 16
_RAW_DEFLATE_WBITS = -zlib.MAX_WBITS


async def decode_body(http: Request, limit_bytes: int, decode: Callable[[bytes], T]) -> T:
    """The body, decoded; a large one in a thread, so that it does not stop everybody else's streams.

    Raises:
        BodyTooLarge, BadRequest, Cancelled: as `read_body`, and whatever `decode` raises.
    """
    body = await read_body(http, limit_bytes)
    if len(body) < LARGE_BYTES:
        return decode(body)
    return await asyncio.to_thread(decode, body)


async def read_body(http: Request, limit_bytes: int) -> bytes:
    """The whole body, decoded.

    Raises:
        BodyTooLarge: declared, received or inflated it is larger than `limit_bytes`.
        BadRequest: the encoding is unknown or the compressed data is damaged.
        Cancelled: the client left before the body was complete.
    """
    declared = http.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise BodyTooLarge(limit_bytes)
    decoder = _decoder(http.headers.get("content-encoding", ""))
    body = bytearray()
    received = 0
    try:
        async for chunk in http.stream():
            received += len(chunk)
            body += decoder.decode(chunk, limit_bytes - len(body) + 1)
            if received > limit_bytes or len(body) > limit_bytes:
                raise BodyTooLarge(limit_bytes)
    except ClientDisconnect:
        raise Cancelled from None
    decoder.finish()
    return bytes(body)


class _Decoder(Protocol):
    def decode(self, chunk: bytes, max_bytes: int) -> bytes:
        """The next decoded bytes, at most `max_bytes`; the caller gives up when it gets that many."""

    def finish(self) -> None:
        """Raises BadRequest when the data is incomplete."""


def _decoder(encoding: str) -> _Decoder:
    match encoding.strip().lower():
        case "" | "identity":
            return _Identity()
        case "gzip" | "x-gzip":
            return _Inflate("gzip", _GZIP_WBITS)
        case "deflate":
            return _Inflate("deflate", None)
        case _:
            raise BadRequest(f"unsupported Content-Encoding {encoding!r}: use gzip, deflate or none")


class _Identity:
    def decode(self, chunk: bytes, max_bytes: int) -> bytes:
        return chunk

    def finish(self) -> None:
        pass


class _Inflate:
    """gzip or deflate. `wbits` None: decided by the first byte, because "deflate" is sent with and without a header."""

    def __init__(self, encoding: str, wbits: int | None) -> None:
        self._encoding = encoding
        self._inflater = None if wbits is None else zlib.decompressobj(wbits)

    def decode(self, chunk: bytes, max_bytes: int) -> bytes:
        if not chunk:
            return b""
        if self._inflater is None:
            # A zlib header's low nibble is always 8; raw deflate would need non-zero padding bits to begin so.
            has_header = chunk[0] & 0x0F == 8
            self._inflater = zlib.decompressobj(zlib.MAX_WBITS if has_header else _RAW_DEFLATE_WBITS)
        try:
            decoded = self._inflater.decompress(chunk, max_bytes)
        except zlib.error as error:
            raise self._damaged() from error
        if self._inflater.unused_data:
            raise self._damaged()
        return decoded

    def finish(self) -> None:
        if self._inflater is None or not self._inflater.eof:
            raise self._damaged()

    def _damaged(self) -> BadRequest:
        return BadRequest(f"the request body is not valid {self._encoding} data")
