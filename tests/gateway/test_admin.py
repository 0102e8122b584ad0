from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from httpx import ASGITransport, AsyncClient, Response
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette

from engines.errors import BadRequest
from engines.events import Usage
from engines.request import Origin
from gateway.admin import parse_since, routes
from gateway.usage.ledger import Ledger
from gateway.usage.record import UsageRecord

NOW = 1_800_000_000.0
LOCAL = "127.0.0.1"


async def open_and_fill(url: str) -> Ledger:
    """A ledger with two old requests of alice and one of bob."""
    ledger = await Ledger.open(url)
    for n, caller in enumerate(["alice", "alice", "bob"]):
        origin = Origin("ollama/completion", caller, "curl")
        usage = Usage(prompt_tokens=10 * n, completion_tokens=1)
        await ledger.record(UsageRecord(f"req_{n}", NOW + n, origin, "/api/chat", "m", 200, "stop", usage=usage))
    return ledger


class Peer:
    """Stands where the origin middleware does: sets the resolved address of the one who asks."""

    def __init__(self, app: Callable[..., Awaitable[None]], peer: str) -> None:
        self.app, self.peer = app, peer

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Set `http.state.peer`."""
        scope.setdefault("state", {})["peer"] = self.peer
        await self.app(scope, receive, send)


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[Starlette]:
    """The admin routes over a filled ledger."""
    ledger = await open_and_fill(f"sqlite+aiosqlite:///{tmp_path}/usage.db")
    yield Starlette(routes=routes(ledger))
    await ledger.close()


async def ask(app: Any, path: str, *, client: str = LOCAL, host: str = "localhost:11434", **headers: str) -> Response:
    """The answer to one GET from the address `client`."""
    transport = ASGITransport(app, client=(client, 50000))
    async with AsyncClient(transport=transport, base_url=f"http://{host}") as http:
        return await http.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})


async def test_usage_is_grouped_and_totalled(app: Starlette) -> None:
    """Rows by what was asked for, and their totals."""
    answer = await ask(app, f"/admin/usage?by=caller&since={NOW}&until={NOW + 100}")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["by"], body["since"], body["until"]) == (["caller"], NOW, NOW + 100)
    assert [(row["caller"], row["num_requests"], row["total_tokens"]) for row in body["rows"]] == [
        ("bob", 1, 21),
        ("alice", 2, 12),
    ]
    assert body["totals"]["num_requests"] == 3


async def test_usage_without_parameters_is_everything_by_caller_and_model(app: Starlette) -> None:
    """The plain address is useful."""
    body = (await ask(app, "/admin/usage")).json()
    assert (body["by"], body["since"], body["until"]) == (["caller", "model"], None, None)
    assert len(body["rows"]) == 2


async def test_requests_are_listed_newest_first(app: Starlette) -> None:
    """As many as asked for."""
    body = (await ask(app, "/admin/requests?limit=2")).json()
    assert [row["id"] for row in body["requests"]] == ["req_2", "req_1"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("usage?by=prompt", "cannot group by prompt; choose from caller, client, user, surface, model, hour"),
        ("usage?since=yesterday", "since: 'yesterday' is no time"),
        ("usage?until=-5", "until: '-5' is no time"),
        ("usage?since=1h&until=2h", "since must be before until"),
        ("requests?limit=0", "limit must be a number from 1 to 1000, not '0'"),
        ("requests?limit=ten", "limit must be a number from 1 to 1000, not 'ten'"),
        ("requests?limit=1001", "limit must be a number from 1 to 1000, not '1001'"),
    ],
)
async def test_bad_parameters_are_named(app: Starlette, path: str, message: str) -> None:
    """400, and what is accepted."""
    answer = await ask(app, f"/admin/{path}")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(message)


@pytest.mark.parametrize("client", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
async def test_every_loopback_address_is_local(app: Starlette, client: str) -> None:
    """IPv4, IPv6 and one in the other."""
    assert (await ask(app, "/admin/usage", client=client)).status_code == 200


@pytest.mark.parametrize("client", ["192.168.1.7", "::ffff:192.168.1.7", "fe80::1", "testclient", ""])
async def test_other_machines_are_refused(app: Starlette, client: str) -> None:
    """Also when the address is none."""
    answer = await ask(app, "/admin/requests", client=client)
    assert answer.status_code == 403
    assert answer.json() == {"error": "the admin routes answer only on this machine"}


async def test_a_stranger_behind_a_local_proxy_is_refused(app: Starlette) -> None:
    """The resolved peer counts, and a proxy that nobody told us of gives itself away."""
    assert (await ask(Peer(app, "10.0.0.9"), "/admin/usage")).status_code == 403
    assert (await ask(Peer(app, LOCAL), "/admin/usage")).status_code == 200
    assert (await ask(Peer(app, LOCAL), "/admin/usage", client="10.0.0.9")).status_code == 403
    assert (await ask(app, "/admin/usage", x_forwarded_for="10.0.0.9")).status_code == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:3000", "null"])
async def test_other_sites_pages_are_refused(app: Starlette, origin: str) -> None:
    """Another port is another site."""
    assert (await ask(app, "/admin/usage", origin=origin)).status_code == 403


async def test_our_own_page_is_answered(app: Starlette) -> None:
    """A dashboard served from here may ask."""
    assert (await ask(app, "/admin/usage", origin="http://localhost:11434")).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "192.168.1.7:11434"])
async def test_a_name_that_was_rebound_to_this_machine_is_refused(app: Starlette, host: str) -> None:
    """A page of evil.example may ask evil.example without an Origin header, wherever that name leads by now."""
    assert (await ask(app, "/admin/usage", host=host)).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:11434", "[::1]:11434"])
async def test_this_machines_names_are_answered(app: Starlette, host: str) -> None:
    """With and without a port."""
    assert (await ask(app, "/admin/usage", host=host)).status_code == 200


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90s", NOW - 90),
        ("15m", NOW - 900),
        ("24h", NOW - 86_400),
        ("7d", NOW - 604_800),
        ("0s", NOW),
        ("99999999d", 0.0),
        ("1700000000", 1_700_000_000.0),
        ("1700000000.25", 1_700_000_000.25),
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC).timestamp()),
        ("2026-01-31T12:00:00", datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()),
        ("2026-01-31T12:00:00Z", datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()),
        ("2026-01-31T12:00:00+02:00", datetime(2026, 1, 31, 10, tzinfo=UTC).timestamp()),
    ],
)
def test_times_are_understood(text: str, moment: float) -> None:
    """Durations, seconds since the epoch and ISO 8601."""
    assert parse_since(text, NOW) == moment


@pytest.mark.parametrize(
    "text", ["", "h", "1w", "-1h", "1.5h", "nan", "inf", "1e5", "٣h", "9" * 5000, "1969-12-31", "24 h"]
)
def test_other_times_are_refused(text: str) -> None:
    """Never guessed at."""
    with pytest.raises(BadRequest, match=r"is no time|is outside the years"):
        parse_since(text, NOW)


@given(st.text(st.characters()) | st.from_regex(r"[0-9]{1,20}[smhdTZ:.+-]{0,3}[0-9]{0,9}", fullmatch=True))
def test_any_text_is_a_sensible_time_or_refused(text: str) -> None:
    """A number that the database can compare, or a BadRequest."""
    try:
        moment = parse_since(text, NOW)
    except BadRequest:
        return
    assert 0 <= moment < 253_402_300_800
