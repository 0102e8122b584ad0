import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from compat.services import Refusal
from engines.errors import BadRequest, Cancelled, ModelNotFound, WorkerCrashed
from engines.events import Timings, Usage
from engines.request import GenerateRequest, Mode, Origin
from gateway.accounting import Account, Accounts, RequestMiddleware
from gateway.metrics import Metrics
from gateway.origin import OriginResolver
from gateway.usage.ledger import Ledger

SURFACES = {"/api/chat": "ollama/completion"}
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass
class Desk:
    """The accounts of a house with a real ledger, and the way into an app."""

    accounts: Accounts
    metrics: Metrics
    database: Path
    sent: list[Message] = field(default_factory=list)
    rows_at_the_end: int = -1

    def rows(self) -> list[dict[str, Any]]:
        """What is committed, as another process would see it."""
        with sqlite3.connect(self.database) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("select * from requests order by started_at")]

    def row(self) -> dict[str, Any]:
        """The only one."""
        (row,) = self.rows()
        return row

    async def call(self, app: App, path: str = "/api/chat", method: str = "POST", **headers: str) -> None:
        """One request to `app` behind the middleware; what it sends is in `sent`."""
        middleware = RequestMiddleware(
            app, resolver=OriginResolver(), accounts=self.accounts, metrics=self.metrics, surfaces=SURFACES
        )
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "client": ("127.0.0.1", 5000),
            "headers": [
                (name.replace("_", "-").encode(), value.encode())
                for name, value in ({"user-agent": "curl/8"} | headers).items()
            ],
        }
        await middleware(scope, _receive, self._send)

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.rows_at_the_end = len(self.rows())

    def headers(self) -> Headers:
        """Those of the response."""
        return Headers(raw=self.sent[0]["headers"])

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        families = text_string_to_metric_families(self.metrics.render().decode())
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)


async def _receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A desk with an empty ledger."""
    metrics = Metrics()
    ledger = await Ledger.open(f"sqlite+aiosqlite:///{tmp_path}/usage.db", on_unrecorded=metrics.inc_unrecorded)
    accounts = Accounts(ledger, metrics)
    yield Desk(accounts, metrics, tmp_path / "usage.db")
    await accounts.close()
    await ledger.close()
    assert accounts.in_flight() == accounts.waiting() == []
    assert ledger.num_unrecorded == 0


def request_of(scope: Scope, position: int = 0) -> GenerateRequest:
    """The request that a dialect would make, or the further ones of a batch."""
    request_id = scope["state"]["request_id"] + (f"-{position}" if position else "")
    return GenerateRequest(request_id, "m", scope["state"]["origin"], prompt="hello", stream=True)


def reply(status: int, *chunks: bytes) -> App:
    """An app that answers like that."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def settling(desk: Desk, **settled: Any) -> App:
    """An app behind which dispatch settles the account between the first byte and the last."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        account = desk.accounts.claim(request_of(scope), mode=Mode.COMPLETION)
        account.model, account.model_digest, account.backend = "m:latest", "d" * 64, "llama.cpp"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hi", "more_body": True})
        await desk.accounts.settle(account, status=200, reason="stop", **settled)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


async def test_an_answer_is_one_row_with_everything_that_is_known(desk: Desk) -> None:
    """What dispatch said, with the origin and the route that the middleware saw."""
    usage, timings = Usage(prompt_tokens=5, cached_tokens=2, completion_tokens=3), Timings(load_s=1.0, decode_s=0.5)
    await desk.call(settling(desk, usage=usage, timings=timings, wasted_tokens=1))
    row = desk.row()
    expected = {
        "surface": "ollama/completion",
        "caller": "curl@127.0.0.1",
        "client": "curl",
        "trust": "derived",
        "route": "/api/chat",
        "model": "m:latest",
        "model_digest": "d" * 64,
        "backend": "llama.cpp",
        "mode": "completion",
        "status": 200,
        "finish_reason": "stop",
        "error_code": "",
        "stream": 1,
        "prompt_tokens": 5,
        "cached_tokens": 2,
        "completion_tokens": 3,
        "wasted_tokens": 1,
        "load_s": 1.0,
        "decode_s": 0.5,
    }
    assert {name: row[name] for name in expected} == expected
    assert row["id"] == desk.headers()["x-request-id"]
    assert row["total_s"] > 0
    assert desk.metric("headwater_requests_total") == 1


@pytest.mark.parametrize(
    ("truncated", "said"), [(2981, ["m:latest had no room for 2981 of 5031 prompt tokens in its context"]), (0, [])]
)
async def test_the_log_says_that_a_prompt_was_cut(
    truncated: int, said: list[str], desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning beside the request's line, and none where the prompt fitted."""
    with caplog.at_level(logging.WARNING):
        await desk.call(settling(desk, usage=Usage(prompt_tokens=2050, truncated_tokens=truncated)))
    assert caplog.messages == said


async def test_the_row_is_committed_before_the_last_byte_leaves(desk: Desk) -> None:
    """What a client saw finish is in the ledger, settled by dispatch or not."""
    await desk.call(settling(desk))
    assert desk.rows_at_the_end == 1
    await desk.call(reply(400, b"no"))
    assert desk.rows_at_the_end == 2


async def test_a_refusal_before_dispatch_is_one_row(desk: Desk) -> None:
    """A body that does not parse costs nothing and is still on record."""
    await desk.call(reply(400, b"no"))
    row = desk.row()
    assert (row["status"], row["finish_reason"], row["error_code"], row["model"]) == (400, "refused", "http_400", "")


async def test_an_empty_answer_ends_with_its_head_and_so_does_its_account(desk: Desk) -> None:
    """With a Content-Length of 0 there is no last byte to wait for: the row is there before the first."""
    committed: list[int] = []

    async def send(message: Message) -> None:
        committed.append(len(desk.rows()))

    async def app(scope: Scope, receive: Receive, forward: Send) -> None:
        await forward({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
        await forward({"type": "http.response.body", "body": b""})

    desk._send = send  # type: ignore[method-assign]  # a client that looks at the ledger
    await desk.call(app)
    assert committed == [1, 1]
    assert desk.row()["finish_reason"] == "refused"


async def test_a_dialect_that_answers_a_caller_who_left_makes_it_no_refusal(desk: Desk) -> None:
    """It is a cancel like any other, and no error."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["refusal"] = Refusal.of(Cancelled())
        await reply(499)(scope, receive, send)

    await desk.call(app)
    row = desk.row()
    assert (row["status"], row["finish_reason"], row["error_code"]) == (499, "cancel", "")


async def test_the_error_that_a_dialect_answered_with_gives_the_row_its_code(desk: Desk) -> None:
    """Dialects leave it in the request's state; an unknown model's name is kept as it was typed."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["refusal"] = Refusal.of(ModelNotFound("nope"))
        await reply(404)(scope, receive, send)

    await desk.call(app)
    row = desk.row()
    assert (row["status"], row["error_code"], row["model"], row["model_digest"]) == (404, "model_not_found", "nope", "")


async def test_an_error_settled_by_dispatch_keeps_its_code(desk: Desk) -> None:
    """The engine's own failure, not what the dialect made of it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        account = desk.accounts.claim(request_of(scope), mode=Mode.COMPLETION)
        account.error_code = WorkerCrashed.code
        await desk.accounts.settle(account, status=500, reason="error", usage=Usage(completion_tokens=2))
        scope["state"]["refusal"] = Refusal.of(BadRequest("later"))
        await reply(500)(scope, receive, send)

    await desk.call(app)
    row = desk.row()
    assert (row["finish_reason"], row["error_code"], row["completion_tokens"]) == ("error", "worker_crashed", 2)


async def test_an_exception_in_the_app_is_one_row_and_passes_on(desk: Desk) -> None:
    """A bug is an error on record, whoever answers it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        await desk.call(app)
    row = desk.row()
    assert (row["status"], row["finish_reason"], row["error_code"]) == (500, "error", "http_500")


async def test_a_caller_who_leaves_the_queue_is_one_row(desk: Desk) -> None:
    """The server cancels, or the app returns without having answered: nobody else settled."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        desk.accounts.claim(request_of(scope), mode=Mode.COMPLETION).is_waiting = True
        assert [origin.caller for origin in desk.accounts.waiting()] == ["curl@127.0.0.1"]

    await desk.call(app)

    async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
        assert len(desk.accounts.in_flight()) == 1
        await asyncio.Event().wait()

    calling = asyncio.create_task(desk.call(stuck))
    await asyncio.sleep(0)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await desk.accounts.close()
    left, cancelled = desk.rows()
    assert (left["status"], left["finish_reason"], left["model"], left["error_code"]) == (499, "cancel", "m", "")
    assert (cancelled["status"], cancelled["finish_reason"]) == (499, "cancel")


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/chat"), ("POST", "/api/show"), ("GET", "/metrics")])
async def test_what_runs_no_model_has_no_row_but_has_the_headers(desk: Desk, method: str, path: str) -> None:
    """Looking around is not usage."""
    await desk.call(reply(200), path, method)
    assert desk.rows() == []
    assert desk.headers()["x-request-id"].startswith("req_")
    assert desk.headers()["x-request-origin"].startswith("other; ")


@pytest.mark.parametrize("status", [200, 400, 404, 500, 503])
async def test_every_response_names_its_request_and_origin(desk: Desk, status: int) -> None:
    """Also in the older spelling of the id; ids are 32 hex digits and never the same twice."""
    await desk.call(reply(status, b"x"))
    first = desk.headers()
    assert first["x-request-origin"] == 'ollama/completion; caller="curl@127.0.0.1"; client="curl"; trust="derived"'
    assert first["x-request-id"] == first["request-id"]
    assert len(first["x-request-id"]) == 36
    desk.sent.clear()
    await desk.call(reply(status))
    assert desk.headers()["x-request-id"] != first["x-request-id"]


async def test_a_clients_own_request_id_is_not_taken(desk: Desk) -> None:
    """The ledger's key is ours."""
    await desk.call(reply(400), x_request_id="req_mine")
    assert desk.row()["id"] == desk.headers()["x-request-id"] != "req_mine"


async def test_a_dropped_assertion_is_counted(desk: Desk) -> None:
    """An operator sees that somebody tries, or that a proxy is not on the list."""
    await desk.call(reply(200), "/api/tags", "GET", x_request_origin="alice")
    assert desk.metric("headwater_origin_asserted_dropped_total") == 1


async def test_settling_twice_or_at_once_records_once(desk: Desk) -> None:
    """The first word counts, and all wait for its commit."""
    account = Account("req_1", Origin("s", "c"), "/r", 1.8e9, 0.0)
    desk.accounts.open(account)
    await asyncio.gather(
        desk.accounts.settle(account, status=200, reason="stop", usage=Usage(completion_tokens=7)),
        *(desk.accounts.settle(account, status=499, reason="cancel") for _ in range(5)),
    )
    await desk.accounts.settle(account, status=500, reason="error")
    row = desk.row()
    assert (row["finish_reason"], row["completion_tokens"]) == ("stop", 7)
    assert desk.metric("headwater_requests_total") == 1


async def test_settling_survives_the_caller_who_leaves_meanwhile(desk: Desk) -> None:
    """The row is written although nobody waits for it any more."""
    account = Account("req_1", Origin("s", "c"), "/r", 1.8e9, 0.0)
    task = asyncio.create_task(desk.accounts.settle(account, status=200, reason="stop"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await desk.accounts.close()
    assert desk.row()["finish_reason"] == "stop"


async def test_each_prompt_of_a_batch_is_a_row_of_its_own(desk: Desk) -> None:
    """The first has the HTTP request's account, the others have their own with its arrival and route."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        accounts = [desk.accounts.claim(request_of(scope, n), mode=Mode.COMPLETION) for n in range(3)]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for account in reversed(accounts):
            await desk.accounts.settle(account, status=200, reason="stop", usage=Usage(completion_tokens=1))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    await desk.call(app)
    rows = desk.rows()
    request_id = desk.headers()["x-request-id"]
    assert {row["id"] for row in rows} == {request_id, f"{request_id}-1", f"{request_id}-2"}
    assert {row["route"] for row in rows} == {"/api/chat"}
    assert len({row["started_at"] for row in rows}) == 1


async def test_what_is_no_http_passes_untouched(desk: Desk) -> None:
    """Lifespan and websockets have no origin."""
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    middleware = RequestMiddleware(
        app, resolver=OriginResolver(), accounts=desk.accounts, metrics=desk.metrics, surfaces=SURFACES
    )
    await middleware({"type": "lifespan"}, _receive, desk._send)
    assert seen == [{"type": "lifespan"}]
