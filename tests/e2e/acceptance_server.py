"""What the acceptance tests ask the server with."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import httpx

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."
GREEDY = {"temperature": 0, "num_predict": 60}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}},
    },
}


def post(client: httpx.Client, path: str, **body: Any) -> httpx.Response:
    """A POST to a route of Ollama's, on the demo model if nothing else is said."""
    return client.post(f"/api/{path}", json={"model": "demo", **body})


def whole(client: httpx.Client, path: str, **body: Any) -> Any:
    """The answer in one object, greedy and without thinking if nothing else is said."""
    answer = post(client, path, **{"stream": False, "think": False, "options": GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(client: httpx.Client, path: str, **body: Any) -> list[Any]:
    """The objects of a stream, each on a line of its own."""
    answer = post(client, path, **{"think": False, "options": GREEDY, **body})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson"), answer.text
    assert answer.text.endswith("\n")
    assert "\n\n" not in answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def refused(answer: httpx.Response) -> tuple[int, str]:
    """Status and text of a refusal in Ollama's form."""
    assert answer.headers["content-type"].startswith("application/json")
    assert isinstance(answer.json()["error"], str)
    return answer.status_code, answer.json()["error"]


def rendered(client: httpx.Client, path: str, **body: Any) -> str:
    """The prompt that a request comes to."""
    answer = post(client, path, **{"think": False, **body}, _debug_render_only=True)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["_debug_info"]["rendered_template"])


def upload(client: httpx.Client, data: bytes) -> str:
    """Digest of a blob that the server has afterwards."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert client.post(f"/api/blobs/{digest}", content=data).status_code in {200, 201}
    return digest


def create(client: httpx.Client, name: str, **body: Any) -> list[str]:
    """What a `create` says."""
    answer = post(client, "create", model=name, **body)
    assert answer.status_code == 200, answer.text
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert lines[-1] == {"status": "success"}, lines
    return [line["status"] for line in lines]
