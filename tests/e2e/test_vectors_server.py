"""The whole house with real encoders, asked by the clients that people use for embeddings and reranking."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import ollama
import openai
import pytest
from encoders import CLS, SEP, VOCABULARY, Encoder, write_encoder
from serving import Server, serving
from store_samples import OllamaDirectory

pytestmark = pytest.mark.e2e

DEMO = Path(__file__).parents[2] / "engines/store/demo/demo.gguf"
MODELS = {
    "mean": Encoder(),
    "cls": Encoder(pooling=gguf.PoolingType.CLS),
    "ranker": Encoder(pooling=None, num_classes=1),
    "none": Encoder(pooling=gguf.PoolingType.NONE),
}
TEXTS = ["the cat", "the dog", "", "king queen fish", "a" * 40]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the demo and four encoders; it has room for all of them."""
    root = tmp_path_factory.mktemp("vectors")
    directory = OllamaDirectory(root / "models")
    files = {name: write_encoder(root / f"{name}.gguf", encoder) for name, encoder in MODELS.items()}
    for name, path in (files | {"demo": DEMO}).items():
        layers = [directory.layer("model", path.read_bytes())]
        directory.model(f"registry.ollama.ai/library/{name}/latest", layers)
    with serving(root, OLLAMA_MAX_LOADED_MODELS="8") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    """An unmodified Ollama client."""
    with closing(ollama.Client(server.url)) as opened:
        yield opened


@pytest.fixture
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    """An unmodified OpenAI client."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


REFERENCE = """
import json, sys, llama_cpp
path, pooling, inputs = json.loads(sys.stdin.read())
model = llama_cpp.Llama(path, embedding=True, pooling_type=pooling, n_ctx=0, n_threads=1, verbose=False)
def pooled(tokens):
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 1, 0
    assert llama_cpp.llama_decode(model.ctx, batch) == 0
    return llama_cpp.llama_get_embeddings_seq(model.ctx, 0)[0]
print(json.dumps([model.embed(each, normalize=True) if isinstance(each, str) else pooled(each) for each in inputs]))
"""


def one_by_one(path: Path, inputs: Sequence[str | list[int]], pooling: int = -1) -> list[Any]:
    """llama-cpp-python's own vectors of texts, or scores of token ids, one at a time, from a process of its own."""
    asked = json.dumps([str(path), pooling, list(inputs)])
    program = [sys.executable, "-c", REFERENCE]
    done = subprocess.run(program, input=asked, stdout=subprocess.PIPE, text=True, check=True, cwd=path.parent)
    found: list[Any] = json.loads(done.stdout)
    return found


def newest_row(server: Server) -> sqlite3.Row:
    """The last row of the ledger."""
    with sqlite3.connect(server.database) as database:
        database.row_factory = sqlite3.Row
        return database.execute("select * from requests order by started_at desc limit 1").fetchone()  # type: ignore[no-any-return]


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    """A plain POST's JSON; the status must be 200."""
    return httpx.post(server.url + path, json=body, timeout=60).raise_for_status().json()


@pytest.mark.parametrize("name", ["mean", "cls"])
def test_vectors_are_those_of_one_text_at_a_time(server: Server, client: Any, name: str) -> None:
    """Sharing a batch changes nothing but the last digits."""
    found = client.embed(name, TEXTS)
    assert np.allclose(found.embeddings, one_by_one(server.root / f"{name}.gguf", TEXTS), atol=2e-3)
    row = newest_row(server)
    assert (row["prompt_tokens"], row["mode"], row["surface"]) == (
        found.prompt_eval_count,
        "embedding",
        "ollama/embedding",
    )


def test_both_clients_see_the_same_vectors(client: Any, sdk: openai.OpenAI) -> None:
    """As numbers and as base64."""
    native = client.embed("mean", TEXTS).embeddings
    packed = sdk.embeddings.create(model="mean", input=TEXTS)
    plain = sdk.embeddings.create(model="mean", input=TEXTS, encoding_format="float")
    assert np.allclose([item.embedding for item in packed.data], native, atol=1e-6)
    assert np.allclose([item.embedding for item in plain.data], native, atol=1e-6)
    assert [item.index for item in plain.data] == list(range(len(TEXTS)))
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 0


def test_token_ids_are_the_models_own(client: Any, sdk: openai.OpenAI) -> None:
    """An empty text is nothing but the tokens around it."""
    (tokens,) = sdk.embeddings.create(model="mean", input=[CLS, SEP]).data
    assert np.allclose(tokens.embedding, client.embed("mean", [""]).embeddings[0], atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        sdk.embeddings.create(model="mean", input=[[99999]])


def test_dimensions_are_cut_and_normalised_again(client: Any, sdk: openai.OpenAI) -> None:
    """Ollama ignores more than there are, OpenAI refuses them."""
    whole = np.array(client.embed("mean", "the cat").embeddings[0])
    expected = whole[:8] / np.linalg.norm(whole[:8])
    assert np.allclose(client.embed("mean", "the cat", dimensions=8).embeddings[0], expected, atol=1e-5)
    assert np.allclose(client.embed("mean", "the cat", dimensions=999).embeddings[0], whole, atol=1e-5)
    (short,) = sdk.embeddings.create(model="mean", input="the cat", dimensions=8).data
    assert np.allclose(short.embedding, expected, atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="32 dimensions"):
        sdk.embeddings.create(model="mean", input="the cat", dimensions=33)


def test_a_long_text_loses_its_end_or_is_refused(client: Any, sdk: openai.OpenAI) -> None:
    """The tokens around it stay, and the ledger knows how much was lost."""
    cut = client.embed("mean", "cat " * 200)
    assert cut.prompt_eval_count == MODELS["mean"].num_ctx
    assert np.allclose(cut.embeddings[0], client.embed("mean", "cat " * 200 + "dog").embeddings[0], atol=1e-5)
    with pytest.raises(ollama.ResponseError, match="the input length exceeds the context length") as refused:
        client.embed("mean", "cat " * 200, truncate=False)
    assert refused.value.status_code == 400
    with pytest.raises(openai.BadRequestError) as too_long:
        sdk.embeddings.create(model="mean", input="cat " * 200)
    assert too_long.value.code == "context_length_exceeded"


def test_the_old_route_answers_too(server: Server, client: Any) -> None:
    """One vector, and a failure where the text is too long."""
    found = client.embeddings("mean", "the cat").embedding
    assert np.allclose(found, client.embed("mean", "the cat").embeddings[0], atol=1e-5)
    assert list(client.embeddings("mean", "").embedding) == []
    with pytest.raises(ollama.ResponseError) as refused:
        client.embeddings("mean", "cat " * 200)
    assert refused.value.status_code == 500


def test_a_completion_model_embeds_by_its_mean(client: Any) -> None:
    """And answers chats beside it, from a runner of its own."""
    (vector,) = client.embed("demo", "What is the capital of France?").embeddings
    assert math.isclose(np.linalg.norm(vector), 1, rel_tol=1e-4)
    assert "Paris" in client.generate("demo", "What is the capital of France?").response
    assert [model.model for model in client.ps().models].count("demo:latest") == 2


def test_models_tell_what_they_are_for(client: Any) -> None:
    """A reranker is no embedding model."""
    assert client.show("mean").capabilities == ["embedding"]
    assert client.show("ranker").capabilities == ["rerank"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/api/embed", {"model": "ranker", "input": "a"}, "does not support embedding"),
        ("/v1/embeddings", {"model": "none", "input": "a"}, 'model \\"none:latest\\" does not support embedding'),
        ("/v1/rerank", {"model": "mean", "query": "a", "documents": ["b"]}, "does not support rerank"),
        ("/api/chat", {"model": "mean", "messages": [{"role": "user", "content": "a"}]}, "does not support chat"),
    ],
)
def test_what_a_model_cannot_do_is_a_clear_400(server: Server, path: str, body: dict[str, Any], words: str) -> None:
    """In every dialect."""
    response = httpx.post(server.url + path, json=body, timeout=60)
    assert response.status_code == 400
    assert words in response.text


def test_documents_are_ranked_by_the_models_own_scores(server: Server) -> None:
    """Those that a context of llama.cpp gives for BOS query SEP document, one pair at a time."""
    documents = ["dog", "the cat", "fish " * 5]
    answer = post(
        server, "/v1/rerank", {"model": "ranker", "query": "the cat", "documents": documents, "raw_scores": True}
    )
    found = {each["index"]: each["relevance_score"] for each in answer["results"]}
    query, *rest = (tokens_of(text) for text in ("the cat", *documents))
    pairs = [[CLS, *query, SEP, *document] for document in rest]
    expected = one_by_one(server.root / "ranker.gguf", pairs, pooling=gguf.PoolingType.RANK)
    assert [found[index] for index in range(len(documents))] == pytest.approx(expected, abs=5e-3)
    scores = [each["relevance_score"] for each in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    row = newest_row(server)
    assert (row["mode"], row["surface"], row["prompt_tokens"]) == (
        "reranking",
        "rerank",
        answer["usage"]["prompt_tokens"],
    )


def tokens_of(text: str) -> list[int]:
    """The ids of a text whose words are all in the vocabulary."""
    return [VOCABULARY.index(f"▁{word}") for word in text.split()]


@pytest.mark.parametrize(
    "path", ["/rerank", "/v2/rerank", "/engines/rerank", "/engines/llama.cpp/rerank", "/engines/v1/rerank"]
)
def test_every_mount_ranks(server: Server, path: str) -> None:
    """With probabilities, and without a model's name where there is only one to mean."""
    answer = post(server, path, {"query": "the cat", "documents": ["dog", "cat"]})
    assert answer["model"] == "ranker:latest"
    assert all(0 < each["relevance_score"] < 1 for each in answer["results"])


def test_score_and_ollamas_rerank_agree(server: Server) -> None:
    """Three dialects over one model."""
    scored = post(server, "/score", {"model": "ranker", "text_1": "the cat", "text_2": ["dog", "cat"]})
    ranked = post(server, "/api/rerank", {"model": "ranker", "query": "the cat", "documents": ["dog", "cat"]})
    by_index = {each["index"]: each["relevance_score"] for each in ranked["results"]}
    assert [by_index[each["index"]] for each in scored["data"]] == pytest.approx(
        [each["score"] for each in scored["data"]], abs=1e-3
    )


def test_model_runner_embeds_under_engines(server: Server) -> None:
    """Counted with the dialect that it came by."""
    with openai.OpenAI(base_url=f"{server.url}/engines/v1", api_key="none", max_retries=0) as sdk:
        assert len(sdk.embeddings.create(model="mean", input="the cat").data) == 1
    assert newest_row(server)["surface"] == "model-runner/embedding"


def test_many_callers_share_batches(server: Server, client: Any) -> None:
    """Everyone gets the right vectors, whoever else is in the batch."""
    texts = [f"the {word} {number}" for number in range(40) for word in ("cat", "dog")]
    expected = client.embed("mean", texts).embeddings
    found: dict[int, list[float]] = {}

    def ask(start: int) -> None:
        with closing(ollama.Client(server.url)) as mine:
            for index in range(start, len(texts), 8):
                found[index] = list(mine.embed("mean", texts[index]).embeddings[0])

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.allclose([found[index] for index in range(len(texts))], expected, atol=2e-3)


def test_a_caller_who_hangs_up_is_booked(server: Server) -> None:
    """With what was computed, which is less than was asked for."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/api/embed", json={"model": "demo", "input": ["word " * 2000] * 200}, timeout=2.0)
    deadline = time.monotonic() + 30
    while (row := newest_row(server))["status"] != 499 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (row["status"], row["finish_reason"]) == (499, "cancel")
    assert row["prompt_tokens"] < 200 * 2000
