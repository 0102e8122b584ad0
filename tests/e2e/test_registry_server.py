"""Models to a registry and back through the whole house, by the clients that people use."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from registries import docker_registry, needs_registry
from serving import Server, serving

from engines.store.blobs import blob_path
from engines.store.manifests import manifest_path, read_manifest
from engines.store.names import parse_name

pytestmark = [pytest.mark.e2e, needs_registry]

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real registry."""
    with docker_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that has the model."""
    with serving(tmp_path_factory.mktemp("here")) as running:
        yield running


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that gets it."""
    with serving(tmp_path_factory.mktemp("there")) as running:
        yield running


def headwater(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, talking to that server."""
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OLLAMA_HOST": server.url},
    )


def test_ollamas_client_pushes_and_pulls_a_model_that_then_answers(registry: str, here: Server, there: Server) -> None:
    """From one server to another by a registry between them; the manifest is the same to the byte."""
    name = f"{registry}/library/demo:latest"
    with closing(ollama.Client(here.url)) as mine, closing(ollama.Client(there.url)) as theirs:
        mine.copy("demo", name)
        said = [step.status for step in mine.push(name, insecure=True, stream=True)]
        assert said[0] == "retrieving manifest"
        assert said[-2:] == ["pushing manifest", "success"]
        said = [step.status for step in theirs.pull(name, insecure=True, stream=True)]
        assert said[0] == "pulling manifest"
        assert said[-3:] == ["verifying sha256 digest", "writing manifest", "success"]
        assert name in [model.model for model in theirs.list().models]
        answer: Any = theirs.chat(name, messages=FRANCE, think=False)
        assert answer.message.content == "The capital of France is Paris."
        assert theirs.pull(name, insecure=True).status == "success"
    parsed = parse_name(name)
    manifests = [manifest_path(server.root / "models", parsed).read_bytes() for server in (here, there)]
    assert manifests[0] == manifests[1]


def test_the_command_line_pushes_and_pulls(registry: str, here: Server, there: Server) -> None:
    """In words for people, and in JSON for programs."""
    name = f"{registry}/people/demo:v1"
    httpx.post(f"{here.url}/api/copy", json={"source": "demo", "destination": name}).raise_for_status()
    pushed = headwater(here, "push", name, "--insecure")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stderr.splitlines()[-1] == "success"
    pulled = headwater(there, "pull", name, "--insecure", "--json")
    assert pulled.returncode == 0, pulled.stderr
    steps = [json.loads(line) for line in pulled.stdout.splitlines()]
    assert steps[-1] == {"status": "success"}
    digest = read_manifest(there.root / "models", parse_name(name))[0].layers[0].digest
    assert any(step.get("digest") == digest and step["completed"] == step["total"] for step in steps)


def test_failures_are_told_and_leave_nothing(registry: str, there: Server) -> None:
    """In Ollama's words, by the API and by the command line."""
    name = f"{registry}/library/nothing"
    lines = httpx.post(f"{there.url}/api/pull", json={"model": name, "insecure": True}).text.splitlines()
    assert json.loads(lines[-1]) == {"error": "pull model manifest: file does not exist"}
    whole = httpx.post(f"{there.url}/api/pull", json={"model": name, "insecure": True, "stream": False})
    assert (whole.status_code, whole.json()) == (500, {"error": "pull model manifest: file does not exist"})
    failed = headwater(there, "pull", name, "--insecure")
    assert (failed.returncode, failed.stderr.splitlines()[-1]) == (1, "Error: pull model manifest: file does not exist")
    secure = headwater(there, "pull", name)
    assert secure.returncode == 1
    assert "pull model manifest: Get" in secure.stderr


def test_a_name_that_says_http_allows_it(registry: str, here: Server, there: Server) -> None:
    """`http://` before a name is as good as `insecure`."""
    name = f"{registry}/library/scheme:latest"
    httpx.post(f"{here.url}/api/copy", json={"source": "demo", "destination": name}).raise_for_status()
    for server, verb in ((here, "push"), (there, "pull")):
        done = httpx.post(f"{server.url}/api/{verb}", json={"model": f"http://{name}", "stream": False}, timeout=30)
        assert done.json() == {"status": "success"}


def test_a_mirror_from_the_environment_is_asked_first(registry: str, here: Server, tmp_path: Path) -> None:
    """HEADWATER_REGISTRY_MIRROR stands in for Ollama's own registry."""
    name = f"{registry}/library/mirrored:latest"
    httpx.post(f"{here.url}/api/copy", json={"source": "demo", "destination": name}).raise_for_status()
    assert headwater(here, "push", name, "--insecure").returncode == 0
    with serving(tmp_path, HEADWATER_REGISTRY_MIRROR=f"http://{registry}") as mirrored:
        done = httpx.post(f"{mirrored.url}/api/pull", json={"model": "mirrored", "stream": False}, timeout=30)
        assert done.json() == {"status": "success"}
        assert httpx.post(f"{mirrored.url}/api/show", json={"model": "mirrored"}).status_code == 200


def test_a_server_that_is_killed_in_a_pull_goes_on_after_its_restart(
    registry: str, here: Server, tmp_path: Path
) -> None:
    """Nothing half is visible in between, and the next pull ends well."""
    name = f"{registry}/library/demo:latest"
    httpx.post(f"{here.url}/api/copy", json={"source": "demo", "destination": name}).raise_for_status()
    assert headwater(here, "push", name, "--insecure").returncode == 0
    body = {"model": name, "insecure": True}
    with serving(tmp_path) as killed, httpx.stream("POST", f"{killed.url}/api/pull", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        killed.kill()
        with pytest.raises(httpx.TransportError):
            list(lines)
    models = tmp_path / "models"
    if manifest_path(models, parse_name(name)).exists():
        for layer in read_manifest(models, parse_name(name))[0].layers:
            assert blob_path(models, layer.digest).stat().st_size == layer.size
    with serving(tmp_path) as restarted:
        done = httpx.post(
            f"{restarted.url}/api/pull", json={"model": name, "insecure": True, "stream": False}, timeout=30
        )
        assert done.json() == {"status": "success"}


def test_stopping_the_server_ends_a_pull(here: Server, tmp_path: Path) -> None:
    """A registry that never answers does not hold up the end."""
    with socket.create_server(("127.0.0.1", 0)) as silent, serving(tmp_path, HEADWATER_SHUTDOWN_GRACE="1s") as stopped:
        name = f"127.0.0.1:{silent.getsockname()[1]}/library/m"
        asking = threading.Thread(
            target=lambda: subprocess.run(
                [sys.executable, "-m", "gateway", "pull", name],
                env={**os.environ, "OLLAMA_HOST": stopped.url},
                check=False,
                capture_output=True,
            )
        )
        asking.start()
        silent.accept()[0].close()  # the first try, over https
        time.sleep(0.2)
        began = time.monotonic()
        assert stopped.stop() == 0
        assert time.monotonic() - began < 10
        asking.join(10)


def test_dockers_form_of_a_pull(here: Server, there: Server, registry: str) -> None:
    """With lines as Docker's command line reads them; the second time there is nothing to fetch."""
    name = f"{registry}/team/docker:1"
    with closing(ollama.Client(here.url)) as source:
        source.copy("demo", name)
        source.push(name, insecure=True)
    said = [_create(there, name) for _ in range(2)]
    assert [lines[-1]["message"] for lines in said] == [
        "Model pulled successfully",
        f"Using cached model: {said[1][-1]['total'] / 1e6:.2f}MB",
    ]
    assert {line["type"] for line in said[0][:-1]} <= {"progress"}
    assert len(said[1]) == 1
    with closing(ollama.Client(there.url)) as target:
        assert "Paris" in str(target.chat(name, FRANCE, think=False).message.content)
    missing = httpx.post(f"{there.url}/models/create", json={"from": f"{registry}/team/nothing"}, timeout=60)
    assert (missing.status_code, missing.text) == (404, "Model not found\n")


def _create(server: Server, name: str) -> list[Any]:
    headers = {"Accept": "application/json"}
    answer = httpx.post(f"{server.url}/models/create", json={"from": name}, headers=headers, timeout=60)
    return [json.loads(line) for line in answer.raise_for_status().text.splitlines()]
