"""The OpenAI dialect's handlers: decode, parse, ask the house, render.

Every handler answers its own errors in OpenAI's shape, so the app around it needs no exception handler for them; only
unknown paths and methods never reach a handler and have `http_error_response`. Paths are listed with and without a
trailing slash, because a redirect makes some clients drop the body (`spec/openai.md` section 1.1).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from compat.body import decode_body
from compat.openai.batch import generate_all
from compat.openai.decode import (
    decode_chat,
    decode_completion,
    decode_embeddings,
    decode_rerank,
    decode_score,
)
from compat.openai.embeddings import explain_tokens, parse_embeddings, render_embeddings
from compat.openai.errors import ErrorReply, render_error, render_unknown_url, render_wrong_method
from compat.openai.forced import read_calls
from compat.openai.parse import completion_logprobs_of, parse_chat, parse_completion
from compat.openai.render import (
    ChatChunks,
    Chunks,
    CompletionChunks,
    Reply,
    encode,
    render_chat,
    render_completion,
    render_fingerprint,
    render_model,
)
from compat.openai.rerank import only_reranker, parse_rerank, parse_score, render_rerank, render_score
from compat.openai.schema import GenerateBody, ModelList
from compat.openai.tools import must_call
from compat.services import Answer, Refusal, Services, collect
from compat.streams import SSEResponse, aclose, sse_frame, while_connected
from compat.vectors import FEW
from engines.errors import BadRequest, HeadwaterError
from engines.events import Event
from engines.model import ModelCard
from engines.request import GenerateRequest

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
Reading = Callable[[AsyncIterator[Event]], AsyncIterator[Event]]
"""What is made of an answer's events before they are shown."""

_SURFACES = {
    "/chat/completions": "openai/chat",
    "/completions": "openai/completion",
    "/embeddings": "openai/embedding",
}
_RANKING_SURFACES = {"/rerank": "rerank", "/reranking": "rerank", "/score": "rerank"}
_COHERE_RERANK = "/v2/rerank"
_DONE = sse_frame(b"[DONE]")


def surfaces(bases: Sequence[str] = ("/v1", "")) -> dict[str, str]:
    """The origin surface of each inference path below `bases`, in every spelling that is routed."""
    found = _below(bases, _SURFACES) | ranking_surfaces(bases)
    return found | _below([""], {_COHERE_RERANK: "rerank"}) if "" in bases else found


def ranking_surfaces(bases: Sequence[str]) -> dict[str, str]:
    """As `surfaces`, of `OpenAIRoutes.ranking_routes`."""
    return _below(bases, _RANKING_SURFACES)


def _below(bases: Sequence[str], paths: Mapping[str, str]) -> dict[str, str]:
    return {
        spelling: surface
        for base in bases
        for path, surface in paths.items()
        for spelling in (base + path, f"{base}{path}/")
    }


class OpenAIRoutes:
    """Chat completions, completions, embeddings, reranking and models over the house's services.

    Handlers read `http.state.origin` and `http.state.request_id`, which the gateway's middleware sets.
    """

    def __init__(self, services: Services, *, body_limit_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._services = services
        self._body_limit_bytes = body_limit_bytes
        self._clock = clock

    def routes(self, prefix: str = "") -> list[BaseRoute]:
        """Every route, below `<prefix>/v1` and below `prefix` itself."""
        below_bases = [
            route
            for base in (f"{prefix}/v1", prefix)
            for route in (
                *self.inference_routes(base),
                *both_spellings(f"{base}/models", self.list_models, "GET"),
                Route(f"{base}/models/{{model:path}}", endpoint(self.show_model), methods=["GET"]),
            )
        ]
        return [*below_bases, *both_spellings(prefix + _COHERE_RERANK, self.rerank, "POST", prompt_param="documents")]

    def inference_routes(self, base: str) -> list[BaseRoute]:
        """The routes that run models, below `base`."""
        return [
            *both_spellings(f"{base}/chat/completions", self.chat, "POST"),
            *both_spellings(f"{base}/completions", self.completion, "POST", prompt_param="prompt"),
            *both_spellings(f"{base}/embeddings", self.embeddings, "POST", prompt_param="input"),
            *self.ranking_routes(base),
        ]

    def ranking_routes(self, base: str) -> list[BaseRoute]:
        """The routes that compare documents with a query, below `base`."""
        return [
            *both_spellings(f"{base}/rerank", self.rerank, "POST", prompt_param="documents"),
            *both_spellings(f"{base}/reranking", self.rerank, "POST", prompt_param="documents"),
            *both_spellings(f"{base}/score", self.score, "POST", prompt_param="text_2"),
        ]

    async def chat(self, http: Request) -> Response:
        """`POST /v1/chat/completions`."""
        body = await decode_body(http, self._body_limit_bytes, decode_chat)
        card = await self._services.find(body.model)
        request = parse_chat(body, card, request_id=http.state.request_id, origin=http.state.origin)
        reply = replace(
            self._reply("chatcmpl-", body, card, request.num_choices),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            logprobs=request.logprobs,
        )
        reading = read_calls if must_call(body) else aiter
        if request.stream:
            return await self._stream(http, [request], ChatChunks(reply), reading=reading)
        return json_response(render_chat(reply, await self._answer(http, [request], reading)))

    async def completion(self, http: Request) -> Response:
        """`POST /v1/completions`."""
        body = await decode_body(http, self._body_limit_bytes, decode_completion)
        card = await self._services.find(body.model)
        requests = parse_completion(body, card, request_id=http.state.request_id, origin=http.state.origin)
        reply = replace(
            self._reply("cmpl-", body, card, sum(request.num_choices for request in requests)),
            logprobs=completion_logprobs_of(body),
            best_of=requests[0].num_choices,
            num_kept=body.n or 1,
        )
        if body.stream:
            return await self._stream(http, requests, CompletionChunks(reply), prompt_param="prompt")
        return json_response(render_completion(reply, await self._answer(http, requests)))

    async def embeddings(self, http: Request) -> Response:
        """`POST /v1/embeddings`."""
        body = await decode_body(http, self._body_limit_bytes, decode_embeddings)
        card = await self._services.find(body.model)
        request = parse_embeddings(body, card, request_id=http.state.request_id, origin=http.state.origin)
        try:
            embeddings = await while_connected(http.receive, self._services.embed(request))
        except BadRequest as error:
            raise explain_tokens(error) from None
        if len(embeddings.vectors) <= FEW:
            return json_response(render_embeddings(body, embeddings))
        return json_response(await asyncio.to_thread(render_embeddings, body, embeddings))

    async def rerank(self, http: Request) -> Response:
        """`POST /v1/rerank` and its other names."""
        body = await decode_body(http, self._body_limit_bytes, decode_rerank)
        card = await self._reranker(body.model)
        name = body.model or card.name
        request = parse_rerank(body, model=name, request_id=http.state.request_id, origin=http.state.origin)
        ranking = await while_connected(http.receive, self._services.rerank(request))
        return json_response(render_rerank(body, request, card, ranking, f"rerank-{secrets.token_hex(16)}"))

    async def score(self, http: Request) -> Response:
        """`POST /score`, as vLLM and Docker Model Runner have it."""
        body = await decode_body(http, self._body_limit_bytes, decode_score)
        card = await self._reranker(body.model)
        name = body.model or card.name
        request = parse_score(body, model=name, request_id=http.state.request_id, origin=http.state.origin)
        ranking = await while_connected(http.receive, self._services.rerank(request))
        reply_id, created = f"score-{secrets.token_hex(16)}", int(self._clock())
        return json_response(render_score(request, card, ranking, reply_id, created))

    async def _reranker(self, name: str | None) -> ModelCard:
        """The model of that name, or the only reranker there is."""
        return await self._services.find(name or only_reranker(await self._services.list_models()))

    async def list_models(self, http: Request) -> Response:
        """`GET /v1/models`, last modified first; loads nothing."""
        cards = await self._services.list_models()
        return json_response(encode(ModelList("list", [render_model(card, card.name) for card in cards])))

    async def show_model(self, http: Request) -> Response:
        """`GET /v1/models/{id}`; the id may hold slashes, encoded or not, and comes back as it was asked for."""
        name: str = http.path_params["model"].removesuffix("/")
        return json_response(encode(render_model(await self._services.find(name), name)))

    def _reply(self, id_prefix: str, body: GenerateBody, card: ModelCard, num_choices: int) -> Reply:
        return Reply(
            id=id_prefix + secrets.token_hex(16),
            created=int(self._clock()),
            model=body.model,
            fingerprint=render_fingerprint(card),
            num_choices=num_choices,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )

    async def _stream(
        self,
        http: Request,
        requests: list[GenerateRequest],
        chunks: Chunks,
        prompt_param: str = "messages",
        reading: Reading = aiter,
    ) -> Response:
        events = await while_connected(http.receive, generate_all(self._services, requests))
        return SSEResponse(frames(chunks, reading(events), prompt_param), source=events)

    async def _answer(self, http: Request, requests: list[GenerateRequest], reading: Reading = aiter) -> Answer:
        return await while_connected(http.receive, self._collect(requests, reading))

    async def _collect(self, requests: list[GenerateRequest], reading: Reading) -> Answer:
        events = await generate_all(self._services, requests)
        try:
            return await collect(reading(events), sum(request.num_choices for request in requests))
        finally:
            await aclose(events)


async def frames(chunks: Chunks, events: AsyncIterator[Event], prompt_param: str = "messages") -> AsyncIterator[bytes]:
    """The answer's events as server-sent events; a failure is one last frame, without `[DONE]` (section 3)."""
    try:
        for chunk in chunks.opening():
            yield sse_frame(chunk)
        async for event in events:
            rendered = chunks.render(event)
            if rendered is not None:
                yield sse_frame(rendered)
    except Exception as error:  # noqa: BLE001  the status is sent: the last frame is the only place left to tell
        yield sse_frame(_report(error, prompt_param).body)
    else:
        yield _DONE


def endpoint(handler: Handler, prompt_param: str = "messages") -> Handler:
    """The handler, its errors rendered in OpenAI's shape."""

    async def answer(http: Request) -> Response:
        try:
            return await handler(http)
        except Exception as error:  # noqa: BLE001  the dialect's outermost edge: every request gets an answer
            http.state.refusal = Refusal.of(error)
            return error_response(error, prompt_param)

    return answer


def both_spellings(path: str, handler: Handler, method: str, *, prompt_param: str = "messages") -> list[BaseRoute]:
    """Routes for the path with and without a trailing slash."""
    answer = endpoint(handler, prompt_param)
    return [Route(spelling, answer, methods=[method]) for spelling in (path, f"{path}/")]


def json_response(body: bytes) -> Response:
    """A successful reply."""
    return Response(body, media_type="application/json")


def error_response(error: Exception, prompt_param: str = "messages") -> Response:
    """Any exception as a reply in OpenAI's shape; what is not ours is logged."""
    return _error_response(_report(error, prompt_param))


def http_error_response(http: Request, error: HTTPException) -> Response:
    """Starlette's 404 and 405, for paths that have no handler here."""
    path = http.scope["path"]
    if error.status_code == 405:
        return _error_response(render_wrong_method(http.method, path, (error.headers or {}).get("Allow", "")))
    return _error_response(render_unknown_url(http.method, path))


def _report(error: Exception, prompt_param: str) -> ErrorReply:
    if not isinstance(error, HeadwaterError):
        logger.error("a request failed unexpectedly", exc_info=error)
    return render_error(error, prompt_param)


def _error_response(reply: ErrorReply) -> Response:
    return Response(reply.body, reply.status, reply.headers, media_type="application/json")
