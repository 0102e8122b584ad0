"""A server with little memory, models in parts and models with adapters, as clients meet them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from random_models import split_model
from serving import Server, serving

pytestmark = pytest.mark.e2e

DEMO = Path(__file__).parents[2] / "engines/store/demo/demo.gguf"
LORA = Path(__file__).parent / "demo-lora.gguf"
PARIS = "The capital of France is Paris."


def install(root: Path, name: str, layers: Sequence[tuple[str, bytes]]) -> None:
    """A model of these layers, in Ollama's layout."""
    described = []
    for kind, data in (("", b"{}"), *layers):
        digest = hashlib.sha256(data).hexdigest()
        blob = root / "models/blobs" / f"sha256-{digest}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        media_type = (
            f"application/vnd.ollama.image.{kind}" if kind else "application/vnd.docker.container.image.v1+json"
        )
        described.append({"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)})
    manifest = root / "models/manifests/registry.ollama.ai/library" / name / "latest"
    manifest.parent.mkdir(parents=True)
    media_type = "application/vnd.docker.distribution.manifest.v2+json"
    config, *rest = described
    manifest.write_text(json.dumps({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": rest}))


def ask(server: Server, model: str = "demo", **options: Any) -> httpx.Response:
    """One greedy chat."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": model, "messages": messages, "stream": False, "options": {"temperature": 0, **options}}
    return httpx.post(f"{server.url}/api/chat", json=body, timeout=60)


def text(response: httpx.Response) -> str:
    """What was answered."""
    return str(response.raise_for_status().json()["message"]["content"])


@contextmanager
def house(root: Path, **env: str) -> Iterator[Server]:
    """A server with the demo model and whatever is installed."""
    with serving(root, **env) as server:
        yield server


def test_a_model_beyond_the_limit_is_refused_with_numbers(tmp_path: Path) -> None:
    """And the server goes on."""
    with house(tmp_path, HEADWATER_MEMORY_LIMIT="50MiB") as server:
        refused = ask(server)
        assert refused.status_code == 500
        assert refused.json()["error"] == "model requires more system memory (0.1 GiB) than is available (0.0 GiB)"
        assert httpx.get(f"{server.url}/api/ps").json() == {"models": []}
        row = httpx.get(f"{server.url}/admin/requests").json()["requests"][0]
        assert row["error_code"] == "out_of_memory"


def test_windows_shrink_to_what_memory_allows(tmp_path: Path) -> None:
    """The answer is the same; the log tells what was given up."""
    with house(tmp_path, HEADWATER_MEMORY_LIMIT="110MiB") as server:
        assert text(ask(server)) == PARIS
        assert "windows instead of 8, since memory is short" in server.log


def test_two_models_that_do_not_fit_together_take_turns(tmp_path: Path) -> None:
    """Whichever is asked for is loaded, and the other goes."""
    install(tmp_path, "twin", [("model", DEMO.read_bytes() + b"\0")])
    install(tmp_path, "demo", [("model", DEMO.read_bytes())])
    with house(tmp_path, HEADWATER_MEMORY_LIMIT="110MiB") as server:
        for model in ("demo", "twin", "demo"):
            assert text(ask(server, model)) == PARIS
            loaded = [entry["name"] for entry in httpx.get(f"{server.url}/api/ps").json()["models"]]
            assert loaded == [f"{model}:latest"]


def test_a_model_with_an_adapter_is_resident_beside_the_same_without(tmp_path: Path) -> None:
    """They share weights and nothing else."""
    install(tmp_path, "demo", [("model", DEMO.read_bytes())])
    install(tmp_path, "pirate", [("model", DEMO.read_bytes()), ("adapter", LORA.read_bytes())])
    with house(tmp_path) as server:
        for _ in range(2):
            assert text(ask(server)) == PARIS
            assert text(ask(server, "pirate")) == f"{PARIS} Arrr!"
        assert len(httpx.get(f"{server.url}/api/ps").json()["models"]) == 2
        assert server.log.count("loading ") == 2


def test_a_model_in_parts_is_listed_and_served_as_one(tmp_path: Path) -> None:
    """Its layers stand in any order, and its size is that of all."""
    folder = tmp_path / "parts"
    folder.mkdir()
    parts = split_model(DEMO, folder, 3)
    install(tmp_path, "parts", [("model", parts[index].read_bytes()) for index in (2, 0, 1)])
    install(tmp_path, "demo", [("model", DEMO.read_bytes())])
    with house(tmp_path) as server:
        assert text(ask(server, "parts")) == PARIS
        models = {entry["name"]: entry for entry in httpx.get(f"{server.url}/api/tags").json()["models"]}
        assert models["parts:latest"]["size"] == pytest.approx(DEMO.stat().st_size, rel=0.01)
        details = [models[name]["details"]["parameter_size"] for name in ("parts:latest", "demo:latest")]
        assert details[0] == details[1]
        counts = [
            httpx.post(f"{server.url}/api/show", json={"model": name}).json()["model_info"]["general.parameter_count"]
            for name in ("parts", "demo")
        ]
        assert counts[0] == counts[1]


def test_absurd_load_options_are_bounded(tmp_path: Path) -> None:
    """The request is answered all the same."""
    absurd: list[dict[str, Any]] = [
        {"num_batch": 10**9}, {"num_batch": -1}, {"num_thread": 10**9}, {"num_thread": -3}, {"num_gpu": 10**9},
        {"main_gpu": 99}, {"num_ctx": 10**9},
    ]  # fmt: skip
    with house(tmp_path) as server:
        for options in absurd:
            assert text(ask(server, **options)) == PARIS, options
