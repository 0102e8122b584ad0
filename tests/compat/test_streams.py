"""Streams are driven through the ASGI interface itself; real servers and clients are in each dialect's tests."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from compat.streams import NDJSONResponse, SSEResponse, sse_frame, while_connected
from engines.errors import Cancelled

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "asgi": {"spec_version": "2.3"}}


class Client:
    """The far end of one response: what it received, and when it leaves."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.left = asyncio.Event()
        self.heard = asyncio.Condition()

    async def receive(self) -> dict[str, str]:
        """ASGI: the hang-up, when it comes."""
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        """ASGI: one part of the response."""
        async with self.heard:
            self.messages.append(message)
            self.heard.notify_all()

    async def hear(self, num_messages: int) -> None:
        """Wait until so many messages have come."""
        async with self.heard:
            await self.heard.wait_for(lambda: len(self.messages) >= num_messages)

    @property
    def body(self) -> bytes:
        """What has come of the body."""
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def headers(self) -> dict[bytes, bytes]:
        """The response's headers."""
        return dict(self.messages[0]["headers"])


class Source:
    """Frames under the test's control, which remember whether they were closed and how."""

    def __init__(self, *frames: bytes) -> None:
        self.frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.num_read_interrupted = 0
        self.num_closed = 0
        for frame in frames:
            self.frames.put_nowait(frame)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            frame = await self.frames.get()
        except asyncio.CancelledError:
            self.num_read_interrupted += 1
            raise
        if frame is None:
            raise StopAsyncIteration
        return frame

    async def aclose(self) -> None:
        """Count how often we are closed."""
        self.num_closed += 1


async def test_sse_headers_are_those_that_proxies_and_clients_need() -> None:
    """An event stream is neither cached nor buffered and says its charset."""
    client = Client()
    source = Source()
    source.frames.put_nowait(None)
    await SSEResponse(source)(SCOPE, client.receive, client.send)
    assert client.headers == {
        b"content-type": b"text/event-stream; charset=utf-8",
        b"cache-control": b"no-cache",
        b"x-accel-buffering": b"no",
    }


async def test_ndjson_frames_pass_unchanged() -> None:
    """The body is the frames and nothing else."""
    client = Client()
    source = Source(b"{}\n", b"[]\n")
    source.frames.put_nowait(None)
    await NDJSONResponse(source)(SCOPE, client.receive, client.send)
    assert client.headers == {b"content-type": b"application/x-ndjson"}
    assert client.body == b"{}\n[]\n"
    assert client.messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_each_frame_is_sent_when_it_comes() -> None:
    """A frame reaches the client while the next one is still being made."""
    client, source = Client(), Source()
    response = asyncio.create_task(SSEResponse(source)(SCOPE, client.receive, client.send))
    source.frames.put_nowait(sse_frame(b"1"))
    await client.hear(2)
    assert client.body == b"data: 1\n\n"
    source.frames.put_nowait(None)
    await response


async def test_silence_is_filled_with_comments_without_disturbing_the_next_read() -> None:
    """Keep-alive comments come while a frame is awaited, and the same read then delivers the frame."""
    client, source = Client(), Source()
    response = asyncio.create_task(SSEResponse(source, keep_alive_s=0.01)(SCOPE, client.receive, client.send))
    await client.hear(4)
    source.frames.put_nowait(sse_frame(b"1"))
    source.frames.put_nowait(None)
    await response
    assert client.body.startswith(b": keep-alive\n\n: keep-alive\n\n")
    assert client.body.endswith(b"data: 1\n\n")
    assert source.num_read_interrupted == 0


async def test_a_busy_stream_has_no_comments() -> None:
    """Nothing is added while frames keep coming."""
    client, source = Client(), Source(*[sse_frame(b"1")] * 100)
    source.frames.put_nowait(None)
    await SSEResponse(source)(SCOPE, client.receive, client.send)
    assert client.body == b"data: 1\n\n" * 100


@pytest.mark.parametrize("kind", [NDJSONResponse, SSEResponse])
async def test_a_client_that_leaves_cancels_the_read_and_closes_the_source(kind: type) -> None:
    """A hang-up is noticed between frames, where nothing is being sent."""
    client, frames, source = Client(), Source(), Source()
    response = asyncio.create_task(kind(frames, source=source)(SCOPE, client.receive, client.send))
    await client.hear(1)
    client.left.set()
    await response
    assert (frames.num_read_interrupted, frames.num_closed, source.num_closed) == (1, 1, 1)


async def test_a_client_that_left_before_the_first_frame_still_closes_the_source() -> None:
    """A generator that never started cleans up nothing, so the source behind it is closed by name."""
    client, source = Client(), Source()
    client.left.set()

    async def frames() -> AsyncIterator[bytes]:
        async for frame in source:
            yield frame

    await SSEResponse(frames(), source=source)(SCOPE, client.receive, client.send)
    assert source.num_closed == 1


async def test_cleanup_behind_a_cancelled_stream_may_await() -> None:
    """A generator cut off by a hang-up can await as long as it needs to, for instance a commit."""
    client = Client()
    cleaned_up = False

    async def frames() -> AsyncIterator[bytes]:
        nonlocal cleaned_up
        try:
            yield b"1"
            await asyncio.Event().wait()
        finally:
            for _ in range(3):
                await asyncio.sleep(0)
            cleaned_up = True

    response = asyncio.create_task(SSEResponse(frames())(SCOPE, client.receive, client.send))
    await client.hear(2)
    client.left.set()
    await response
    assert cleaned_up


async def test_a_failing_source_is_closed_and_its_error_passes() -> None:
    """What a dialect did not render reaches the server, which closes the connection."""
    client, source = Client(), Source()

    async def frames() -> AsyncIterator[bytes]:
        yield b"1"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await SSEResponse(frames(), source=source)(SCOPE, client.receive, client.send)
    assert source.num_closed == 1
    assert client.messages[-1]["more_body"]


async def test_work_ends_when_its_client_leaves() -> None:
    """The work is cancelled and its cleanup awaited before `Cancelled` is raised."""
    client = Client()
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    waiting = asyncio.create_task(while_connected(client.receive, work()))
    await asyncio.sleep(0)
    client.left.set()
    with pytest.raises(Cancelled):
        await waiting
    assert ended == ["cleaned up"]


async def test_work_that_is_done_returns_or_raises_as_if_awaited() -> None:
    """Nothing is added to a result or an error."""

    async def answer(fails: bool) -> int:
        if fails:
            raise KeyError("x")
        return 42

    client = Client()
    assert await while_connected(client.receive, answer(fails=False)) == 42
    with pytest.raises(KeyError):
        await while_connected(client.receive, answer(fails=True))


async def test_cancelling_the_waiter_cancels_the_work() -> None:
    """A server that gives up on a request at the end of its grace time takes the work with it."""
    source = Source()

    async def work() -> bytes:
        return await anext(aiter(source))

    waiting = asyncio.create_task(while_connected(Client().receive, work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert source.num_read_interrupted == 1


def test_streams_leave_the_server_s_signal_handling_alone() -> None:
    """sse-starlette, which would replace uvicorn's handler, is not imported."""
    check = "import compat.streams, sys; sys.exit('sse_starlette' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
