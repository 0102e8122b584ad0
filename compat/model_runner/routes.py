"""The OpenAI dialect under `/engines`, as Docker Model Runner serves it (`spec/model-runner.md` section 11.1).

Inference is the OpenAI dialect's own; only the model lists have a shape of their own.
"""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from compat.openai import routes as openai
from compat.openai.render import encode
from compat.openai.schema import ModelList
from compat.services import Services
from engines.model import ModelCard

BASES = ("/engines/v1", "/engines/llama.cpp/v1")
RANKING_BASES = ("/engines", "/engines/llama.cpp")
"""Reranking has no version in its path."""


class Details(Struct):
    """`dmr`: what Model Runner knows of a model; what is unknown does not appear."""

    context_window: int | UnsetType = UNSET
    architecture: str | UnsetType = UNSET
    parameters: str | UnsetType = UNSET
    quantization: str | UnsetType = UNSET
    size: str | UnsetType = UNSET


class ModelBody(Struct):
    """One model."""

    id: str
    object: str
    created: int
    owned_by: str
    dmr: Details


def surfaces() -> dict[str, str]:
    """The origin surface of each inference path under `/engines`."""
    paths = openai.surfaces(BASES) | openai.ranking_surfaces(RANKING_BASES)
    return {path: f"model-runner/{name.removeprefix('openai/')}" for path, name in paths.items()}


class ModelRunnerRoutes:
    """Model Runner's routes over the house's services and the OpenAI dialect's handlers."""

    def __init__(self, services: Services, dialect: openai.OpenAIRoutes) -> None:
        self._services = services
        self._dialect = dialect

    def routes(self) -> list[BaseRoute]:
        """Every route, below each of `BASES` and `RANKING_BASES`."""
        ranking = [route for base in RANKING_BASES for route in self._dialect.ranking_routes(base)]
        return ranking + [
            route
            for base in BASES
            for route in (
                *self._dialect.inference_routes(base),
                *openai.both_spellings(f"{base}/models", self.list_models, "GET"),
                Route(f"{base}/models/{{model:path}}", openai.endpoint(self.show_model), methods=["GET"]),
            )
        ]

    async def list_models(self, http: Request) -> Response:
        """`GET /engines/v1/models`."""
        cards = await self._services.list_models()
        return openai.json_response(encode(ModelList("list", [render_model(card, card.name) for card in cards])))

    async def show_model(self, http: Request) -> Response:
        """`GET /engines/v1/models/{name}`."""
        name: str = http.path_params["model"].removesuffix("/")
        return openai.json_response(encode(render_model(await self._services.find(name), name)))


def render_model(card: ModelCard, model_id: str) -> ModelBody:
    """One model in Model Runner's shape."""
    details = Details(
        context_window=card.context_length or UNSET,
        architecture=card.family or UNSET,
        parameters=card.parameter_size or UNSET,
        quantization=card.quantization or UNSET,
        size=f"{card.size_bytes / 2**20:.2f} MiB",
    )
    return ModelBody(model_id, "model", int(card.modified_at), "docker", details)
