"""What every handler of the Ollama dialect has around it: its route, and its errors in Ollama's shape.

Handlers answer their own errors in Ollama's shape, so the app around them needs no exception handler; only unknown
paths and methods never reach a handler and have `http_error_response`. A path with a trailing slash redirects to the
path without (`spec/ollama.md` section 1).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from compat.ollama.errors import ErrorReply, render_error
from compat.services import Refusal
from engines.errors import BadRequest, HeadwaterError

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


def with_redirect(path: str, handler: Handler, *methods: str) -> list[BaseRoute]:
    """The route, and one that sends the path with a trailing slash there."""
    return [route(path, handler, *methods), route(f"{path}/", _redirect, *methods)]


def route(path: str, handler: Handler, *methods: str) -> BaseRoute:
    """The handler at a path, for these methods and no others."""
    made = Route(path, endpoint(handler), methods=methods)
    made.methods = set(methods)  # Starlette answers HEAD wherever it answers GET; Ollama does not
    return made


def endpoint(handler: Handler) -> Handler:
    """The handler, its errors rendered in Ollama's shape."""

    async def answer(http: Request) -> Response:
        try:
            return await handler(http)
        except Exception as error:  # noqa: BLE001  the dialect's outermost edge: every request gets an answer
            http.state.refusal = Refusal.of(error)
            reply = report(error)
            return Response(reply.body, reply.status, reply.headers, media_type="application/json; charset=utf-8")

    return answer


def json_response(body: bytes) -> Response:
    """A successful reply."""
    return Response(body, media_type="application/json; charset=utf-8")


def http_error_response(http: Request, error: HTTPException) -> Response:
    """Starlette's 404 and 405, for paths that have no handler."""
    text = b"405 method not allowed" if error.status_code == 405 else b"404 page not found"
    return Response(text, error.status_code, {**(error.headers or {}), "Content-Type": "text/plain"})


def report(error: Exception) -> ErrorReply:
    """The error in Ollama's words; what we did not foresee is logged."""
    if not isinstance(error, HeadwaterError):
        logger.error("a request failed unexpectedly", exc_info=error)
    return render_error(error)


def required(name: str) -> str:
    """The name, which must be there."""
    if not name.strip():
        raise BadRequest("model is required", param="model")
    return name


async def _redirect(http: Request) -> Response:
    """To the path without its trailing slash; all but GET must be sent again as they are."""
    query = f"?{http.url.query}" if http.url.query else ""
    location = http.scope["path"].rstrip("/") + query
    return Response(status_code=301 if http.method == "GET" else 307, headers={"Location": location})
