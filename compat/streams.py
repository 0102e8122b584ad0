"""Streamed responses, and work that ends when its client leaves.

Owns framing, keep-alive comments, noticing a hang-up and closing what fed the stream; the frames' contents are the
dialects'. We write our own small SSE response instead of using sse-starlette, for reasons verified in its 3.7 source
(`sse_starlette/sse.py`) and by measurement:

- Importing it replaces `uvicorn.Server.handle_exit`, and half a second after SIGTERM every running stream is cancelled
  with its chunked body incomplete, unless a per-response grace is set or a process-wide switch is thrown. Ours run on
  into the server's grace time.
- It wraps every frame in a cancel scope and a log call: 3 to 4.5 us a frame where this takes 0.3.
- Its separator is CRLF and its ping a `: ping` comment, at which Continue's reader breaks off its line loop
  (`spec/openai.md` section 3).

The surprise: both responses replace Starlette's `__call__`. Starlette cancels a stream through anyio, where every
later `await` is cancelled again, so that the cleanup behind the stream (recording usage, releasing a runner) could
not await anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from engines.errors import Cancelled

T = TypeVar("T")

_KEEP_ALIVE = b": keep-alive\n\n"


def sse_frame(data: bytes) -> bytes:
    r"""One server-sent event: `data: <data>\n\n`. `data` must be a single line, which JSON from msgspec is."""
    return b"data: " + data + b"\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and its cleanup awaited, when the client leaves first.

    The request's body must have been read before: `receive` then waits for the hang-up.

    Raises:
        Cancelled: the client left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working, leaving})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def aclose(iterator: AsyncIterator[Any]) -> None:
    """Close an iterator if it can be closed, as generators can: whatever it was waiting for is cancelled."""
    close = getattr(iterator, "aclose", None)
    if close is not None:
        await close()


class _LiveResponse(StreamingResponse):
    """Sends frames until they end or the client leaves, then closes where they came from.

    `source` is what feeds `frames`. It is closed too, because a generator that was never started, as `frames` is when
    the client leaves at once, runs none of its own cleanup.
    """

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        *,
        source: AsyncIterator[Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(frames, headers=headers)
        self._frames = frames
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self.stream_response(send))
        except Cancelled:
            pass  # nobody is left to tell
        finally:
            await aclose(self._frames)
            if self._source is not None:
                await aclose(self._source)


class NDJSONResponse(_LiveResponse):
    r"""One JSON object and `\n` per frame, as Ollama streams."""

    media_type = "application/x-ndjson"


class SSEResponse(_LiveResponse):
    """Server-sent events, with a comment after every `keep_alive_s` seconds of silence."""

    media_type = "text/event-stream"

    def __init__(
        self, frames: AsyncIterator[bytes], *, source: AsyncIterator[Any] | None = None, keep_alive_s: float = 15.0
    ) -> None:
        super().__init__(frames, source=source, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._keep_alive_s = keep_alive_s
        self._spoke_at = 0.0

    async def stream_response(self, send: Send) -> None:
        """Send the frames; a second task keeps the line alive, so the read of the next frame is never disturbed."""
        now = asyncio.get_running_loop().time
        self._spoke_at = now()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        keeping_alive = asyncio.create_task(self._keep_alive(send))
        try:
            async for frame in self._frames:
                self._spoke_at = now()
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        finally:
            keeping_alive.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        while True:
            silent_s = now() - self._spoke_at
            if silent_s >= self._keep_alive_s:
                self._spoke_at, silent_s = now(), 0.0
                await send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})
            await asyncio.sleep(self._keep_alive_s - silent_s)
