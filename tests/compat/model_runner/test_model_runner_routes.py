from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from compat.model_runner.prefix import StripPrefix
from compat.model_runner.routes import ModelRunnerRoutes, surfaces
from compat.openai.routes import OpenAIRoutes
from engines.errors import ModelNotFound
from engines.events import ChoiceFinished, Event, Finished, FinishReason, TextDelta, Timings, Usage
from engines.model import ModelCard
from engines.request import GenerateRequest, Origin

BASES = ["/engines/v1", "/engines/llama.cpp/v1", "/exp/vDD4.40/engines/v1"]
CARD = ModelCard(
    name="ai/smollm2:latest",
    full_name="docker.io/ai/smollm2:latest",
    digest="1a2b3c4d" + "0" * 56,
    weights=Path("model.gguf"),
    weights_digest="sha256:" + "0" * 64,
    size_bytes=3 * 2**19,
    modified_at=7.9,
    family="llama",
    parameter_size="361.82M",
    quantization="Q4_K_M",
    context_length=8192,
)
MODEL = {
    "id": "ai/smollm2:latest",
    "object": "model",
    "created": 7,
    "owned_by": "docker",
    "dmr": {
        "context_window": 8192,
        "architecture": "llama",
        "parameters": "361.82M",
        "quantization": "Q4_K_M",
        "size": "1.50 MiB",
    },
}


class OneModel:
    """A house with one model that always says Hi; the rest of Services is never asked for here."""

    async def find(self, name: str) -> ModelCard:
        """The one model."""
        if name not in (CARD.name, "ai/smollm2"):
            raise ModelNotFound(name)
        return CARD

    async def list_models(self) -> list[ModelCard]:
        """The one model."""
        return [CARD]

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Hi."""

        async def events() -> AsyncIterator[Event]:
            yield TextDelta("Hi")
            yield ChoiceFinished(FinishReason.STOP)
            yield Finished(FinishReason.STOP, Usage(), Timings())

        return events()


def client() -> httpx.AsyncClient:
    """A client of the routes alone; nothing here streams."""
    services: Any = OneModel()
    dialect = OpenAIRoutes(services, body_limit_bytes=10_000)
    routes = StripPrefix(Starlette(routes=ModelRunnerRoutes(services, dialect).routes()))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = {"origin": Origin("openai/chat", "tester"), "request_id": "req_1"}
        await routes(scope, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize("base", BASES)
async def test_models_are_listed_in_model_runner_s_shape(base: str) -> None:
    """Owned by docker, with what Model Runner knows under `dmr`."""
    async with client() as http:
        assert (await http.get(f"{base}/models")).json() == {"object": "list", "data": [MODEL]}
        assert (await http.get(f"{base}/models/ai/smollm2:latest")).json() == MODEL
        assert (await http.get(f"{base}/models/ai%2Fsmollm2")).json() == MODEL | {"id": "ai/smollm2"}
        assert (await http.get(f"{base}/models/ai/nothing")).status_code == 404


@pytest.mark.parametrize("base", BASES)
async def test_chat_and_completions_are_openai_s(base: str) -> None:
    """The same handlers below another path."""
    async with client() as http:
        chat = {"model": "ai/smollm2", "messages": [{"role": "user", "content": "hi"}]}
        reply = (await http.post(f"{base}/chat/completions", json=chat)).json()
        assert reply["choices"][0]["message"]["content"] == "Hi"
        reply = (await http.post(f"{base}/completions/", json={"model": "ai/smollm2", "prompt": "hi"})).json()
        assert reply["choices"][0]["text"] == "Hi"


def test_surfaces_say_that_the_request_came_by_model_runner_routes() -> None:
    """Requests under `/engines` are counted with the dialect that they speak."""
    assert surfaces()["/engines/v1/chat/completions"] == "model-runner/chat"
    assert surfaces()["/engines/llama.cpp/v1/completions/"] == "model-runner/completion"
    assert surfaces()["/engines/v1/embeddings"] == "model-runner/embedding"
    assert surfaces()["/engines/rerank"] == surfaces()["/engines/llama.cpp/score"] == "model-runner/rerank"
