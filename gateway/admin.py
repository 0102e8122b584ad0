"""The administrator's routes: what the ledger knows and what runs, for whoever sits at this machine.

Loopback only. A relayed request is not local, whatever its last hop: neither one that names a client further back,
nor a web page that resolved its own name to this machine (DNS rebinding), hence the look at `Host`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engines.errors import AccessDenied, BadRequest, HeadwaterError
from gateway.inspection import inspect
from gateway.pool import Pool
from gateway.runner import Runner
from gateway.usage.ledger import Ledger
from gateway.usage.reports import recent_requests, total, usage_report

Handler = Callable[[Request], Awaitable[Response]]

DASHBOARD = Path(__file__).parent / "dashboard"
PAGE = (
    ("/admin", "page.html", "text/html"),
    ("/admin/page.css", "page.css", "text/css"),
    ("/admin/page.js", "page.js", "text/javascript"),
)
"""Where each file of the page is found."""

MAX_REQUESTS = 1000
_YEAR_10000 = 253_402_300_800
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def routes(ledger: Ledger) -> list[Route]:
    """`GET /admin/usage?by=caller,model&since=24h&until=1h` and `GET /admin/requests?limit=100`."""

    async def usage(http: Request) -> Response:
        now = time.time()
        by = _names(http.query_params.get("by", "caller,model"))
        since, until = (_time(http.query_params.get(name), name, now) for name in ("since", "until"))
        if since is not None and until is not None and since >= until:
            raise BadRequest("since must be before until", param="since")
        rows = await usage_report(ledger, by=by, since=since, until=until)
        return JSONResponse({"by": by, "since": since, "until": until, "rows": rows, "totals": total(rows)})

    async def requests(http: Request) -> Response:
        limit = http.query_params.get("limit", "100")
        if not re.fullmatch("[0-9]{1,4}", limit) or not 1 <= int(limit) <= MAX_REQUESTS:
            raise BadRequest(f"limit must be a number from 1 to {MAX_REQUESTS}, not {limit[:40]!r}", param="limit")
        return JSONResponse({"requests": await recent_requests(ledger, int(limit))})

    return [Route("/admin/usage", _local(usage)), Route("/admin/requests", _local(requests))]


def runner_routes(pool: Pool[Runner]) -> list[Route]:
    """`GET /admin/runners`, and the page at `GET /admin` that shows them."""

    async def runners(http: Request) -> Response:
        return JSONResponse(await inspect(pool))

    pages = [Route(path, _local(_page(name, media_type))) for path, name, media_type in PAGE]
    return [Route("/admin/runners", _local(runners)), *pages]


def _page(name: str, media_type: str) -> Handler:
    """One file of the page. It may load its own files and ask this server, and nothing else."""
    body = (DASHBOARD / name).read_bytes()

    async def show(http: Request) -> Response:
        headers = {"Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'", "Cache-Control": "no-cache"}
        return Response(body, media_type=media_type, headers=headers)

    return show


def parse_since(text: str, now: float) -> float:
    """A point in time, in seconds since the epoch.

    Args:
        text: how long before `now` (`90s`, `15m`, `24h`, `7d`), ISO 8601 (UTC unless it says otherwise), or seconds
            since the epoch.
        now: seconds since the epoch.

    Raises:
        BadRequest: it is none of these, or outside the years 1970 to 9999.
    """
    if duration := re.fullmatch(r"([0-9]{1,9})([smhd])", text):
        return max(0.0, now - int(duration[1]) * _UNIT_S[duration[2]])
    is_number = re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text)
    moment = float(text) if is_number else _parse_iso(text)
    if not 0 <= moment < _YEAR_10000:
        raise BadRequest(f"{text[:40]!r} is outside the years 1970 to 9999")
    return moment


def _parse_iso(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise BadRequest(
            f"{text[:40]!r} is no time: say 90s, 15m, 24h or 7d, a date such as 2026-01-31T12:00:00Z, "
            "or seconds since the epoch"
        ) from None


def _time(text: str | None, name: str, now: float) -> float | None:
    try:
        return None if text is None else parse_since(text, now)
    except BadRequest as error:
        raise BadRequest(f"{name}: {error.message}", param=name) from None


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def _local(handler: Handler) -> Handler:
    """The handler for local requests; everybody else, and every error, gets `{"error": ...}`."""

    async def guarded(http: Request) -> Response:
        try:
            _refuse_strangers(http)
            return await handler(http)
        except HeadwaterError as error:
            return JSONResponse({"error": error.message}, status_code=error.status)

    return guarded


def _refuse_strangers(http: Request) -> None:
    peer = http.client.host if http.client else ""
    resolved = getattr(http.state, "peer", peer)
    relayed = any(name in http.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip"))
    if relayed or not (_is_loopback(peer) and _is_loopback(resolved)):
        raise AccessDenied("the admin routes answer only on this machine")
    host = http.headers.get("host", "")
    if not _is_local_name(host):
        raise AccessDenied("the admin routes answer only under the name localhost or a loopback address")
    if http.headers.get("origin", f"http://{host}") not in (f"http://{host}", f"https://{host}"):
        raise AccessDenied("the admin routes do not answer to web pages of other sites")


def _is_loopback(address: str) -> bool:
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped:
        parsed = parsed.ipv4_mapped
    return parsed.is_loopback


def _is_local_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or _is_loopback(name)
