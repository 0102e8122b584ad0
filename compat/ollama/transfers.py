"""The Ollama dialect's handlers for registries: `/api/pull` and `/api/push` (`spec/ollama.md` sections 7.2 and 7.3)."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from compat.body import decode_body
from compat.ollama.decode import decode_pull, decode_push
from compat.ollama.library import progress_response
from compat.ollama.names import refuse_cloud
from compat.ollama.transport import required, with_redirect
from compat.services import Library


class TransferRoutes:
    """Models to and from registries. A client that leaves is one caller less for what it was waiting for."""

    def __init__(self, library: Library, *, body_limit_bytes: int) -> None:
        self._library = library
        self._body_limit_bytes = body_limit_bytes

    def routes(self) -> list[BaseRoute]:
        """Every route."""
        return [
            *with_redirect("/api/pull", self.pull, "POST"),
            *with_redirect("/api/push", self.push, "POST"),
        ]

    async def pull(self, http: Request) -> Response:
        """`POST /api/pull`."""
        body = await decode_body(http, self._body_limit_bytes, decode_pull)
        name = body.model or body.name
        refuse_cloud(name)
        progress = await self._library.pull(name, insecure=body.insecure)
        return await progress_response(http, progress, stream=body.stream)

    async def push(self, http: Request) -> Response:
        """`POST /api/push`."""
        body = await decode_body(http, self._body_limit_bytes, decode_push)
        name = required(body.model or body.name)
        progress = await self._library.push(name, insecure=body.insecure)
        return await progress_response(http, progress, stream=body.stream)
