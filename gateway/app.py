"""The one place that wires real objects in: from settings to a running server.

Assembles ledger, metrics, pool, dispatch and dialects into one ASGI app, and runs it under uvicorn with a socket that
is bound before anything else starts, so that a taken port is the first thing a user hears about.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import platform
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib.metadata import version
from itertools import count
from pathlib import Path

import httpx
import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from compat.browser import BrowserGuard
from compat.model_runner.library import ModelRunnerLibraryRoutes
from compat.model_runner.prefix import StripPrefix
from compat.model_runner.routes import ModelRunnerRoutes
from compat.model_runner.routes import surfaces as model_runner_surfaces
from compat.ollama.library import LibraryRoutes
from compat.ollama.routes import VERSION, OllamaRoutes
from compat.ollama.transfers import TransferRoutes
from compat.ollama.transport import http_error_response as ollama_http_error
from compat.openai.routes import OpenAIRoutes
from compat.openai.routes import http_error_response as openai_http_error
from compat.openai.routes import surfaces as openai_surfaces
from engines.backend import Backend, BackendConfiguration
from engines.chat.gotemplate.template import GoTemplate
from engines.errors import GGUFParseError, HeadwaterError
from engines.llamacpp.backend import LlamaCppBackend
from engines.llamacpp.quantizer import rewrite
from engines.model import ModelCard
from engines.request import Mode
from engines.store.catalog import Catalog
from engines.store.create import Creator
from engines.store.credentials import docker_config_path
from engines.store.disk import Disk
from engines.store.docker import DockerStore
from engines.store.folder import Folder
from engines.store.seed import seed_demo
from engines.store.transfer import Access, Transfers
from engines.store.writer import StoreWriter
from gateway import admin
from gateway.accounting import Accounts, RequestMiddleware
from gateway.dispatch import Dispatch
from gateway.jobs import Jobs
from gateway.library import Library
from gateway.logs import set_up_logging
from gateway.memory import Memory
from gateway.metrics import CONTENT_TYPE, Metrics
from gateway.origin import OriginResolver
from gateway.pool import Pool
from gateway.residents import RunnerKey, State
from gateway.runner import Runner
from gateway.settings import Settings
from gateway.usage.ledger import Ledger

log = logging.getLogger(__name__)

AUTO_PLACES = 32
"""Without OLLAMA_NUM_PARALLEL a model is handed up to 32 requests together; how many it decodes at once is its own."""

MAX_MEASURED = 256
"""Estimates that are remembered: clients choose the options that they depend on."""

LAST_WORDS_S = 5
"""How long error answers may take to reach their clients once the grace time is over."""

MAX_SOCKET_PATH = 100  # bytes; macOS allows 104, Linux 108


class House:
    """Everything that lives as long as the server, opened and closed in order.

    Args:
        backend: what runs models; tests hand in one with a fake engine.
    """

    def __init__(self, settings: Settings, backend: Backend | None = None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.catalog = Catalog(
            settings.models,
            DockerStore(settings.docker_models),
            *map(Folder, settings.model_folders),
            go_templates=settings.go_templates,
        )
        self.backend = backend or LlamaCppBackend(self.catalog.weights, step_limit_s=settings.step_limit_s)
        self._sockets = _socket_directory(settings.data)
        self._generation = count(1)
        self._measured: dict[RunnerKey, dict[int, int]] = {}

    async def open(self) -> None:
        """Open the ledger and what stands on it."""
        settings = self.settings
        self.ledger = await Ledger.open(settings.database_url, on_unrecorded=self.metrics.inc_unrecorded)
        self.accounts = Accounts(self.ledger, self.metrics)
        self.pool: Pool[Runner] = Pool(
            self._make_runner,
            max_residents=settings.max_loaded_models,
            places=settings.num_parallel or AUTO_PLACES,
            max_waiting=settings.max_queue,
            keep_alive_s=min(settings.keep_alive_s, settings.max_keep_alive_s),
            load_timeout_s=settings.load_timeout_s,
            measure=self._measure,
            capacity=Memory(settings.memory_limit_bytes).capacity_bytes,
        )
        self.dispatch = Dispatch(
            self.catalog,
            self.pool,
            self.accounts,
            backend=self.backend.name,
            policy=settings.load_policy,
        )
        self.jobs, self.disk = Jobs(), Disk()
        writer = StoreWriter(settings.models, keeps_unused=settings.keeps_unused)
        creator = Creator(writer, rewrite=rewrite, check_template=_check_template)
        self.transfers = Transfers(writer, _registry_access(settings), self.disk)
        self.library = Library(writer, self.catalog, creator, self.jobs, self.transfers, self.disk)
        self.metrics.watch(in_flight=self.accounts.in_flight, waiting=self.accounts.waiting, runners=self.pool.statuses)

    async def close(self) -> None:
        """Stop every worker, then commit what is left to record."""
        await self.jobs.close()
        await self.transfers.close()
        self.disk.close()
        await self.pool.close()
        await self.accounts.close()
        await self.ledger.close()
        shutil.rmtree(self._sockets, ignore_errors=True)

    async def _measure(self, key: RunnerKey, card: ModelCard) -> dict[int, int]:
        """The memory that a runner would take, by the number of its windows; empty when that cannot be told."""
        known = self._measured.get(key)
        if known is None:
            most = self._most_windows(key, card)
            choices = (most,) if self.settings.num_parallel else range(1, most + 1)
            try:
                needs = {
                    n: await self.backend.required_memory(card.weights_digest, self._configure(key, card, n))
                    for n in choices
                }
            except (GGUFParseError, OSError):  # the worker will say what is wrong with the file
                return {}
            known = {n: need.ram_bytes for n, need in needs.items() if need.ram_bytes is not None}
            if len(self._measured) >= MAX_MEASURED:
                self._measured.pop(next(iter(self._measured)))
            self._measured[key] = known
        return known

    def _most_windows(self, key: RunnerKey, card: ModelCard) -> int:
        """Windows that a runner holds when there is room; one that only reads needs a single one."""
        if key.mode is not Mode.COMPLETION:
            return 1
        return self.settings.num_parallel or self.backend.windows(self._configure(key, card, 1))

    def _configure(self, key: RunnerKey, card: ModelCard, num_windows: int) -> BackendConfiguration:
        settings = self.settings
        return BackendConfiguration(
            context_size=key.num_ctx,
            num_parallel=num_windows,
            num_sequences=settings.num_parallel or AUTO_PLACES,
            num_batch=key.options.num_batch,
            num_gpu=key.options.num_gpu,
            main_gpu=key.options.main_gpu,
            num_thread=key.options.num_thread,
            use_mmap=key.options.use_mmap,
            use_mlock=settings.use_mlock,
            tensor_split=settings.tensor_split,
            flash_attention=settings.flash_attention,
            cache_type=settings.cache_type,
            parts=card.weight_parts,
            adapters=card.adapters,
            prefill_slowdown=settings.prefill_slowdown,
            shelf=settings.data / "prefixes",
            shelf_memory_bytes=settings.prefix_memory_bytes,
            shelf_bytes=settings.prefix_disk_bytes,
        )

    def _make_runner(
        self, key: RunnerKey, card: ModelCard, on_exit: Callable[[HeadwaterError], None], num_windows: int | None
    ) -> Runner:
        path = self._sockets / f"worker-{next(self._generation)}.sock"
        return Runner(
            self.backend,
            path,
            model=card.weights_digest,
            model_ref=card.name,
            mode=key.mode,
            config=self._configure(key, card, num_windows or self._most_windows(key, card)),
            on_exit=on_exit,
        )


def _registry_access(settings: Settings) -> Access:
    """Registries look for Ollama's name, and keys and passwords are where Ollama and Docker keep them."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    return Access(
        user_agent=f"ollama/{VERSION} ({machine} {sys.platform}) headwater/{version('headwater')}",
        docker_config=docker_config_path(),
        key_file=Path.home() / ".ollama" / "id_ed25519",
        mirrors=settings.registry_mirrors,
    )


def _check_template(text: str) -> None:
    """Raises TemplateError for what is no Go template."""
    GoTemplate(text)


def _tidy(settings: Settings) -> None:
    """Delete what nobody needs in the store, as Ollama does when it starts; that it cannot is no reason not to."""
    try:
        if not settings.keeps_unused and (num_deleted := StoreWriter(settings.models).tidy()):
            log.info("deleted %s files that no model needs from %s", num_deleted, settings.models)
    except HeadwaterError as error:
        log.warning("the store was not tidied: %s", error.message)


def _socket_directory(data: Path) -> Path:
    """A directory of our own for sockets: short enough for a socket's path, and readable by nobody else.

    Those of servers that were killed are removed; the name says whose it is.
    """
    run = data / "run"
    if len(os.fsencode(run)) + len("/headwater-4194304-00000000/worker-000000.sock") > MAX_SOCKET_PATH:
        run = Path(tempfile.gettempdir())
    run.mkdir(parents=True, exist_ok=True)
    for old in run.glob("headwater-*-*"):
        owner = old.name.split("-")[1]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"headwater-{os.getpid()}-", dir=run))


def make_app(house: House) -> Starlette:
    """The ASGI app of an open house."""
    settings, dispatch = house.settings, house.dispatch
    ollama = OllamaRoutes(dispatch, body_limit_bytes=settings.body_limit_bytes)
    openai = OpenAIRoutes(dispatch, body_limit_bytes=settings.body_limit_bytes)
    model_runner = ModelRunnerRoutes(dispatch, openai)
    routes: list[BaseRoute] = [
        *_own_routes(house),
        *admin.routes(house.ledger),
        *admin.runner_routes(house.pool),
        *ollama.routes(),
        *LibraryRoutes(house.library, body_limit_bytes=settings.body_limit_bytes).routes(),
        *TransferRoutes(house.library, body_limit_bytes=settings.body_limit_bytes).routes(),
        *openai.routes(),
        *model_runner.routes(),
        *ModelRunnerLibraryRoutes(dispatch, house.library, body_limit_bytes=settings.body_limit_bytes).routes(),
    ]
    middleware = [
        Middleware(StripPrefix),
        Middleware(
            RequestMiddleware,
            resolver=OriginResolver(settings.trusted_proxies),
            accounts=house.accounts,
            metrics=house.metrics,
            surfaces={**ollama.surfaces(), **openai_surfaces(), **model_runner_surfaces()},
        ),
        Middleware(BrowserGuard, allowed_origins=settings.origins, check_host=_is_loopback(settings.host)),
    ]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_error})
    app.router.redirect_slashes = False
    return app


def _own_routes(house: House) -> list[Route]:
    async def health(http: Request) -> Response:
        return JSONResponse({"status": "ok", "server": "headwater", "version": version("headwater")})

    async def ready(http: Request) -> Response:
        return JSONResponse({"status": "ready", "runners": len(house.pool.residents)})

    async def metrics(http: Request) -> Response:
        ready = [resident for resident in house.pool.residents if resident.state is State.READY]
        texts = await asyncio.gather(*(resident.runner.metrics() for resident in ready))
        labels = [{"backend": r.key.backend, "model": r.card.name, "mode": r.key.mode.value} for r in ready]
        return Response(house.metrics.render(zip(labels, texts, strict=True)), media_type=CONTENT_TYPE)

    return [Route("/health", health), Route("/ready", ready), Route("/metrics", metrics)]


def _http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if http.url.path.startswith(("/v1/", "/engines/")):
        return openai_http_error(http, error)
    return ollama_http_error(http, error)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host in ("::1", "[::1]")


class PortTaken(Exception):
    """Someone else listens where we were to."""


def bind(settings: Settings) -> socket.socket:
    """The listening socket. Raises PortTaken with what to do, or OSError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(_explain_taken_port(settings)) from error
        raise
    return listener


def _explain_taken_port(settings: Settings) -> str:
    who = "another program"
    with contextlib.suppress(httpx.HTTPError), httpx.Client(timeout=2, trust_env=False) as client:
        if '"headwater"' in client.get(f"{settings.base_url}/health").text:
            who = "Headwater"
        elif "Ollama is running" in client.get(settings.base_url).text:
            who = "Ollama"
    return (
        f"{who} is already listening there. Stop it first, or choose another address: "
        "OLLAMA_HOST=127.0.0.1:11500 headwater serve"
    )


class _Server(uvicorn.Server):
    """uvicorn, except that signals end `serve` and nothing else.

    uvicorn raises them again once it is done, which would end the process before the house is closed.

    Args:
        end: called when the grace time is over; what still runs or waits then ends with an error in its own dialect.
        grace_s: how long requests may go on after the first signal.
    """

    def __init__(self, config: uvicorn.Config, end: Callable[[], Awaitable[None]], grace_s: float) -> None:
        super().__init__(config)
        self._end = end
        self._grace_s = grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let requests finish within the grace time, end the rest, and see them off."""
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()  # idle ones close now, busy ones after their answer
        deadline = time.monotonic() + self._grace_s
        while self.server_state.tasks and time.monotonic() < deadline and not self.force_exit:  # noqa: ASYNC110  # uvicorn keeps a set
            await asyncio.sleep(0.05)
        await self._end()
        await super().shutdown([])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Turn SIGTERM and SIGINT into an orderly end; a second SIGINT into a quick one."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


async def run(settings: Settings, listener: socket.socket, backend: Backend | None = None) -> None:
    """Serve until SIGTERM or SIGINT; running requests may finish within the grace time. `backend` is as in House."""
    house = House(settings, backend)
    await asyncio.to_thread(seed_demo, settings.models, settings.data / "seeded")
    await asyncio.to_thread(_tidy, settings)
    await house.open()
    try:
        config = uvicorn.Config(
            make_app(house),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,  # uvicorn believes X-Forwarded-For from loopback; who is believed is ours to say
            timeout_graceful_shutdown=LAST_WORDS_S,
        )
        server = _Server(config, house.pool.close, settings.shutdown_grace_s)
        log.info("Headwater %s listens on %s, models in %s", version("headwater"), settings.base_url, settings.models)
        await server.serve(sockets=[listener])
    finally:
        await house.close()


def serve(settings: Settings) -> int:
    """Run the server in the foreground; returns the exit status."""
    set_up_logging(debug=settings.debug)
    try:
        listener = bind(settings)
    except (PortTaken, OSError, UnicodeError) as error:  # the last is a host name that cannot be one
        sys.stderr.write(f"headwater: cannot listen on {settings.host}:{settings.port}: {error}\n")
        return 1
    try:
        uvicorn_loop = uvicorn.Config("", log_config=None).get_loop_factory()
        with listener, asyncio.Runner(loop_factory=uvicorn_loop) as runner:
            settings.data.mkdir(parents=True, exist_ok=True)
            runner.run(run(settings, listener))
    except (HeadwaterError, OSError) as error:
        sys.stderr.write(f"headwater: {error}\n")
        return 1
    return 0
