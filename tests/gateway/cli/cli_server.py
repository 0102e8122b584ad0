"""A small real server that answers with recorded shapes (spec/ollama.md sections 4 and 5.7), and fixtures for it.

Test modules import the fixtures by their functions' names and use them as `server` and `nobody`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

DETAILS = {
    "parent_model": "",
    "format": "gguf",
    "family": "llama",
    "families": ["llama"],
    "parameter_size": "3.2B",
    "quantization_level": "Q4_K_M",
}
TAGS = {
    "models": [
        {
            "name": "llama3.2:latest",
            "model": "llama3.2:latest",
            "modified_at": "2026-01-02T03:04:05.123456789+01:00",
            "size": 2019393189,
            "digest": "a80c4f17acd55265feec403c7aef86be0c25983ab279d83f3bcd3abbcb5b8b72",
            "details": DETAILS,
        }
    ]
}
PS = {
    "models": [
        {
            "name": "llama3.2:latest",
            "model": "llama3.2:latest",
            "size": 4000000000,
            "digest": "a80c4f17acd55265feec403c7aef86be0c25983ab279d83f3bcd3abbcb5b8b72",
            "details": DETAILS,
            "expires_at": "2318-04-12T03:09:05.1+01:00",
            "size_vram": 3000000000,
            "context_length": 4096,
        }
    ]
}
SHOW = {
    "license": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n\nVersion Release Date: September 25, 2024\nmore\n",
    "parameters": 'stop                           "<|eot_id|>"\ntemperature                    0.7',
    "system": "Be brief.",
    "details": DETAILS,
    "model_info": {
        "general.architecture": "llama",
        "general.parameter_count": 3212749888,
        "llama.context_length": 131072,
        "llama.embedding_length": 3072,
        "tokenizer.ggml.tokens": None,
    },
    "capabilities": ["completion", "tools"],
    "modified_at": "2026-01-02T03:04:05.1+01:00",
}
STATISTICS: dict[str, Any] = {
    "done": True,
    "done_reason": "stop",
    "total_duration": 4305000000,
    "load_duration": 85200000,
    "prompt_eval_count": 26,
    "prompt_eval_duration": 130000000,
    "eval_count": 298,
    "eval_duration": 4000000000,
}


def chat_line(content: str = "", thinking: str = "", **more: Any) -> dict[str, Any]:
    """One object of a chat stream."""
    message = {"role": "assistant", "content": content} | ({"thinking": thinking} if thinking else {})
    return {"model": "m", "created_at": "2026-01-02T03:04:05.1Z", "message": message, "done": False} | more


class CLIServer:
    """Answers what a test put into `answers` and `chat`, and keeps every request.

    Attributes:
        answers: by path, a body and a status. chat: the lines of a streamed answer.
        address: where it listens, once it runs.
        holds: the chat stream stays open after its last line until the client leaves, which sets `left`.
    """

    def __init__(self) -> None:
        self.answers: dict[str, tuple[Any, int]] = {
            "/api/tags": (TAGS, 200),
            "/api/ps": (PS, 200),
            "/api/show": (SHOW, 200),
            "/api/generate": ({"model": "m", "response": "", "done": True, "done_reason": "unload"}, 200),
        }
        self.chat: list[dict[str, Any]] = [chat_line("Hello "), chat_line("there."), chat_line("", **STATISTICS)]
        self.holds = False
        self.left = threading.Event()
        self.requests: list[tuple[str, Any]] = []
        self.headers: list[Headers] = []
        self.address = ""
        self.app = Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "HEAD", "POST", "DELETE"])])

    def bodies(self, path: str) -> list[Any]:
        """What was sent to `path`, in order."""
        return [body for asked, body in self.requests if asked == path]

    async def _answer(self, http: Request) -> Response:
        path = http.url.path
        body = await http.body()
        sent: Any = body if path.startswith("/api/blobs/") else json.loads(body) if body else dict(http.query_params)
        self.requests.append((path, sent))
        self.headers.append(http.headers)
        if path == "/api/chat" and path not in self.answers:
            if not sent["messages"]:
                return JSONResponse(chat_line(done=True, done_reason="load"))
            return StreamingResponse(self._stream(), media_type="application/x-ndjson")
        if path not in self.answers:
            return PlainTextResponse("404 page not found", 404)
        answer, status = self.answers[path]
        return PlainTextResponse(answer, status) if isinstance(answer, str) else JSONResponse(answer, status)

    async def _stream(self) -> AsyncIterator[bytes]:
        for line in self.chat:
            yield json.dumps(line, ensure_ascii=False).encode() + b"\n"
        if self.holds:
            try:
                await asyncio.Event().wait()
            finally:
                self.left.set()


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The app on a free port, in a thread; the address is yielded."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture(name="server")
def server_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[CLIServer]:
    """A running CLIServer, which the environment names as the one to talk to."""
    server = CLIServer()
    with serving(server.app) as server.address:
        monkeypatch.setenv("OLLAMA_HOST", server.address)
        yield server


@pytest.fixture(name="nobody")
def nobody_fixture(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a port that nobody listens on; the environment names it."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
    monkeypatch.setenv("OLLAMA_HOST", address)
    return address
