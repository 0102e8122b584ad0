"""Models made, copied and deleted over HTTP, by Ollama's own clients and by rougher ones."""

import asyncio
import hashlib
import itertools
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from fake_house import until
from store_samples import small_llama
from test_app import Running, serving

LIBRARY = "manifests/registry.ollama.ai/library"
DEMO_TEXT = {"model": "me", "from": "demo", "system": "Be brief."}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    """A whole server with the demo model."""
    async with serving(tmp_path, HEADWATER_MODELS_PATH=str(tmp_path / "folder")) as running:
        yield running


def digest_of(data: bytes) -> str:
    """As the wire has it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def blobs(server: Running) -> set[str]:
    """What is in the folder of blobs."""
    return {path.name for path in (server.root / "models" / "blobs").iterdir()}


async def test_the_official_client(server: Running) -> None:
    """Blobs, create, copy and delete as `ollama` for Python asks for them, streamed and whole."""
    path = server.root / "small.gguf"
    path.write_bytes(small_llama())
    async with ollama.AsyncClient(host=server.url) as client:
        digest = await client.create_blob(path)
        assert digest == digest_of(small_llama())
        assert await client.create_blob(path) == digest
        made = await client.create(
            "mine",
            files={"small.gguf": digest},
            system="Be brief.",
            license=["one", "two"],
            parameters={"temperature": 0.5},
            messages=[ollama.Message(role="user", content="hi")],
        )
        assert made.status == "success"
        steps = [step.status async for step in await client.create("other", from_="mine", system="No.", stream=True)]
        assert (steps[0], steps[-2:]) == (f"using existing layer {digest}", ["writing manifest", "success"])
        shown = await client.show("other")
        assert (shown.license, shown.parameters) == ("one\ntwo", "temperature                    0.5")
        assert "SYSTEM No." in (shown.modelfile or "")
        assert (await client.copy("other", "ns/third")).status == "success"
        assert (await client.delete("OTHER")).status == "success"
        assert {model.model for model in (await client.list()).models} == {
            "demo:latest",
            "mine:latest",
            "ns/third:latest",
        }
        for name in ("mine", "ns/third"):
            await client.delete(name)
        assert digest.replace(":", "-") not in blobs(server)
        with pytest.raises(ollama.ResponseError, match=r"^model 'other' not found") as missing:
            await client.delete("other")
        assert missing.value.status_code == 404
        with pytest.raises(ollama.ResponseError, match="neither 'from' or 'files' was specified"):
            await client.create("other")


async def test_the_synchronous_client(server: Running) -> None:
    """Its upload has a length, the other one comes in chunks."""
    path = server.root / "small.gguf"
    path.write_bytes(small_llama())

    def talk() -> None:
        with ollama.Client(host=server.url) as client:
            files = {"small.gguf": client.create_blob(path)}
            assert [step.status for step in client.create("mine", files=files, stream=True)][-1] == "success"

    await asyncio.to_thread(talk)


REFUSALS: list[tuple[str, dict[str, Any], int, str]] = [
    ("create", {"model": "x"}, 400, "neither 'from' or 'files' was specified"),
    ("create", {"from": "demo"}, 400, "invalid model name"),
    ("create", {"model": "../x", "from": "demo"}, 400, "invalid model name"),
    ("create", {"model": "x", "from": "a//b"}, 400, "invalid model name"),
    ("create", {"model": "x", "files": {"/a": "b"}}, 400, "file path must be relative"),
    ("create", {"model": "x", "files": {"a": "b"}}, 400, "invalid digest format"),
    ("create", {"model": "x", "files": {}}, 400, "unknown type"),
    ("create", {"model": "x", "from": "demo", "template": "{{ if }"}, 400, "template error: template: :1: "),
    ("create", {"model": "x", "from": "demo", "quantize": "q4_K_M"}, 500, "quantization is only supported for F16"),
    ("create", {"model": "x", "from": "demo", "license": 1}, 400, "json: cannot unmarshal"),
    ("create", {"model": "x", "from": "demo:cloud"}, 403, "ollama cloud is disabled: remote model is unavailable"),
    ("create", {"model": 1}, 400, "json: cannot unmarshal number into Go struct field CreateRequest.model of type"),
    ("copy", {"source": "", "destination": "b"}, 400, 'source "" is invalid'),
    ("copy", {"source": "demo", "destination": "b/"}, 400, 'destination "b/" is invalid'),
    ("copy", {"source": "nope", "destination": "b"}, 404, 'model "nope" not found'),
    ("copy", {"source": "folded", "destination": "b"}, 403, "which is only read here"),
    ("create", {"model": "x", "from": "folded"}, 403, "which is only read here"),
    ("delete", {}, 400, "model is required"),
    ("delete", {"name": "-"}, 400, 'name "-" is invalid'),
    ("delete", {"model": "nope"}, 404, "model 'nope' not found"),
    ("delete", {"model": "folded"}, 403, "which is only read here"),
]


async def test_refusals(server: Running) -> None:
    """With Ollama's words, and a real status for whatever is known before the first step."""
    (server.root / "folder").mkdir()
    (server.root / "folder" / "folded.gguf").write_bytes(small_llama())
    before = blobs(server)
    for (path, body, status, message), stream in itertools.product(REFUSALS, (True, False)):
        method = "DELETE" if path == "delete" else "POST"
        response = await server.http.request(method, f"/api/{path}", json={**body, "stream": stream})
        content_type = response.headers["content-type"].partition(";")[0]
        assert (response.status_code, content_type) == (status, "application/json"), body
        assert message in response.json()["error"]
        assert blobs(server) == before


async def test_the_wire_of_create(server: Running) -> None:
    """One object a line while it goes on, or the last one alone; a failure on the way is the last line."""
    response = await server.http.post("/api/create", json=DEMO_TEXT)
    assert response.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line)["status"].split()[0] for line in response.text.splitlines()] == [
        "using",
        "creating",
        "writing",
        "success",
    ]
    response = await server.http.post("/api/create", json={**DEMO_TEXT, "stream": False, "name": "ignored"})
    assert (response.headers["content-type"], response.content) == ("application/json", b'{"status":"success"}')
    digest = digest_of(b"text")
    assert (await server.http.post(f"/api/blobs/{digest}", content=b"text")).status_code == 201
    response = await server.http.post("/api/create", json={"model": "x", "files": {"a.gguf": digest}})
    assert response.status_code == 200
    assert [json.loads(line) for line in response.text.splitlines()] == [
        {"status": "parsing GGUF"},
        {"error": "supplied file was not in GGUF format"},
    ]


async def test_the_wire_of_blobs(server: Running) -> None:
    """Statuses, bodies and words of blobs; what has another digest is not kept."""
    there, data = next(iter(blobs(server))).replace("-", ":", 1), os.urandom(3 << 20)
    digest = digest_of(data)
    assert (await server.http.head(f"/api/blobs/{there}")).status_code == 200
    assert (await server.http.head(f"/api/blobs/{digest}")).status_code == 404
    assert (await server.http.head("/api/blobs/sha256:x")).status_code == 400
    assert (await server.http.get(f"/api/blobs/{there}")).status_code == 405
    response = await server.http.post("/api/blobs/sha256:x", content=b"")
    assert (response.status_code, response.json()) == (400, {"error": "invalid digest format"})
    before = blobs(server)
    response = await server.http.post(f"/api/blobs/{digest}", content=data[1:])
    got = digest_of(data[1:])
    assert response.json() == {"error": f'digest mismatch, expected "{digest}", got "{got}"'}
    assert blobs(server) == before
    response = await server.http.post(f"/api/blobs/{digest}", content=data)
    assert (response.status_code, response.content) == (201, b"")
    response = await server.http.post(f"/api/blobs/{digest.replace(':', '-')}", content=b"not read")
    assert (response.status_code, response.content) == (200, b"")
    assert blobs(server) == before | {digest.replace(":", "-")}


async def test_copy_and_delete_answer_with_nothing(server: Running) -> None:
    """But the status, which clients compare with 200."""
    for method, path, body in (
        ("POST", "/api/copy", {"source": "demo", "destination": "two"}),
        ("POST", "/api/copy", {"source": "demo", "destination": "DEMO"}),
        ("DELETE", "/api/delete", {"name": "two"}),
    ):
        response = await server.http.request(method, path, json=body)
        assert (response.status_code, response.content) == (200, b"")
    assert [path.name for path in (server.root / "models" / LIBRARY).iterdir()] == ["demo"]


async def test_an_upload_that_breaks_off_leaves_nothing(server: Running) -> None:
    """Nothing of it is visible on the way, and nothing is left of it after."""
    before = blobs(server)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /api/blobs/{digest_of(b'x')} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9000000\r\n\r\n"
        await asyncio.to_thread(connection.sendall, head.encode() + bytes(4 << 20))
        await until(lambda: blobs(server) > before)
        assert all(name.startswith(".") for name in blobs(server) - before)
    await until(lambda: blobs(server) == before)


async def test_many_at_once(server: Running) -> None:
    """Creates, copies and deletions of the same names: answers are what they can be, and the store is whole."""

    async def create(number: int) -> int:
        body = {"model": f"x{number % 2}", "from": "demo", "system": str(number), "stream": False}
        return (await server.http.post("/api/create", json=body)).status_code

    async def delete(number: int) -> int:
        return (await server.http.request("DELETE", "/api/delete", json={"model": f"x{number % 2}"})).status_code

    async def copy(number: int) -> int:
        body = {"source": f"x{number % 2}", "destination": f"x{(number + 1) % 2}"}
        return (await server.http.post("/api/copy", json=body)).status_code

    statuses = await asyncio.gather(*(work(n) for n in range(12) for work in (create, delete, copy)))
    assert set(statuses) <= {200, 404}
    models = (await server.http.get("/api/tags")).json()["models"]
    for model in models:
        shown = await server.http.post("/api/show", json={"model": model["name"]})
        assert shown.status_code == 200
    assert "demo:latest" in {model["name"] for model in models}


async def test_a_running_model_may_be_deleted(server: Running) -> None:
    """What is loaded goes on; the next request finds no such model."""
    assert (await server.chat()).status_code == 200
    response = await server.http.request("DELETE", "/api/delete", json={"model": "demo"})
    assert response.status_code == 200
    assert [model["name"] for model in (await server.http.get("/api/ps")).json()["models"]] == ["demo:latest"]
    assert (await server.chat()).status_code == 404


async def test_a_folders_model_is_listed_and_served(server: Running) -> None:
    """Without a restart, as soon as its file is there."""
    (server.root / "folder").mkdir()
    (server.root / "folder" / "New-Model.gguf").write_bytes(small_llama())
    assert "New-Model:latest" in (await server.http.get("/api/tags")).text
    response: httpx.Response = await server.http.post("/api/generate", json={"model": "new-model"})
    assert response.json()["done_reason"] == "load"
