"""Several prompts of one completion, answered side by side as if they were one (`spec/openai.md` section 5).

The surprise: the answers are read as fast as they come and queued here without bound. With backpressure, an answer
that nobody reads yet could hold the slot that a later prompt needs to be admitted; and no answer outgrows a context.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterable, Sequence

from compat.openai.logprobs import EchoDelta
from compat.services import Services
from compat.streams import aclose
from engines.errors import HeadwaterError
from engines.events import Event, Finished, PromptEcho, Usage
from engines.request import GenerateRequest


async def generate_all(services: Services, requests: Sequence[GenerateRequest]) -> AsyncIterator[Event]:
    """The events of all requests as one answer; choice s of request p has the index `p * num_choices + s`.

    A prompt that is to be echoed comes as the first piece of each of its choices. Returns once every request has been
    admitted. When one fails, before or after that, the others are cancelled.
    """
    if len(requests) == 1 and not requests[0].echo:
        return await services.generate(requests[0])
    batch = Batch(services, requests)
    try:
        await batch.admitted
    except BaseException:
        await batch.aclose()
        raise
    return batch


class Batch:
    """Runs each request in a task of its own and hands out their events as they come."""

    def __init__(self, services: Services, requests: Sequence[GenerateRequest]) -> None:
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._services = services
        self._num_waiting = len(requests)
        self._finished: dict[int, Finished] = {}
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._over = False
        self._tasks = [asyncio.create_task(self._run(position, request)) for position, request in enumerate(requests)]

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._over:
            raise StopAsyncIteration
        event = await self._events.get()
        self._over = isinstance(event, (Finished, Exception))
        if isinstance(event, Exception):
            raise event
        return event

    async def aclose(self) -> None:
        """Cancel what still runs and wait for its cleanup."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _run(self, position: int, request: GenerateRequest) -> None:
        try:
            events = await self._services.generate(request)
            try:
                self._admit()
                async for event in events:
                    self._take(position, request.num_choices, event)
            finally:
                await aclose(events)
            if position not in self._finished:
                raise HeadwaterError("the answer ended without its last event")
        except Exception as error:  # noqa: BLE001  not handled here: whoever waits for the batch gets it
            self._fail(error)

    def _admit(self) -> None:
        self._num_waiting -= 1
        if self._num_waiting == 0 and not self.admitted.done():
            self.admitted.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self.admitted.done():
            self._events.put_nowait(error)
        else:
            self.admitted.set_exception(error)

    def _take(self, position: int, num_choices: int, event: Event) -> None:
        first = position * num_choices
        if isinstance(event, PromptEcho):
            for index in range(first, first + num_choices):
                self._events.put_nowait(EchoDelta(event.text, index, event.logprobs))
            return
        if not isinstance(event, Finished):
            self._events.put_nowait(dataclasses.replace(event, index=first + event.index))
            return
        self._finished[position] = event
        if len(self._finished) == len(self._tasks):
            total = sum_usage(finished.usage for finished in self._finished.values())
            self._events.put_nowait(dataclasses.replace(self._finished[0], usage=total))


def sum_usage(usages: Iterable[Usage]) -> Usage:
    """Field by field."""
    columns = zip(*(dataclasses.astuple(usage) for usage in usages), strict=True)
    return Usage(*(sum(column) for column in columns))
