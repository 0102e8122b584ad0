"""Models that run on another server: listed and shown, and used by nobody."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from ollama_fakes import FakeServices, card, serving

STUB = card(
    "far:latest",
    "tools",
    remote_host="https://ollama.com",
    remote_model="gpt-oss:120b",
    family="gptoss",
    parameter_size="116.8B",
)
REFUSED = "ollama cloud is disabled: remote model is unavailable"


async def ask(method: str, path: str, **body: Any) -> httpx.Response:
    """What a real server with the stub alone answers."""
    services = FakeServices(cards=[STUB])
    services.metadata = {"general.architecture": "gptoss"}
    async with serving(services) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.request(method, path, content=json.dumps(body) if body else None)
    assert not services.requests
    assert not services.loads
    assert not services.unloads
    return answer


async def test_tags_tell_where_a_model_runs() -> None:
    """Right behind its names."""
    (model,) = (await ask("GET", "/api/tags")).json()["models"]
    assert list(model)[:5] == ["name", "model", "remote_model", "remote_host", "modified_at"]
    assert (model["remote_model"], model["remote_host"]) == ("gpt-oss:120b", "https://ollama.com")


async def test_show_tells_where_a_model_runs() -> None:
    """Between its messages and its header, of which it has none."""
    shown = (await ask("POST", "/api/show", model="far")).json()
    assert (shown["remote_model"], shown["remote_host"]) == ("gpt-oss:120b", "https://ollama.com")
    names = list(shown)
    assert names.index("details") < names.index("remote_model") < names.index("remote_host") < names.index("model_info")
    assert shown["model_info"] == {"general.architecture": "gptoss"}
    assert "\nFROM far:latest\n" in shown["modelfile"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/api/chat", {"messages": [], "keep_alive": 0}),
        ("/api/chat", {"messages": [{"role": "user", "content": "hi"}], "think": True}),
        ("/api/generate", {"prompt": "hi"}),
        ("/api/generate", {"prompt": "", "keep_alive": 0}),
        ("/api/embed", {"input": "hi"}),
        ("/api/embeddings", {"prompt": "hi"}),
        ("/api/rerank", {"query": "hi", "documents": ["a"]}),
    ],
)
async def test_nothing_is_asked_of_it(path: str, body: dict[str, Any]) -> None:
    """Whatever else is wrong with the request, as from an Ollama without a cloud."""
    answer = await ask("POST", path, model="far", **body)
    assert (answer.status_code, answer.json()) == (403, {"error": REFUSED})


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/show"])
async def test_who_insists_on_this_machine_finds_nothing(path: str) -> None:
    """`:local` is no name for a stub."""
    answer = await ask("POST", path, model="far:local", prompt="hi")
    assert answer.status_code == 404
    assert "not found" in answer.json()["error"]
