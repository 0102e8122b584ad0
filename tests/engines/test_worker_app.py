from __future__ import annotations

import asyncio

import httpx

from engines.fake import FakeEngine, FakeGeneration
from engines.request import GenerateRequest, Message, Origin
from engines.wire import REQUEST_ID_HEADER, encode_request, path_of
from engines.worker import Worker

REQUEST = GenerateRequest(
    id="req_1", model="m", origin=Origin("ollama/completion", "gateway"), messages=(Message("user", "Hi"),)
)


class SlowToAdmit(FakeEngine):
    """An engine that is still busy with somebody else's prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()
        self.was_cancelled = False

    async def generate(self, request: GenerateRequest) -> FakeGeneration:
        """Wait for ever."""
        self.asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        raise AssertionError


async def test_a_request_can_be_cancelled_before_it_is_admitted() -> None:
    """The engine stops preparing it, its caller gets an answer, and there is no cost to tell."""
    engine = SlowToAdmit()
    app = Worker(engine, frozenset({"m"})).app()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://worker") as client:
        asking = asyncio.create_task(
            client.post(path_of(REQUEST), content=encode_request(REQUEST, "m"), headers={REQUEST_ID_HEADER: REQUEST.id})
        )
        await engine.asked.wait()
        assert (await client.post(f"/cancel/{REQUEST.id}")).status_code == 404
        answer = await asking
    assert engine.was_cancelled
    assert answer.status_code == 499
    assert answer.json()["error"]["code"] == "cancelled"
