"""Every method of Ollama's package for Node, unmodified, and the wire below it as Ollama writes it."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from ollama_wire import LINES, hold_against_ollama
from recording import Exchange, recording
from registries import REGISTRY, docker_registry
from serving import Server, serving

NODE, NPM = shutil.which("node"), shutil.which("npm")
PACKAGE = "ollama@0.6.4"
PARIS = "The capital of France is Paris."
METHODS = {
    *("abort", "chat", "copy", "create", "delete", "embed", "embeddings", "generate", "list", "ps", "pull", "push"),
    *("show", "systemone", "version", "webFetch", "webSearch"),
}
ABORTED = {"name": "AbortError", "message": "This operation was aborted", "status": None}

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed"),
]


@pytest.fixture(scope="module")
def package(request: pytest.FixtureRequest) -> Path:
    """The installed package; it is kept between runs."""
    assert NPM
    assert request.config.cache
    root = request.config.cache.mkdir(PACKAGE.replace("@", "-js-"))
    entry = root / "node_modules/ollama/dist/index.mjs"
    if not entry.exists():
        command = [NPM, "install", "--prefix", str(root), "--no-audit", "--no-fund", "--ignore-scripts", PACKAGE]
        installed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        if installed.returncode:
            pytest.skip(f"npm cannot install {PACKAGE}: {installed.stderr.strip()[-200:]}")
    return entry


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that the package talks to."""
    with serving(tmp_path_factory.mktemp("house")) as running:
        yield running


@pytest.fixture(scope="module")
def talked(
    package: Path, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[Exchange]]:
    """What each method said, and everything that went over the wire."""
    assert NODE
    with ExitStack() as stack:
        remote = ""
        if REGISTRY:
            remote = f"{stack.enter_context(docker_registry(tmp_path_factory.mktemp('registry')))}/people/demo:v1"
        wire = stack.enter_context(recording(server.url))
        script = Path(__file__).with_name("ollama_node.mjs")
        command = [NODE, str(script), wire.url, str(package), remote]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), wire.exchanges()


@pytest.fixture
def said(talked: tuple[dict[str, Any], list[Exchange]]) -> dict[str, Any]:
    """What each method said."""
    return talked[0]


def test_no_method_is_forgotten(said: dict[str, Any]) -> None:
    """What the package offers is what the script calls."""
    assert set(said["methods"]) == METHODS


def test_the_wire_is_ollamas(talked: tuple[dict[str, Any], list[Exchange]]) -> None:
    """Each answer that was heard to its end, on every route that the package asks."""
    heard = [exchange for exchange in talked[1] if exchange.complete]
    for exchange in heard:
        if exchange.path != "/v1/systemone":
            hold_against_ollama(exchange)
    routes = {exchange.path for exchange in heard}
    assert routes >= {f"/api/{name}" for name in ("version", "tags", "ps", "show", "chat", "generate", "embed")}
    assert routes >= {f"/api/{name}" for name in ("embeddings", "create", "copy", "delete")}
    assert LINES in {exchange.headers["content-type"] for exchange in heard if exchange.path == "/api/chat"}


def test_answers(said: dict[str, Any]) -> None:
    """Whole and streamed alike, thinking apart."""
    assert said["chat"]["message"]["content"] == said["generate"]["response"] == PARIS
    assert "".join(part["message"]["content"] for part in said["chatStream"]) == PARIS
    assert "".join(part["response"] for part in said["generateStream"]) == PARIS
    thinking = "".join(part["message"].get("thinking", "") for part in said["chatStream"])
    assert thinking == said["chat"]["message"]["thinking"]
    assert said["format"]["message"]["content"].startswith("{")
    assert len(said["logprobs"]["logprobs"]) == said["logprobs"]["eval_count"] == 5


def test_tools(said: dict[str, Any]) -> None:
    """The same call, whole and streamed."""
    for parts in ([said["tools"]], said["toolsStream"]):
        (call,) = [call for part in parts for call in part["message"].get("tool_calls", ())]
        assert call["function"] == {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}}


def test_models(said: dict[str, Any]) -> None:
    """Listed, shown, running, made, copied and deleted."""
    assert [model["name"] for model in said["list"]["models"]] == ["demo:latest"]
    assert [model["name"] for model in said["ps"]["models"]] == ["demo:latest"]
    short, full = (said[which]["model_info"]["tokenizer.ggml.tokens"] for which in ("show", "verbose"))
    assert short is None
    assert full
    assert said["create"] == said["createStream"][-1] == said["copy"] == {"status": "success"}
    assert said["delete"] == [{"status": "success"}] * 2


def test_vectors(said: dict[str, Any]) -> None:
    """Rows for texts, one for the old method."""
    assert [len(row) for row in said["embed"]["embeddings"]] == [len(said["embeddings"]["embedding"])] * 2


@pytest.mark.skipif(REGISTRY is None, reason="Debian's package docker-registry is not installed")
def test_push_and_pull(said: dict[str, Any]) -> None:
    """To a registry and back, whole and streamed."""
    for verb in ("push", "pull"):
        assert said[verb] == said[f"{verb}Stream"][-1] == {"status": "success"}


def test_refusals(said: dict[str, Any]) -> None:
    """The package finds the text and the status where it looks for them."""
    told = {which: (refused["status"], refused["message"]) for which, refused in said["unknown"].items()}
    assert told.pop("systemone")[0] == 404
    assert told == {
        "chat": (404, "model 'nope' not found"),
        "stream": (404, "model 'nope' not found"),
        "show": (404, "model 'nope:latest' not found"),
        "delete": (404, "model 'nope' not found"),
        "copy": (404, 'model "nope" not found'),
        "embed": (404, 'model "nope" not found, try pulling it first'),
    }


def test_the_webs_methods_go_to_ollamas_own_host(said: dict[str, Any]) -> None:
    """Whatever host the client has."""
    assert said["abroad"] == ["https://ollama.com/api/web_search", "https://ollama.com/api/web_fetch"]


def test_abort_ends_the_generation(said: dict[str, Any], server: Server) -> None:
    """The script's loop ends with the package's own error, and the server works for nobody any more."""
    assert said["abort"] == said["abortOne"] == ABORTED
    deadline = time.monotonic() + 5
    while any(runner["in_flight"] for runner in httpx.get(f"{server.url}/admin/runners").json()["runners"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
