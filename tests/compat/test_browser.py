"""CORS and the Host check, spoken to as an ASGI app."""

import socket

import httpx
import psutil
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from compat.browser import BrowserGuard, parse_origins


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    """The app behind the guard."""
    await Response("hello", 418 if scope["method"] == "OPTIONS" else 200)(scope, receive, send)


async def ask(
    method: str = "GET",
    *,
    host: str = "localhost:11434",
    allowed: str = "",
    check_host: bool = True,
    **headers: str,
) -> httpx.Response:
    """One request through a guard."""
    guard = BrowserGuard(hello, allowed_origins=parse_origins(allowed), check_host=check_host)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://localhost") as client:
        return await client.request(method, "/api/tags", headers={"host": host, **names})


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "https://localhost:3000",
        "http://127.0.0.1:8080",
        "http://0.0.0.0",
        "app://obsidian.md",
        "file://",
        "tauri://localhost",
        "vscode-webview://1x2y",
        "vscode-file://vscode-app",
    ],
)
async def test_local_origins_are_always_allowed(origin: str) -> None:
    """Whatever the port; the origin is echoed and caches are told that it matters."""
    response = await ask(origin=origin)
    assert (response.status_code, response.text) == (200, "hello")
    assert response.headers["access-control-allow-origin"] == origin
    assert response.headers["vary"] == "Origin"
    assert "x-request-id" in response.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("origin", ["https://evil.com", "http://localhost.evil.com", "null", "http://localhostx:1"])
async def test_a_foreign_origin_gets_an_empty_403(method: str, origin: str) -> None:
    """For every method, so that a simple POST never arrives."""
    response = await ask(method, origin=origin)
    assert (response.status_code, response.content) == (403, b"")
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("origin", ["", "http://my.local:11434", "https://my.local:11434"])
async def test_the_server_s_own_pages_are_not_cross_origin(origin: str) -> None:
    """No CORS headers on what is no CORS."""
    response = await ask(host="my.local:11434", origin=origin)
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


async def test_a_preflight_is_answered_without_the_app() -> None:
    """204 with methods, age and headers, those of official clients among them and no others."""
    asked = "authorization, x-stainless-new-thing, x-evil, x-stainless-a:b"
    response = await ask(
        "OPTIONS", host="evil.com", origin="http://localhost:3000", access_control_request_headers=asked
    )
    allowed = response.headers["access-control-allow-headers"].split(",")
    assert (response.status_code, response.content) == (204, b"")
    assert response.headers["access-control-allow-methods"] == "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
    assert response.headers["access-control-max-age"] == "43200"
    assert response.headers["vary"] == "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"
    assert {"Authorization", "OpenAI-Beta", "x-api-key", "x-stainless-os", "x-stainless-new-thing"} <= set(allowed)
    assert not {"x-evil", "x-stainless-a:b"} & set(allowed)
    assert len(set(allowed)) == len(allowed)


@pytest.mark.parametrize(
    ("allowed", "origin", "status"),
    [
        ("https://a.com", "https://a.com", 200),
        ("https://a.com", "https://a.com:8080", 403),
        ("https://a.com,http://b.com:*", "http://b.com:99", 200),
        ("*.a.com", "https://x.a.com", 200),
        ("*.a.com", "https://a.com.evil", 403),
        ("https://*.a.com", "https://x.a.com", 200),
        ("https://*.a.com", "http://x.a.com", 403),
        ("chrome-extension://*", "chrome-extension://abc", 200),
        ("moz-extension://abc", "moz-extension://abc", 200),
    ],
)
async def test_further_origins_have_one_wildcard(allowed: str, origin: str, status: int) -> None:
    """In front, behind or in the middle."""
    assert (await ask(allowed=allowed, origin=origin)).status_code == status


async def test_a_star_allows_all() -> None:
    """And says so, without naming the origin."""
    for method, status in [("GET", 200), ("OPTIONS", 204)]:
        response = await ask(method, allowed="*", origin="https://anyone.com")
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, "*")
        assert "vary" not in response.headers


@pytest.mark.parametrize("text", ["a.com", "https://a.com, https://b.com", "https://a.com,", "*.a.*", "ftp://a.com"])
def test_origins_that_ollama_refuses_are_refused(text: str) -> None:
    """Entries are used as they are, so a space after the comma is part of one."""
    with pytest.raises(ValueError, match="bad origin"):
        parse_origins(text)


def test_no_origins_are_none() -> None:
    """An unset variable adds nothing."""
    assert parse_origins("") == ()


LOCAL_HOSTS = [
    "localhost",
    "LOCALHOST:11434",
    "127.0.0.1:11434",
    "127.9.9.9",
    "[::1]:11434",
    "[::1]",
    "0.0.0.0:1",
    "192.168.1.5",
    "10.0.0.1:80",
    "172.31.0.1",
    "[fd00::1]:80",
    "me.local",
    "Me.LocalHost:3",
    "gateway.docker.internal:11434",
    socket.gethostname(),
    *(
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET
    ),
]
FOREIGN_HOSTS = [
    "evil.com",
    "evil.com:11434",
    "local",
    "8.8.8.8",
    "172.32.0.1",
    "[2001:db8::1]:80",
    "127.0.0.1.evil.com",
]


@pytest.mark.parametrize("host", LOCAL_HOSTS)
async def test_names_of_this_machine_pass(host: str) -> None:
    """Addresses that cannot be rebound, and names that nobody else owns."""
    assert (await ask(host=host)).status_code == 200


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
async def test_a_name_that_may_be_rebound_gets_an_empty_403(host: str) -> None:
    """Unless the server listens beyond the loopback address, where such names are legitimate."""
    response = await ask(host=host)
    assert (response.status_code, response.content) == (403, b"")
    assert (await ask(host=host, check_host=False)).status_code == 200


async def test_options_for_an_own_name_is_204() -> None:
    """As in Ollama; for an address the app decides."""
    assert (await ask("OPTIONS", host="localhost")).status_code == 204
    assert (await ask("OPTIONS", host="127.0.0.1")).status_code == 418
    assert (await ask("OPTIONS", host="localhost", check_host=False)).status_code == 418


async def test_an_allowed_origin_does_not_vouch_for_a_foreign_host() -> None:
    """Both checks must pass."""
    assert (await ask(host="evil.com", origin="http://localhost")).status_code == 403
