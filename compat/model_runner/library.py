"""Docker Model Runner's handlers for models on disk: `POST /models/create` (`spec/model-runner.md` section 11.2)."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from compat.body import decode_body
from compat.model_runner.pull import Report, decode_create, explain, reference, speaks_http
from compat.services import Library, Refusal, Services
from compat.streams import NDJSONResponse, aclose, while_connected
from engines.errors import HeadwaterError
from engines.library import Progress

logger = logging.getLogger(__name__)


class ModelRunnerLibraryRoutes:
    """Pulls, by the machinery that everybody's pulls go through: a model may be on its way for others already."""

    def __init__(self, services: Services, library: Library, *, body_limit_bytes: int) -> None:
        self._services = services
        self._library = library
        self._body_limit_bytes = body_limit_bytes

    def routes(self) -> list[BaseRoute]:
        """Every route."""
        return [Route("/models/create", self.create, methods=["POST"])]

    async def create(self, http: Request) -> Response:
        """Pull a model. What fails before anything is fetched has a real status, later a last line."""
        try:
            return await self._create(http)
        except Exception as error:  # the dialect's outermost edge: every request gets an answer
            if not isinstance(error, HeadwaterError):
                logger.error("a pull failed unexpectedly", exc_info=error)
            http.state.refusal = Refusal.of(error)
            status, text = explain(error)
            return PlainTextResponse(f"{text}\n", status)

    async def _create(self, http: Request) -> Response:
        body = await decode_body(http, self._body_limit_bytes, decode_create)
        name = reference(body.base)
        wants_json = http.headers.get("accept", "") == "application/json"
        report = Report(was_here=await self._is_here(name), escapes=not wants_json)
        steps = await self._library.pull(name, insecure=speaks_http(name), token=body.token)
        try:
            first = await while_connected(http.receive, _first(report, steps))
        except BaseException:
            await aclose(steps)
            raise
        response = NDJSONResponse(_lines(first, report, steps), source=steps)
        response.headers["Content-Type"] = "application/json" if wants_json else "text/plain; charset=utf-8"
        return response

    async def _is_here(self, name: str) -> bool:
        try:
            await self._services.find(name)
        except HeadwaterError:
            return False
        return True


async def _first(report: Report, steps: AsyncIterator[Progress]) -> bytes:
    """The first line that there is something to say in."""
    async for step in steps:
        if (line := report.line(step)) is not None:
            return line
    return b""


async def _lines(first: bytes, report: Report, steps: AsyncIterator[Progress]) -> AsyncIterator[bytes]:
    yield first
    try:
        async for step in steps:
            if (line := report.line(step)) is not None:
                yield line
    except Exception as error:  # noqa: BLE001  the status is sent: the last lines are the only place left to tell
        logger.warning("a pull broke off: %s", error)
        yield report.failure(error)
