"""The Ollama dialect's handlers: decode, parse, ask the house, render.

`transport.py` holds what is around each of them; `library.py` has those that change the models on disk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from compat.body import decode_body
from compat.ollama.account import account_routes
from compat.ollama.decode import (
    decode_chat,
    decode_detokenize,
    decode_embed,
    decode_embeddings,
    decode_generate,
    decode_rerank,
    decode_show,
    decode_tokenize,
)
from compat.ollama.embeddings import (
    explain_embed,
    explain_embeddings,
    parse_embed,
    parse_embeddings,
    parse_inputs,
    parse_rerank,
    render_embed,
    render_embeddings,
    render_rerank,
)
from compat.ollama.errors import ModelNotPulled
from compat.ollama.gojson import encode
from compat.ollama.listing import render_processes, render_tags
from compat.ollama.names import insist_on_local, refuse_cloud, refuse_remote, short_name
from compat.ollama.parse import parse_chat, parse_generate, parse_unload
from compat.ollama.render import ChatObjects, GenerateObjects, Reply
from compat.ollama.schema import GenerationBody, VersionReply
from compat.ollama.show import render_show
from compat.ollama.tokens import parse_detokenize, parse_tokenize, render_detokenize, render_tokenize
from compat.ollama.transport import json_response, report, required, route, with_redirect
from compat.services import Answer, Services, collect
from compat.streams import NDJSONResponse, aclose, while_connected
from compat.vectors import FEW
from engines.errors import BadRequest, ModelNotFound
from engines.events import Event, FinishReason
from engines.model import ModelCard
from engines.request import GenerateRequest

logger = logging.getLogger(__name__)

VERSION = "0.33.0"
"""The Ollama whose API this is; clients compare it with what they need."""

_SURFACES = {
    "/api/chat": "ollama/completion",
    "/api/generate": "ollama/completion",
    "/api/embed": "ollama/embedding",
    "/api/embeddings": "ollama/embedding",
    "/api/rerank": "rerank",
    "/api/tokenize": "ollama/tokenize",
    "/api/detokenize": "ollama/tokenize",
}
_COPILOT = "GitHubCopilotChat/"


class OllamaRoutes:
    """Ollama's routes over the house's services.

    Handlers read `http.state.origin` and `http.state.request_id`, which the gateway's middleware sets, and leave why
    they answered with an error in `http.state.refusal`.

    Args:
        clock: nanoseconds since the epoch.
    """

    def __init__(
        self,
        services: Services,
        *,
        body_limit_bytes: int,
        version: str = VERSION,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._services = services
        self._body_limit_bytes = body_limit_bytes
        self._version = version
        self._clock = clock

    def surfaces(self) -> dict[str, str]:
        """The origin surface of each inference path; redirects run nothing and have none."""
        return dict(_SURFACES)

    def routes(self) -> list[BaseRoute]:
        """Every route."""
        return [
            route("/", self.root, "GET", "HEAD"),
            *with_redirect("/api/version", self.show_version, "GET", "HEAD"),
            *with_redirect("/api/tags", self.list_models, "GET", "HEAD"),
            *with_redirect("/api/ps", self.list_runners, "GET"),
            *with_redirect("/api/show", self.show_model, "POST"),
            *with_redirect("/api/chat", self.chat, "POST"),
            *with_redirect("/api/generate", self.generate, "POST"),
            *with_redirect("/api/embed", self.embed, "POST"),
            *with_redirect("/api/embeddings", self.embeddings, "POST"),
            *with_redirect("/api/rerank", self.rerank, "POST"),
            *with_redirect("/api/tokenize", self.tokenize, "POST"),
            *with_redirect("/api/detokenize", self.detokenize, "POST"),
            *account_routes(),
        ]

    async def root(self, http: Request) -> Response:
        """`GET /`, by which clients see that somebody is there."""
        return Response(b"Ollama is running", media_type="text/plain")

    async def show_version(self, http: Request) -> Response:
        """`GET /api/version`."""
        return json_response(encode(VersionReply(self._version)))

    async def list_models(self, http: Request) -> Response:
        """`GET /api/tags`; loads nothing."""
        return json_response(render_tags(await self._services.list_models()))

    async def list_runners(self, http: Request) -> Response:
        """`GET /api/ps`."""
        return json_response(render_processes(self._services.list_runners(), self._clock() / 1e9))

    async def show_model(self, http: Request) -> Response:
        """`POST /api/show`."""
        body = await decode_body(http, self._body_limit_bytes, decode_show)
        name = required(body.model or body.name)
        refuse_cloud(name, "remote model details are unavailable")
        try:
            description = await self._services.describe(name)
            insist_on_local(name, description.card)
        except ModelNotFound:
            raise ModelNotFound(short_name(name)) from None
        basename = name if http.headers.get("user-agent", "").startswith(_COPILOT) else ""
        # In a thread, because a vocabulary in full takes a good part of a second to write.
        return json_response(await asyncio.to_thread(render_show, description, body, basename=basename))

    async def chat(self, http: Request) -> Response:
        """`POST /api/chat`."""
        body = await decode_body(http, self._body_limit_bytes, decode_chat)
        card = await self._find(required(body.model))
        reply = ChatObjects(body.model)
        if not body.messages and body.keep_alive == 0.0:
            return await self._unload(http, body, reply)
        request = parse_chat(body, card, request_id=http.state.request_id, origin=http.state.origin)
        return await self._answer(http, body, request, reply)

    async def generate(self, http: Request) -> Response:
        """`POST /api/generate`."""
        body = await decode_body(http, self._body_limit_bytes, decode_generate)
        if not body.model:
            raise ModelNotFound(body.model)
        card = await self._find(body.model)
        reply = GenerateObjects(body.model)
        if not body.prompt and body.keep_alive == 0.0:
            return await self._unload(http, body, reply)
        request = parse_generate(body, card, request_id=http.state.request_id, origin=http.state.origin)
        return await self._answer(http, body, request, reply)

    async def embed(self, http: Request) -> Response:
        """`POST /api/embed`."""
        body = await decode_body(http, self._body_limit_bytes, decode_embed)
        parse_inputs(body)  # Ollama looks at the input before it looks for the model
        await self._find_to_embed(body.model)
        request = parse_embed(body, request_id=http.state.request_id, origin=http.state.origin)
        try:
            embeddings = await while_connected(http.receive, self._services.embed(request))
        except BadRequest as error:
            raise explain_embed(error, truncate=body.truncate) from None
        if len(embeddings.vectors) <= FEW:
            return json_response(render_embed(body, embeddings))
        return json_response(await asyncio.to_thread(render_embed, body, embeddings))

    async def embeddings(self, http: Request) -> Response:
        """`POST /api/embeddings`, the old form."""
        body = await decode_body(http, self._body_limit_bytes, decode_embeddings)
        await self._find_to_embed(required(body.model))
        request = parse_embeddings(body, request_id=http.state.request_id, origin=http.state.origin)
        try:
            embeddings = await while_connected(http.receive, self._services.embed(request))
        except BadRequest as error:
            raise explain_embeddings(error) from None
        return json_response(render_embeddings(embeddings))

    async def rerank(self, http: Request) -> Response:
        """`POST /api/rerank`."""
        body = await decode_body(http, self._body_limit_bytes, decode_rerank)
        card = await self._find_to_embed(body.model)
        request = parse_rerank(body, request_id=http.state.request_id, origin=http.state.origin)
        try:
            ranking = await while_connected(http.receive, self._services.rerank(request))
        except BadRequest as error:
            raise explain_embed(error, truncate=body.truncate) from None
        return json_response(render_rerank(body, card, ranking))

    async def tokenize(self, http: Request) -> Response:
        """`POST /api/tokenize`."""
        body = await decode_body(http, self._body_limit_bytes, decode_tokenize)
        refuse_cloud(required(body.model))
        request = parse_tokenize(body, request_id=http.state.request_id, origin=http.state.origin)
        found = await while_connected(http.receive, self._services.tokenize(request))
        return json_response(render_tokenize(body, found))

    async def detokenize(self, http: Request) -> Response:
        """`POST /api/detokenize`."""
        body = await decode_body(http, self._body_limit_bytes, decode_detokenize)
        refuse_cloud(required(body.model))
        request = parse_detokenize(body, request_id=http.state.request_id, origin=http.state.origin)
        found = await while_connected(http.receive, self._services.tokenize(request))
        return json_response(render_detokenize(body, found))

    async def _find_to_embed(self, name: str) -> ModelCard:
        if not name:
            raise ModelNotFound(name)
        try:
            return await self._find(name)
        except ModelNotFound:
            raise ModelNotPulled(name) from None

    async def _find(self, name: str) -> ModelCard:
        refuse_cloud(name)
        card = await self._services.find(name)
        refuse_remote(name, card)
        return card

    async def _unload(self, http: Request, body: GenerationBody, reply: Reply) -> Response:
        request = parse_unload(body, request_id=http.state.request_id, origin=http.state.origin)
        await self._services.unload(request)
        return json_response(reply.empty(FinishReason.UNLOAD, self._clock()))

    async def _answer(self, http: Request, body: GenerationBody, request: GenerateRequest, reply: Reply) -> Response:
        if request.messages == ():
            await while_connected(http.receive, self._services.load(request))
            return json_response(reply.empty(FinishReason.LOAD, self._clock()))
        if body.debug_render_only:
            prompt = await while_connected(http.receive, self._services.render(request))
            num_images = sum(len(message.images) for message in request.messages or ())
            return json_response(reply.prompt(prompt, num_images, self._clock()))
        if not request.stream:
            answer = await while_connected(http.receive, self._collect(request))
            return json_response(reply.whole(answer, self._clock()))
        events = await while_connected(http.receive, self._services.generate(request))
        return NDJSONResponse(lines(reply, events, self._clock), source=events)

    async def _collect(self, request: GenerateRequest) -> Answer:
        events = await self._services.generate(request)
        try:
            return await collect(events)
        finally:
            await aclose(events)


async def lines(reply: Reply, events: AsyncIterator[Event], clock: Callable[[], int]) -> AsyncIterator[bytes]:
    """The answer's events, one object a line; a failure is one last line."""
    try:
        async for event in events:
            rendered = reply.render(event, clock())
            if rendered is not None:
                yield rendered + b"\n"
    except Exception as error:  # noqa: BLE001  the status is sent: the last line is the only place left to tell
        logger.warning("an answer broke off: %s", error)
        yield report(error).body + b"\n"
