"""The optional `/exp/vDD4.40` before a path, as Docker Desktop's clients send it (`spec/model-runner.md` section 1)."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

PREFIX = "/exp/vDD4.40"


class StripPrefix:
    """ASGI middleware: the app below sees `path` and `raw_path` without the prefix."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Strip the prefix, if it is there, and pass the request on."""
        if scope["type"] in ("http", "websocket") and scope["path"].startswith(f"{PREFIX}/"):
            raw_path: bytes = scope.get("raw_path") or b""
            scope = dict(scope) | {
                "path": scope["path"].removeprefix(PREFIX),
                "raw_path": raw_path.removeprefix(PREFIX.encode()),
            }
        await self._app(scope, receive, send)
