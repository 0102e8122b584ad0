"""Rows 1 to 13 of the acceptance list: transport, tags, ps, show."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from datetime import datetime

import httpx
import pytest
from acceptance_server import create, post, refused
from serving import serving

pytestmark = pytest.mark.e2e
JSON = "application/json; charset=utf-8"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with the demo model."""
    with serving(tmp_path_factory.mktemp("simple")) as server, httpx.Client(base_url=server.url, timeout=60) as opened:
        yield opened


def test_row_01_root(client: httpx.Client) -> None:
    """The exact text, also asked with HEAD."""
    got = client.get("/")
    assert (got.status_code, got.text) == (200, "Ollama is running")
    assert got.headers["content-type"] == "text/plain; charset=utf-8"
    assert client.head("/").status_code == 200


def test_row_02_version(client: httpx.Client) -> None:
    """Dotted numbers, without a newline."""
    got = client.get("/api/version")
    assert re.fullmatch(r'\{"version":"\d+\.\d+\.\d+"\}', got.text)
    assert got.headers["content-type"] == JSON
    assert client.head("/api/version").status_code == 200


def test_row_03_paths_and_methods(client: httpx.Client) -> None:
    """Both in plain text."""
    for path in ("/nothing", "/api/nothing"):
        got = client.get(path)
        assert (got.status_code, got.text) == (404, "404 page not found")
        assert got.headers["content-type"].startswith("text/plain")
    got = client.get("/api/chat")
    assert (got.status_code, got.text, got.headers["allow"]) == (405, "405 method not allowed", "POST")
    assert client.head("/api/ps").status_code == 405
    assert client.get("/api/tags/").status_code == 301
    assert client.post("/api/chat/", content=b"{}").status_code == 307


@pytest.mark.parametrize("path", ["chat", "generate", "show", "embed", "embeddings", "pull", "push", "create", "copy"])
def test_row_04_bodies(client: httpx.Client, path: str) -> None:
    """An empty body is told; `{}` and `null` are not empty."""
    assert refused(client.post(f"/api/{path}")) == (400, "missing request body")
    for body in (b"{}", b"null"):
        assert "missing request body" not in client.post(f"/api/{path}", content=body).text
    assert client.post(f"/api/{path}", content=b"{").status_code == 400


def test_row_04_delete(client: httpx.Client) -> None:
    """DELETE has a body too."""
    assert refused(client.delete("/api/delete")) == (400, "missing request body")


def test_row_04_fields(client: httpx.Client) -> None:
    """A form's content type, unknown, null and differently spelled fields are all taken."""
    body = b'{"MODEL":"demo","options":null,"nonsense":[1],"Verbose":null} trailing'
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/api/show?ts=1", content=body, headers=headers).status_code == 200


def test_row_05_origins(client: httpx.Client) -> None:
    """Foreign ones are refused, also for simple requests; those of this machine are not."""
    for method in ("GET", "OPTIONS", "POST"):
        got = client.request(method, "/api/tags", headers={"origin": "https://evil.example"})
        assert (got.status_code, got.content) == (403, b"")
    for origin in ("http://localhost", "http://localhost:3000", "https://127.0.0.1:1", "app://x", "tauri://localhost"):
        got = client.get("/api/tags", headers={"origin": origin})
        assert (got.status_code, got.headers["access-control-allow-origin"]) == (200, origin)
    preflight = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    got = client.options("/api/chat", headers=preflight)
    assert (got.status_code, got.headers["access-control-max-age"]) == (204, "43200")
    assert got.headers["access-control-allow-methods"] == "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
    assert "x-stainless-retry-count" in got.headers["access-control-allow-headers"].lower()
    same = client.get("/api/tags", headers={"host": "foo.local", "origin": "http://foo.local"})
    assert same.status_code == 200
    assert "access-control-allow-origin" not in same.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("8.8.8.8", 403),
        ("localhost:1", 200),
        ("192.168.1.1", 200),
        ("[::1]:5", 200),
        ("0.0.0.0", 200),
        ("a.LOCAL", 200),
        ("a.internal", 200),
        ("x.localhost", 200),
        (socket.gethostname(), 200),
    ],
)
def test_row_06_hosts(client: httpx.Client, host: str, status: int) -> None:
    """On a loopback address only names of this machine and private addresses are served."""
    got = client.get("/api/version", headers={"host": host})
    assert got.status_code == status
    assert status == 200 or got.content == b""


def test_row_06_any_host_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A server that listens everywhere checks nothing."""
    with serving(tmp_path_factory.mktemp("wide"), host="0.0.0.0") as server:
        assert httpx.get(f"{server.url}/api/version", headers={"host": "evil.example"}).status_code == 200


def test_row_07_tags(client: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Named with their tags, newest first, changes seen at once, an empty list where there is nothing."""
    create(client, "newer", **{"from": "demo", "system": "S"})
    models = client.get("/api/tags").json()["models"]
    assert {"newer:latest", "demo:latest"} <= {model["name"] for model in models}
    times = [datetime.fromisoformat(model["modified_at"]).replace(microsecond=0) for model in models]
    assert times == sorted(times, reverse=True)
    for model in models:
        assert model["name"] == model["model"]
        assert re.fullmatch("[0-9a-f]{64}", model["digest"])
    sizes = {model["name"]: model["size"] for model in models}
    assert sizes["newer:latest"] > 2_000_000
    client.request("DELETE", "/api/delete", json={"model": "newer"})
    assert "newer" not in client.get("/api/tags").text
    with serving(tmp_path_factory.mktemp("empty")) as server:
        httpx.request("DELETE", f"{server.url}/api/delete", json={"model": "demo"}).raise_for_status()
        assert httpx.get(f"{server.url}/api/tags").text == '{"models":[]}'


def test_row_08_details(client: httpx.Client) -> None:
    """All keys, in their order."""
    details = client.get("/api/tags").json()["models"][0]["details"]
    assert list(details) == [
        "parent_model",
        "format",
        "family",
        "families",
        "parameter_size",
        "quantization_level",
        "context_length",
        "embedding_length",
    ]
    assert client.head("/api/tags").status_code == 200


def test_row_09_ps(client: httpx.Client) -> None:
    """What is loaded, with its window, and until when."""
    assert client.get("/api/ps").text == '{"models":[]}'
    post(client, "generate", options={"num_ctx": 1024}, keep_alive=60)
    first = client.get("/api/ps").json()["models"][0]
    assert (first["context_length"], first["size_vram"]) == (1024, 0)
    assert first["size"] > 0
    assert first["name"] == first["model"] == "demo:latest"
    assert list(first)[-2:] == ["size_vram", "context_length"]
    post(client, "generate", options={"num_ctx": 1024}, keep_alive=-1)
    forever = client.get("/api/ps").json()["models"][0]
    assert datetime.fromisoformat(forever["expires_at"]).year > 2100
    assert forever["expires_at"] > first["expires_at"]
    post(client, "embed", input="text", keep_alive=60)  # loads it for vectors, beside the one that writes
    times = [model["expires_at"] for model in client.get("/api/ps").json()["models"]]
    assert len(times) == 2
    assert times == sorted(times, reverse=True)


def test_row_10_show_names(client: httpx.Client) -> None:
    """By either field, and refusals that name the model in full."""
    assert client.post("/api/show", json={"name": "DEMO"}).status_code == 200
    shown = client.post("/api/show", json={"model": "", "name": "demo"})
    assert isinstance(shown.json()["model_info"], dict)
    assert refused(post(client, "show", model="nope")) == (404, "model 'nope:latest' not found")
    assert refused(post(client, "show", model="")) == (400, "model is required")
    assert refused(post(client, "show", model="a/b/c/d")) == (400, "invalid model name")


def test_row_11_model_info(client: httpx.Client) -> None:
    """Metadata without the name and the template, with the number of parameters; arrays only on demand."""
    info = post(client, "show").json()["model_info"]
    assert info["tokenizer.ggml.tokens"] is None
    assert "general.name" not in info
    assert "tokenizer.chat_template" not in info
    assert info["general.parameter_count"] == 2742720
    copilot = client.post("/api/show", json={"model": "demo"}, headers={"user-agent": "GitHubCopilotChat/1"})
    assert copilot.json()["model_info"]["general.basename"] == "demo"


def test_row_12_show_texts(client: httpx.Client) -> None:
    """Parameters in columns, a Modelfile that says where it comes from, and what the model can."""
    parameters = {"stop": ["<a>", "b c"], "temperature": 0.5, "num_ctx": 512}
    create(client, "texts", **{"from": "demo", "system": "Be brief.", "parameters": parameters})
    shown = post(client, "show", model="texts").json()
    lines = sorted(shown["parameters"].splitlines())
    column = 31
    assert lines == sorted(
        f"{name:<{column - 1}} {value}"
        for name, value in [("num_ctx", "512"), ("stop", '"<a>"'), ("stop", '"b c"'), ("temperature", "0.5")]
    )
    assert shown["modelfile"].startswith('# Modelfile generated by "ollama show"\n')
    assert "# FROM texts:latest" in shown["modelfile"]
    assert "\nSYSTEM Be brief.\n" in shown["modelfile"]
    assert shown["system"] == "Be brief."
    assert shown["template"] == post(client, "show").json()["template"]
    assert set(shown["capabilities"]) == {"completion", "tools", "insert", "thinking"}


def test_row_13_verbose(client: httpx.Client) -> None:
    """Arrays in full; tensors in either case."""
    shown = post(client, "show", verbose=True).json()
    assert len(shown["model_info"]["tokenizer.ggml.tokens"]) == 1984
    assert set(shown["tensors"][0]) == {"name", "type", "shape"}
    assert post(client, "show").json()["tensors"] == shown["tensors"]
