"""Ollama's routes about its cloud and who is signed in there, as an Ollama answers whose cloud is disabled.

Clients ask them before they offer what only the cloud has (`spec/ollama.md` section 4). Nothing is asked of anybody.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from compat.ollama.transport import json_response, with_redirect
from engines.errors import HeadwaterError, RemoteModel


class SignedOut(HeadwaterError):
    """Nobody is signed in to Ollama's cloud, and nobody can."""

    status = 401
    code = "signed_out"


def account_routes() -> list[BaseRoute]:
    """Every route."""
    return [
        *with_redirect("/api/status", _status, "GET"),
        *with_redirect("/api/me", _me, "POST"),
        *with_redirect("/api/signout", _sign_out, "POST"),
        *with_redirect("/api/user/keys/{key}", _sign_out, "DELETE"),
        *with_redirect("/api/experimental/web_search", _web_search, "POST"),
        *with_redirect("/api/experimental/web_fetch", _web_fetch, "POST"),
        *with_redirect("/api/experimental/model-recommendations", _recommendations, "GET"),
    ]


async def _status(http: Request) -> Response:
    return json_response(b'{"cloud":{"disabled":true,"source":"config"}}')


async def _me(http: Request) -> Response:
    raise SignedOut("unauthorized")


async def _sign_out(http: Request) -> Response:
    raise SignedOut("you are not currently signed in")


async def _web_search(http: Request) -> Response:
    raise RemoteModel("web search is unavailable")


async def _web_fetch(http: Request) -> Response:
    raise RemoteModel("web fetch is unavailable")


async def _recommendations(http: Request) -> Response:
    return json_response(b'{"recommendations":[]}')
