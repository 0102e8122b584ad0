"""The Ollama dialect's handlers for the models on disk: create, copy, delete and blobs (`spec/ollama.md` section 7).

Progress is an object a line as long as the work goes on; what fails before the first of them has a real status.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from compat.body import decode_body
from compat.ollama.decode import decode_copy, decode_create, decode_delete
from compat.ollama.gojson import quote
from compat.ollama.manage import CopySourceMissing, parse_create, parse_delete, render_progress
from compat.ollama.transport import report, with_redirect
from compat.services import Library
from compat.streams import NDJSONResponse, aclose, while_connected
from engines.errors import BadRequest, Cancelled, InvalidModelName, ModelNotFound
from engines.library import Progress

logger = logging.getLogger(__name__)


class LibraryRoutes:
    """Ollama's routes over the house's library."""

    def __init__(self, library: Library, *, body_limit_bytes: int) -> None:
        self._library = library
        self._body_limit_bytes = body_limit_bytes

    def routes(self) -> list[BaseRoute]:
        """Every route."""
        return [
            *with_redirect("/api/create", self.create, "POST"),
            *with_redirect("/api/copy", self.copy, "POST"),
            *with_redirect("/api/delete", self.delete, "DELETE"),
            *with_redirect("/api/blobs/{digest}", self.blob, "HEAD", "POST"),
        ]

    async def create(self, http: Request) -> Response:
        """`POST /api/create`."""
        body = await decode_body(http, self._body_limit_bytes, decode_create)
        progress = await self._library.create(parse_create(body))
        return await progress_response(http, progress, stream=body.stream)

    async def copy(self, http: Request) -> Response:
        """`POST /api/copy`."""
        body = await decode_body(http, self._body_limit_bytes, decode_copy)
        try:
            await self._library.copy(body.source, body.destination)
        except InvalidModelName as error:
            which = "source" if error.name == body.source else "destination"
            raise BadRequest(f"{which} {quote(error.name)} is invalid", param=which) from None
        except ModelNotFound:
            raise CopySourceMissing(body.source) from None
        return Response()

    async def delete(self, http: Request) -> Response:
        """`DELETE /api/delete`."""
        body = await decode_body(http, self._body_limit_bytes, decode_delete)
        name = parse_delete(body)
        try:
            await self._library.delete(name)
        except InvalidModelName:
            raise BadRequest(f"name {quote(body.model or body.name)} is invalid", param="model") from None
        except ModelNotFound:
            raise ModelNotFound(body.model or body.name) from None
        return Response()

    async def blob(self, http: Request) -> Response:
        """`HEAD` and `POST /api/blobs/:digest`. The body is written to the disk as it comes, whatever its type."""
        digest = http.path_params["digest"]
        if http.method == "HEAD":
            return Response(status_code=200 if await self._library.has_blob(digest) else 404)
        try:
            is_new = await self._library.store_blob(digest, http.stream())
        except ClientDisconnect:
            raise Cancelled from None
        return Response(status_code=201 if is_new else 200)


async def progress_response(http: Request, progress: AsyncIterator[Progress], *, stream: bool) -> Response:
    """The steps as they come, or the last one alone. Raises what fails before the first."""
    try:
        if not stream:
            last = await while_connected(http.receive, _last(progress))
            return Response(render_progress(last), media_type="application/json")
        first = await while_connected(http.receive, _next(progress))
    except BaseException:
        await aclose(progress)
        raise
    return NDJSONResponse(_lines(first, progress), source=progress)


async def _next(progress: AsyncIterator[Progress]) -> Progress:
    return await anext(progress)


async def _last(progress: AsyncIterator[Progress]) -> Progress:
    last = Progress("success")
    async for step in progress:
        last = step
    return last


async def _lines(first: Progress, rest: AsyncIterator[Progress]) -> AsyncIterator[bytes]:
    """The steps, one object a line; a failure is one last line."""
    yield render_progress(first) + b"\n"
    try:
        async for step in rest:
            yield render_progress(step) + b"\n"
    except Exception as error:  # noqa: BLE001  the status is sent: the last line is the only place left to tell
        logger.warning("work on a model broke off: %s", error)
        yield report(error).body + b"\n"
