"""Which web pages may use the server: CORS, and the Host check against DNS rebinding (`spec/ollama.md` section 1).

A page is foreign unless its Origin is this server itself, a local page or application, or on the operator's list. The
Host check is for servers on the loopback address: a page may point its own name there, so only names that mean this
machine pass. Applies to every route, and answers what it refuses with an empty 403.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence

import psutil
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_LOCAL_ORIGINS = (
    *(
        f"{scheme}://{host}{port}"
        for host in ("localhost", "127.0.0.1", "0.0.0.0")  # noqa: S104  names in URLs, nothing is bound
        for scheme in ("http", "https")
        for port in ("", ":*")
    ),
    *(f"{scheme}://*" for scheme in ("app", "file", "tauri", "vscode-webview", "vscode-file")),
)
_SCHEMES = (
    "http://",
    "https://",
    "chrome-extension://",
    "safari-extension://",
    "moz-extension://",
    "ms-browser-extension://",
)
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")
_PRIVATE = [ipaddress.ip_network(network) for network in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")]

_METHODS = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
_STAINLESS = "x-stainless-"
_ALLOWED_HEADERS = (
    *("Authorization", "Content-Type", "User-Agent", "Accept", "X-Requested-With", "OpenAI-Beta"),
    *("x-api-key", "anthropic-version", "anthropic-beta"),
    *(
        _STAINLESS + name
        for name in (
            *("arch", "async", "custom-poll-interval", "helper-method", "lang", "os", "package-version"),
            *("poll-helper", "retry-count", "runtime", "runtime-version", "timeout"),
        )
    ),
)
_EXPOSED_HEADERS = (
    *("x-request-id", "request-id", "retry-after"),
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
)
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]{1,100}")
_MAX_AGE_S = 43200


def parse_origins(text: str) -> tuple[str, ...]:
    """The entries of OLLAMA_ORIGINS, a comma-separated list used as it is, nothing trimmed.

    Raises:
        ValueError: an entry has more than one `*`, or none and no scheme that a browser has.
    """
    entries = tuple(text.split(",")) if text else ()
    for entry in entries:
        if entry.count("*") > 1 or ("*" not in entry and not entry.startswith(_SCHEMES)):
            raise ValueError(f"bad origin {entry!r}: expected one *, or a scheme such as http:// or https://")
    return entries


class BrowserGuard:
    """Middleware that turns foreign pages away.

    Args:
        allowed_origins: what `parse_origins` gave; local origins are always allowed.
        check_host: whether the server listens on the loopback address alone.
    """

    def __init__(self, app: ASGIApp, *, allowed_origins: Sequence[str], check_host: bool) -> None:
        self._app = app
        self._allows_all = "*" in allowed_origins
        self._origins = _compile((*_LOCAL_ORIGINS, *allowed_origins))
        self._check_host = check_host
        self._hostname = socket.gethostname().lower()
        self._addresses = _interface_addresses()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin, host = headers.get("origin"), headers.get("host", "")
        is_cors = bool(origin) and origin not in (f"http://{host}", f"https://{host}")
        response = self._answer(scope["method"], headers, origin if is_cors else None, host)
        if response is not None:
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, self._with_headers(send, origin) if is_cors and origin else send)

    def _answer(self, method: str, headers: Headers, origin: str | None, host: str) -> Response | None:
        """The answer to what does not pass; `origin` is None when the request is not a cross-origin one."""
        if origin is not None:
            if not self._allows_all and not self._origins.fullmatch(origin):
                return Response(status_code=403)
            if method == "OPTIONS":
                return self._preflight(headers, origin)
        if not self._check_host:
            return None
        name = _host_name(host)
        if self._is_own_address(name):
            return None
        if not self._is_own_name(name):
            return Response(status_code=403)
        return Response(status_code=204) if method == "OPTIONS" else None

    def _preflight(self, headers: Headers, origin: str) -> Response:
        response = Response(status_code=204)
        response.headers["Access-Control-Allow-Methods"] = _METHODS
        response.headers["Access-Control-Allow-Headers"] = ",".join(_allowed_headers(headers))
        response.headers["Access-Control-Max-Age"] = str(_MAX_AGE_S)
        self._allow_origin(response.headers, origin)
        if not self._allows_all:
            response.headers["Vary"] += ", Access-Control-Request-Method, Access-Control-Request-Headers"
        return response

    def _with_headers(self, send: Send, origin: str) -> Send:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Access-Control-Expose-Headers"] = ",".join(_EXPOSED_HEADERS)
                self._allow_origin(headers, origin)
            await send(message)

        return send_with_headers

    def _allow_origin(self, headers: MutableHeaders, origin: str) -> None:
        headers["Access-Control-Allow-Origin"] = "*" if self._allows_all else origin
        if not self._allows_all:
            headers.add_vary_header("Origin")

    def _is_own_address(self, name: str) -> bool:
        address = _address(name)
        if address is None:
            return False
        is_private = any(address in network for network in _PRIVATE if network.version == address.version)
        return address.is_loopback or is_private or address.is_unspecified or address in self._addresses

    def _is_own_name(self, name: str) -> bool:
        return name in ("", "localhost", self._hostname) or name.endswith(_LOCAL_SUFFIXES)


def _compile(entries: Iterable[str]) -> re.Pattern[str]:
    """One pattern for all entries, whose `*` stands for anything."""
    return re.compile("|".join(".*".join(map(re.escape, entry.split("*"))) for entry in entries), re.DOTALL)


def _allowed_headers(headers: Headers) -> list[str]:
    """What is always allowed, and every further header of OpenAI's clients that the browser asks for."""
    asked = [name.strip() for name in headers.get("access-control-request-headers", "").split(",")]
    more = {
        name.lower() for name in asked if name.lower().startswith(_STAINLESS) and _HEADER_NAME.fullmatch(name)
    }.difference(_ALLOWED_HEADERS)
    return [*_ALLOWED_HEADERS, *sorted(more)]


def _host_name(host: str) -> str:
    """The Host header without its port, in lower case; an IPv6 address without its brackets."""
    bracketed = re.fullmatch(r"\[(?P<address>[^\]]*)\](?::\d*)?", host)
    if bracketed:
        return bracketed["address"].lower()
    return host.partition(":")[0].lower() if host.count(":") == 1 else host.lower()


def _address(text: str) -> _Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _interface_addresses() -> frozenset[_Address]:
    """The addresses of this machine, as they are now."""
    texts = (entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries)
    return frozenset(address for text in texts if (address := _address(text)) is not None)
