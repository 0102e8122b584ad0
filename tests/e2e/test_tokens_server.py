"""Token ids of real models, compared with llama.cpp's own binding."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from encoders import CLS, SEP, Encoder, write_encoder
from serving import Server, serving, workers_of
from store_samples import OllamaDirectory

pytestmark = pytest.mark.e2e

DEMO = Path(__file__).parents[2] / "engines/store/demo/demo.gguf"
TEXTS = ["", "What is 2+2?", " leading", "<|im_start|>user\n", "déjà vu \N{PILE OF POO}", "a" * 40_000]

REFERENCE = """
import json, sys, llama_cpp
path, texts = json.loads(sys.stdin.read())
model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
print(json.dumps([model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the demo and an encoder."""
    root = tmp_path_factory.mktemp("tokens")
    directory = OllamaDirectory(root / "models")
    for name, path in {"demo": DEMO, "encoder": write_encoder(root / "encoder.gguf", Encoder())}.items():
        directory.model(f"registry.ollama.ai/library/{name}/latest", [directory.layer("model", path.read_bytes())])
    with serving(root) as running:
        yield running


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    """A plain POST."""
    return httpx.post(server.url + path, json={"model": "demo", **body}, timeout=60)


def test_token_ids_are_llama_cpps_own(server: Server) -> None:
    """And lead back to the text, whatever it is."""
    asked = json.dumps([str(DEMO), TEXTS[:-1]])
    done = subprocess.run([sys.executable, "-c", REFERENCE], input=asked, capture_output=True, text=True, check=True)
    for text, expected in zip(TEXTS, json.loads(done.stdout), strict=False):
        found = post(server, "/api/tokenize", content=text).json()
        assert found["tokens"] == expected
    for text in TEXTS:
        tokens = post(server, "/api/tokenize", text=text).json()["tokens"]
        assert post(server, "/api/detokenize", tokens=tokens).json()["content"] == text


def test_markers_are_tokens_unless_they_are_text(server: Server) -> None:
    """A client that counts what a user typed wants the second."""
    as_marker = post(server, "/api/tokenize", content="<|im_start|>").json()["tokens"]
    as_text = post(server, "/api/tokenize", content="<|im_start|>", parse_special=False).json()["tokens"]
    assert len(as_marker) == 1 < len(as_text)


def test_a_model_for_vectors_shows_its_tokens_too(server: Server) -> None:
    """With what it puts around every text, on request."""
    plain = post(server, "/api/tokenize", model="encoder", content="the cat").json()["tokens"]
    whole = post(server, "/api/tokenize", model="encoder", content="the cat", add_special=True).json()["tokens"]
    assert whole == [CLS, *plain, SEP]


def test_bad_ids_are_refused_and_the_worker_lives(server: Server) -> None:
    """No id reaches llama.cpp that is none: it would end the process."""
    post(server, "/api/tokenize", content="a")
    before = workers_of(server)
    for tokens in ([10**9], [1, 2, 10**6], [2**31 - 1]):
        refused = post(server, "/api/detokenize", tokens=tokens)
        assert refused.status_code == 400
        assert "is not in this model's vocabulary" in refused.json()["error"]
    assert post(server, "/api/detokenize", tokens=[1]).status_code == 200
    assert workers_of(server) == before


def test_a_text_of_megabytes_is_answered(server: Server) -> None:
    """Runs of one kind of character overflow the stack of llama.cpp's pre-tokenizer when they come whole."""
    found = post(server, "/api/tokenize", content="x" * (4 << 20))
    assert found.status_code == 200
    assert post(server, "/api/tokenize", content="x" * (4 << 20) + "x").status_code == 400
