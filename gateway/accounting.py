"""One account for each inference request, opened at arrival and settled exactly once, whatever its end.

The middleware opens it, `dispatch` settles it when the engine is done, and what nobody settled (a body that does not
parse, a browser turned away, a caller who left the queue) the middleware settles when the response ends. A settled
account is in the ledger before the last byte leaves. The surprise: settling runs as a task of its own, so that a caller
who leaves at the wrong moment cannot tear it in half.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from compat.services import Refusal
from engines.errors import Cancelled
from engines.events import FinishReason, Timings, Usage
from engines.request import AnyRequest, GenerateRequest, Mode, Origin
from engines.wire import ORIGIN_HEADER, REQUEST_ID_HEADER
from gateway.logs import request_context
from gateway.metrics import Metrics
from gateway.origin import OriginResolver, render_origin
from gateway.usage.ledger import Ledger
from gateway.usage.record import REFUSED, UsageRecord

log = logging.getLogger(__name__)

CLIENT_GONE = 499  # nginx's status for a client that closed the connection


@dataclass(slots=True, eq=False)
class Account:
    """What is known of one request so far."""

    id: str
    origin: Origin
    route: str
    started_at: float
    arrived: float
    model: str = ""
    model_digest: str = ""
    backend: str = ""
    mode: str = ""
    stream: bool = False
    error_code: str = ""
    is_waiting: bool = False
    settling: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def elapsed_s(self) -> float:
        """Seconds since arrival."""
        return time.monotonic() - self.arrived


class Accounts:
    """The open accounts, and the way from there into ledger and metrics."""

    def __init__(self, ledger: Ledger, metrics: Metrics) -> None:
        self._ledger = ledger
        self._metrics = metrics
        self._open: dict[str, Account] = {}
        self._settling: set[asyncio.Task[None]] = set()

    def open(self, account: Account) -> None:
        """Start an account."""
        self._open[account.id] = account

    def claim(self, request: AnyRequest, *, mode: Mode) -> Account:
        """The account of a request that is about to be served.

        One HTTP request may hold several prompts, each a request of its own with its own id and account.
        """
        account = self._open.get(request.id)
        if account is None:
            parent = self._open.get(request.id.partition("-")[0])
            now = time.monotonic()
            account = Account(
                id=request.id,
                origin=request.origin,
                route=parent.route if parent else "",
                started_at=parent.started_at if parent else time.time(),
                arrived=parent.arrived if parent else now,
            )
            self.open(account)
        account.model, account.mode = request.model, mode.value
        account.stream = isinstance(request, GenerateRequest) and request.stream
        return account

    async def settle(
        self,
        account: Account,
        *,
        status: int,
        reason: str,
        usage: Usage | None = None,
        timings: Timings | None = None,
        wasted_tokens: int = 0,
    ) -> None:
        """Put the request on record, once; returns when the row is committed. Later calls wait for the first."""
        if account.settling is None:
            record = UsageRecord(
                id=account.id,
                started_at=account.started_at,
                origin=account.origin,
                route=account.route,
                model=account.model,
                model_digest=account.model_digest,
                backend=account.backend,
                mode=account.mode,
                status=status,
                finish_reason=reason,
                error_code=_error_code(account, status),
                stream=account.stream,
                usage=usage or Usage(),
                wasted_tokens=wasted_tokens,
                timings=replace(timings or Timings(), total_s=account.elapsed_s),
            )
            account.settling = asyncio.create_task(self._record(record))
            self._settling.add(account.settling)
            account.settling.add_done_callback(self._settling.discard)
            self._open.pop(account.id, None)
        await asyncio.shield(account.settling)

    async def _record(self, record: UsageRecord) -> None:
        self._metrics.observe(record)
        await self._ledger.record(record)
        log.info(
            "%s %s %d %s %d+%d tokens %.3f s",
            record.route, record.model[:80] or "-", record.status, record.finish_reason,
            record.usage.prompt_tokens, record.usage.completion_tokens, record.timings.total_s,
        )  # fmt: skip
        if cut := record.usage.truncated_tokens:
            # An answer to half a prompt looks like a bad model's, and what filled it, often tools, the user never saw.
            log.warning(
                "%s had no room for %d of %d prompt tokens in its context",
                record.model[:80], cut, cut + record.usage.prompt_tokens,
            )  # fmt: skip

    async def close(self) -> None:
        """Return when everything that was settled is committed."""
        while self._settling:
            await asyncio.wait(set(self._settling))

    def in_flight(self) -> list[Origin]:
        """Origins of the requests being served."""
        return [account.origin for account in self._open.values() if not account.is_waiting]

    def waiting(self) -> list[Origin]:
        """Origins of the requests that wait for a model or a place."""
        return [account.origin for account in self._open.values() if account.is_waiting]


def _error_code(account: Account, status: int) -> str:
    if account.error_code or status < 400 or status == CLIENT_GONE:
        return account.error_code
    return f"http_{status}"


class RequestMiddleware:
    """Resolves every request's origin, names the request, and keeps its account.

    The resolved origin is `http.state.origin`, the id `http.state.request_id`, the client's address `http.state.peer`.

    Args:
        surfaces: the surface of each path that runs a model. Other paths have the surface `other` and no account.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        resolver: OriginResolver,
        accounts: Accounts,
        metrics: Metrics,
        surfaces: Mapping[str, str],
    ) -> None:
        self._app = app
        self._resolver = resolver
        self._accounts = accounts
        self._metrics = metrics
        self._surfaces = surfaces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        surface = self._surfaces.get(scope["path"]) if scope["method"] == "POST" else None
        peer = scope["client"][0] if scope.get("client") else None
        resolved = self._resolver.resolve(surface or "other", peer, Headers(scope=scope))
        if resolved.dropped_assertion:
            self._metrics.inc_dropped_origin()
        request_id = f"req_{secrets.token_hex(16)}"
        state = {"origin": resolved.origin, "request_id": request_id, "peer": resolved.peer}
        scope.setdefault("state", {}).update(state)
        request_context.set(f"{request_id} {resolved.origin.caller}")
        account = None
        if surface is not None:
            account = Account(
                request_id, resolved.origin, scope["path"], started_at=time.time(), arrived=time.monotonic()
            )
            self._accounts.open(account)
        await _Responder(self._app, self._accounts, account, scope, send).respond(receive)


class _Responder:
    """One request's response on its way out."""

    def __init__(self, app: ASGIApp, accounts: Accounts, account: Account | None, scope: Scope, send: Send) -> None:
        self._app = app
        self._accounts = accounts
        self._account = account
        self._scope = scope
        self._send = send
        self._status = CLIENT_GONE

    async def respond(self, receive: Receive) -> None:
        try:
            await self._app(self._scope, receive, self.send)
        except Exception:
            await self._settle(FinishReason.ERROR.value, 500)
            raise
        finally:
            await self._settle(FinishReason.CANCEL.value, CLIENT_GONE)

    async def send(self, message: Message) -> None:
        """Add our headers to the start, and settle before the end."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            state, headers = self._scope["state"], MutableHeaders(scope=message)
            headers[REQUEST_ID_HEADER] = headers["Request-Id"] = state["request_id"]
            headers[ORIGIN_HEADER] = render_origin(state["origin"])
            is_last = headers.get("content-length") == "0"  # a client has then seen the end
        else:
            is_last = not message.get("more_body", False)
        if is_last:
            reason = REFUSED if self._status >= 400 else FinishReason.CANCEL.value
            await self._settle(reason, self._status)
        await self._send(message)

    async def _settle(self, reason: str, status: int) -> None:
        """Settle what nobody has settled; a dialect leaves why it refused in the request's state."""
        if self._account is None:
            return
        refusal: Refusal | None = self._scope["state"].get("refusal")
        if refusal is not None and refusal.code == Cancelled.code:
            reason = FinishReason.CANCEL.value
        elif refusal is not None:
            self._account.error_code = self._account.error_code or refusal.code
            self._account.model = self._account.model or refusal.model
        await self._accounts.settle(self._account, status=status, reason=reason)
