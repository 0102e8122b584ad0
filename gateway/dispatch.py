"""One request's way through the house: find the model, get a place, run, put on record, give the place back.

What a dialect may ask of the house (`compat.services.Services`) ends here. Every event passes `Answering`, which sees
the end whatever it is: the row is committed before the last event leaves, and a caller who closes early becomes a
cancel whose true cost is asked of the worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from engines.errors import Cancelled, HeadwaterError, RemoteModel, UnsupportedCapability
from engines.events import (
    ChoiceFinished,
    Embeddings,
    Event,
    Finished,
    FinishReason,
    Ranking,
    Timings,
    Tokenization,
    Usage,
)
from engines.model import ModelCard, ModelDescription, RunnerStatus
from engines.request import AnyRequest, EmbedRequest, GenerateRequest, Mode, RerankRequest, TokenizeRequest
from engines.store.catalog import Catalog
from gateway.accounting import CLIENT_GONE, Account, Accounts
from gateway.policy import LoadPolicy
from gateway.pool import Pool
from gateway.residents import Lease, RunnerKey
from gateway.runner import Reply, Runner

log = logging.getLogger(__name__)

Q = TypeVar("Q", EmbedRequest, RerankRequest)
A = TypeVar("A", Embeddings, Ranking)
L = TypeVar("L", GenerateRequest, TokenizeRequest)
M = TypeVar("M", GenerateRequest, EmbedRequest, RerankRequest, TokenizeRequest)
T = TypeVar("T")


class Dispatch:
    """The house as the dialects see it.

    Args:
        policy: what clients may choose of how models are loaded.
    """

    def __init__(
        self,
        catalog: Catalog,
        pool: Pool[Runner],
        accounts: Accounts,
        *,
        backend: str,
        policy: LoadPolicy,
    ) -> None:
        self._catalog = catalog
        self._pool = pool
        self._accounts = accounts
        self._backend = backend
        self._policy = policy

    async def find(self, name: str) -> ModelCard:
        """The model of that name."""
        return await asyncio.to_thread(self._catalog.find, name)

    async def list_models(self) -> list[ModelCard]:
        """Every installed model, last modified first."""
        return await asyncio.to_thread(self._catalog.list)

    async def describe(self, name: str) -> ModelDescription:
        """The model with its whole GGUF header."""
        return await asyncio.to_thread(self._catalog.describe, name)

    def list_runners(self) -> list[RunnerStatus]:
        """What is loaded."""
        return self._pool.statuses()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Admit a request and return its events."""
        account = self._accounts.claim(request, mode=Mode.COMPLETION)
        try:
            request, card = await self._meet(account, request)
            lease = await self._acquire(account, request, card)
            reply = await self._submit(account, lease, _complete(request, card), lease.runner.generate)
        except HeadwaterError as error:
            await self._refuse(account, error)
            raise
        except asyncio.CancelledError:  # one prompt of several has an account that nobody else knows
            gone = self._accounts.settle(account, status=CLIENT_GONE, reason=FinishReason.CANCEL.value)
            await asyncio.shield(asyncio.ensure_future(gone))
            raise
        return Answering(self._pool, self._accounts, account, lease, reply)

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """One vector for each input; without inputs the model is only made resident."""
        return await self._compute(request, Mode.EMBEDDING, Runner.embed if request.inputs else _load_only)

    async def rerank(self, request: RerankRequest) -> Ranking:
        """One score for each document."""
        return await self._compute(request, Mode.RERANKING, Runner.rerank)

    async def _compute(self, request: Q, mode: Mode, run: Callable[[Runner, Q], Awaitable[A]]) -> A:
        """Do all of a request at once; it is on record when this returns or raises."""
        account = self._accounts.claim(request, mode=mode)
        try:
            request, card = await self._meet(account, request)
            _require(card, mode)
            lease = await self._acquire(account, request, card)
            answer = await self._submit(account, lease, request, partial(run, lease.runner))
        except HeadwaterError as error:
            await self._refuse(account, error)
            raise
        except asyncio.CancelledError:
            gone = self._accounts.settle(account, status=CLIENT_GONE, reason=FinishReason.CANCEL.value)
            await asyncio.shield(asyncio.ensure_future(gone))
            raise
        self._pool.release(lease.resident)
        answer = replace(answer, timings=_timings(answer.timings, lease, account, ttft_s=0.0))
        reason = FinishReason.LOAD if run is _load_only else FinishReason.STOP
        await self._accounts.settle(
            account, status=200, reason=reason.value, usage=answer.usage, timings=answer.timings
        )
        return answer

    async def _submit(
        self, account: Account, lease: Lease[Runner], request: AnyRequest, run: Callable[[Any], Awaitable[T]]
    ) -> T:
        """Hand the request to the worker; a caller who leaves meanwhile is booked with what it has cost."""
        try:
            return await run(request)
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.ensure_future(self._abandon(account, lease, request)))
            raise
        except BaseException:
            self._pool.release(lease.resident)
            raise

    async def _abandon(self, account: Account, lease: Lease[Runner], request: AnyRequest) -> None:
        try:
            usage, engine = await lease.runner.cancel(request.id) or (Usage(), Timings())
        finally:
            self._pool.release(lease.resident)
        await self._accounts.settle(
            account,
            status=CLIENT_GONE,
            reason=FinishReason.CANCEL.value,
            usage=usage,
            timings=_timings(engine, lease, account, ttft_s=0.0),
            wasted_tokens=usage.completion_tokens,
        )

    async def load(self, request: GenerateRequest) -> None:
        """Make the request's model resident without generating."""
        account = self._accounts.claim(request, mode=Mode.COMPLETION)
        try:
            request, card = await self._meet(account, request)
            lease = await self._acquire(account, request, card)
        except HeadwaterError as error:
            await self._refuse(account, error)
            raise
        self._pool.release(lease.resident)
        timings = _timings(Timings(), lease, account, ttft_s=0.0)
        await self._accounts.settle(account, status=200, reason=FinishReason.LOAD.value, timings=timings)

    async def render(self, request: GenerateRequest) -> str:
        """The prompt that the request's model would be given; the model is loaded for it."""
        account = self._accounts.claim(request, mode=Mode.COMPLETION)
        prompt, _ = await self._look_up(account, request, _render)
        return prompt

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """The token ids of a text, or the text of token ids, by any runner that has the request's model."""
        account = self._accounts.claim(request, mode=Mode.COMPLETION)
        found, timings = await self._look_up(account, request, _tokenize)
        return replace(found, timings=timings)

    async def _look_up(
        self, account: Account, request: L, ask: Callable[[Runner, L, ModelCard], Awaitable[T]]
    ) -> tuple[T, Timings]:
        """Ask a runner what costs no tokens; on record as a load, which is all that it may have needed."""
        try:
            request, card = await self._meet(account, request)
            lease = await self._acquire(account, request, card)
            try:
                answer = await ask(lease.runner, request, card)
            finally:
                self._pool.release(lease.resident)
        except HeadwaterError as error:
            await self._refuse(account, error)
            raise
        timings = _timings(Timings(), lease, account, ttft_s=0.0)
        await self._accounts.settle(account, status=200, reason=FinishReason.LOAD.value, timings=timings)
        return answer, timings

    async def unload(self, request: GenerateRequest) -> None:
        """Unload the request's model once its running requests are done."""
        account = self._accounts.claim(request, mode=Mode.COMPLETION)
        card = await self._identify(account, request)
        self._pool.unload(card.residency)
        await self._accounts.settle(account, status=200, reason=FinishReason.UNLOAD.value)

    async def _meet(self, account: Account, request: M) -> tuple[M, ModelCard]:
        """The request as it may be, and its model."""
        card = await self._identify(account, request)
        return self._policy.apply(request, card), card

    async def _identify(self, account: Account, request: AnyRequest) -> ModelCard:
        card = await self.find(request.model)
        account.model, account.model_digest, account.backend = card.name, card.digest, self._backend
        if card.is_remote:
            raise RemoteModel
        return card

    async def _acquire(self, account: Account, request: AnyRequest, card: ModelCard) -> Lease[Runner]:
        account.is_waiting = True
        try:
            key = self._key(request, card, Mode(account.mode))
            if isinstance(request, TokenizeRequest):  # its answer is the same whatever the model was loaded for
                key = self._pool.key_of(card.residency) or replace(key, mode=_mode_of(card))
                account.mode = key.mode.value
            return await self._pool.acquire(key, card, request.keep_alive_s)
        finally:
            account.is_waiting = False

    def _key(self, request: AnyRequest, card: ModelCard, mode: Mode = Mode.COMPLETION) -> RunnerKey:
        """Which runner can serve a request that has met its model."""
        return RunnerKey(
            backend=self._backend,
            model=card.residency,
            mode=mode,
            options=replace(request.load, num_ctx=None),
            num_ctx=self._policy.window(request.load, card),
        )

    async def _refuse(self, account: Account, error: HeadwaterError) -> None:
        account.error_code = error.code
        await self._accounts.settle(account, status=error.status, reason=_reason(error))


def _complete(request: GenerateRequest, card: ModelCard) -> GenerateRequest:
    """The request with what the model and the dialect say where the client said nothing."""
    sampling = request.sampling.over(card.sampling).over(request.defaults)
    template = (card.go_template or None) if request.template is None else request.template
    return replace(request, sampling=sampling, template=template)


async def _render(runner: Runner, request: GenerateRequest, card: ModelCard) -> str:
    return await runner.render(_complete(request, card))


async def _tokenize(runner: Runner, request: TokenizeRequest, card: ModelCard) -> Tokenization:
    return await runner.tokenize(request)


def _require(card: ModelCard, mode: Mode) -> None:
    """Refuse before loading what loading would not make possible; any model but a reranker can embed somehow."""
    can_rank = "rerank" in card.capabilities
    if can_rank is not (mode is Mode.RERANKING):
        raise UnsupportedCapability(card.name, "embedding" if can_rank else "rerank")


def _mode_of(card: ModelCard) -> Mode:
    """What a model is mostly loaded for."""
    if "rerank" in card.capabilities:
        return Mode.RERANKING
    return Mode.COMPLETION if "completion" in card.capabilities else Mode.EMBEDDING


async def _load_only(runner: Runner, request: EmbedRequest) -> Embeddings:
    return Embeddings((), Usage(), Timings())


def _reason(error: HeadwaterError) -> str:
    """How the ledger names the end: the engine's own failures are errors, everything else was refused."""
    if isinstance(error, Cancelled):
        return FinishReason.CANCEL.value
    return FinishReason.ERROR.value if error.status == 500 else "refused"


def _timings(engine: Timings, lease: Lease[Runner], account: Account, *, ttft_s: float) -> Timings:
    """The engine's times with what was spent before the request reached it."""
    return Timings(
        queue_s=engine.queue_s + (0.0 if lease.loaded else lease.waited_s),
        load_s=lease.waited_s if lease.loaded else 0.0,
        prefill_s=engine.prefill_s,
        decode_s=engine.decode_s,
        ttft_s=ttft_s,
        total_s=account.elapsed_s,
    )


class Answering:
    """The events of one admitted request on their way to the dialect.

    A class and not a generator, because closing a generator that was never started runs none of its code, and a place
    on a runner must be given back all the same.
    """

    def __init__(
        self, pool: Pool[Runner], accounts: Accounts, account: Account, lease: Lease[Runner], reply: Reply
    ) -> None:
        self._pool = pool
        self._accounts = accounts
        self._account = account
        self._lease = lease
        self._reply = reply
        self._ttft_s = 0.0
        self._delivered = Usage()
        self._is_over = False

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._is_over:
            raise StopAsyncIteration
        try:
            event = await anext(self._reply)
        except StopAsyncIteration:
            raise await self._fail(HeadwaterError("the worker's answer ended without an end")) from None
        except HeadwaterError as error:
            raise await self._fail(error) from None
        if isinstance(event, Finished):
            return await self._finish(event)
        if not self._ttft_s and not isinstance(event, ChoiceFinished):
            self._ttft_s = self._account.elapsed_s
        self._delivered = self._reply.usage
        return event

    async def _finish(self, event: Finished) -> Finished:
        """The last event leaves once the row is committed."""
        self._is_over = True
        timings = _timings(event.timings, self._lease, self._account, ttft_s=self._ttft_s or self._account.elapsed_s)
        self._pool.release(self._lease.resident)
        recorded = self._accounts.settle(
            self._account, status=200, reason=event.reason.value, usage=event.usage, timings=timings
        )
        await asyncio.shield(asyncio.gather(self._reply.finish(), recorded))
        return replace(event, timings=timings)

    async def _fail(self, error: HeadwaterError) -> HeadwaterError:
        self._is_over = True
        self._account.error_code = error.code
        self._pool.release(self._lease.resident)
        self._reply.close()
        await self._accounts.settle(
            self._account,
            status=error.status,
            reason=FinishReason.ERROR.value,
            usage=self._reply.usage,
            timings=_timings(Timings(), self._lease, self._account, ttft_s=self._ttft_s),
        )
        return error

    async def aclose(self) -> None:
        """The caller left, unless the answer is over: cancel, and record what it has cost."""
        if not self._is_over:
            self._is_over = True
            await asyncio.shield(asyncio.ensure_future(self._abandon()))

    async def _abandon(self) -> None:
        try:
            cost = await self._reply.cancel()
        finally:
            self._pool.release(self._lease.resident)
        usage, engine = cost or (self._reply.usage, Timings())
        await self._accounts.settle(
            self._account,
            status=CLIENT_GONE,
            reason=FinishReason.CANCEL.value,
            usage=usage,
            timings=_timings(engine, self._lease, self._account, ttft_s=self._ttft_s),
            wasted_tokens=max(usage.completion_tokens - self._delivered.completion_tokens, 0),
        )
