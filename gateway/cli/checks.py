"""What `headwater doctor` looks at: one function a question, each with its answer and what to do next.

Nothing is changed by looking: no directory is created, no database opened for writing, and llama.cpp is loaded in a
process of its own, where a broken library can crash without harm.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import httpx
import msgspec
import psutil

from engines.llamacpp.kernels import library as kernels
from engines.store.catalog import Catalog
from engines.store.manifests import walk
from gateway.cli.format import size

if TYPE_CHECKING:
    from gateway.settings import Settings

_LOAD_S = 60.0  # a cold disk and a CUDA library
_NETWORK_S = 3.0
_LITTLE_MEMORY = 2 * 10**9  # below it even a small model hardly loads
_LITTLE_DISK = 5 * 10**9  # below it hardly a model fits

_ASK_LLAMA_CPP = """
import json, llama_cpp
info = llama_cpp.llama_print_system_info().decode("utf-8", "replace")
print(json.dumps({"version": llama_cpp.__version__, "gpu": bool(llama_cpp.llama_supports_gpu_offload()), "info": info}))
"""


class Level(StrEnum):
    """How bad it is. Only a problem keeps Headwater from working."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(msgspec.Struct, frozen=True):
    """One answer: what was looked at, how it is, and what to do about it when it is not well."""

    check: str
    level: Level
    detail: str
    advice: str = ""


class _Build(msgspec.Struct):
    version: str
    gpu: bool
    info: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Every finding about this machine and these settings, as soon as it is known."""
    yield check_python()
    yield check_llama_cpp()
    yield check_kernels()
    yield check_models(settings.models)
    yield check_data(settings.data)
    yield check_database(settings.database_url)
    yield check_port(settings.base_url)
    yield check_memory()
    yield check_disk(settings.models)


def check_python() -> Finding:
    """The interpreter. Too old a one does not get this far."""
    return Finding("python", Level.OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def check_llama_cpp() -> Finding:
    """Whether llama.cpp can be loaded, and what it was built with."""
    command = [sys.executable, "-c", _ASK_LLAMA_CPP]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_LOAD_S, check=True)  # noqa: S603 - our own interpreter
        build = msgspec.json.decode(done.stdout, type=_Build)
    except subprocess.TimeoutExpired:
        return Finding("llama.cpp", Level.PROBLEM, f"did not load within {_LOAD_S:.0f} s", _REINSTALL)
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode(errors="replace").strip() or f"exit status {error.returncode}"
        return Finding("llama.cpp", Level.PROBLEM, f"cannot be loaded: {words.splitlines()[-1]}", _REINSTALL)
    except msgspec.MsgspecError:
        return Finding("llama.cpp", Level.PROBLEM, "loads, but says nothing sensible", _REINSTALL)
    device = "with GPU support" if build.gpu else "for CPU only"
    # `CPU : SSE3 = 1 | AVX2 = 1 | ...`, a colon after the name of each device
    features = re.findall(r"(\w+) = 1", build.info)
    return Finding("llama.cpp", Level.OK, ", ".join([f"llama-cpp-python {build.version} {device}", *features]))


def check_kernels() -> Finding:
    """Whether processors compute with our kernels; without them everything works, and takes longer."""
    if reason := kernels.why_not():
        return Finding("kernels", Level.OK, f"llama.cpp's own: {reason}")
    return Finding("kernels", Level.OK, "AVX-512 VNNI, for Q4_0, Q8_0, Q4_K, Q5_K and Q6_K weights")


_REINSTALL = "reinstall it: pip install --force-reinstall --no-cache-dir llama-cpp-python"


def check_models(models: Path) -> Finding:
    """The model store: there, readable, writable, and how many models it has."""
    if not models.is_dir():
        if models.exists():
            return Finding("models", Level.PROBLEM, f"{models} is not a directory", "set OLLAMA_MODELS to a directory")
        return Finding("models", Level.WARNING, f"{models} does not exist yet", _GET_MODEL)
    if not os.access(models, os.R_OK | os.X_OK):
        return Finding("models", Level.PROBLEM, f"{models} cannot be read", f"give this user read access to {models}")
    num_models = sum(not card.is_remote for card in Catalog(models).list())
    num_useless = sum(1 for _ in walk(models)) - num_models
    detail = f"{num_models} {'model' if num_models == 1 else 'models'} in {models}"
    if not os.access(models, os.W_OK):
        return Finding("models", Level.WARNING, f"{detail}, read-only", f"to add models, allow writing to {models}")
    if num_useless > 0:
        advice = "pull them again, unless they are cloud models or not in GGUF form, which Headwater does not run"
        return Finding("models", Level.WARNING, f"{detail}, and {num_useless} that cannot be used", advice)
    if not num_models:
        return Finding("models", Level.WARNING, detail, _GET_MODEL)
    return Finding("models", Level.OK, detail)


_GET_MODEL = "install a model, or set OLLAMA_MODELS to where your models are"


def check_data(data: Path) -> Finding:
    """The data directory: writable, or can be created."""
    nearest = _nearest(data)
    if not nearest.is_dir():
        return Finding("data", Level.PROBLEM, f"{nearest} is not a directory", "set HEADWATER_DATA to a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        advice = f"allow writing to {nearest}, or set HEADWATER_DATA to another directory"
        return Finding("data", Level.PROBLEM, f"{data} cannot be written", advice)
    return Finding("data", Level.OK, str(data) if data.exists() else f"{data} will be created at the first start")


def check_database(url: str) -> Finding:
    """The usage ledger: reachable, and its schema not newer than this program."""
    scheme, _, rest = url.partition("://")
    if scheme.startswith("sqlite"):
        return _check_sqlite(Path(rest.removeprefix("/").partition("?")[0]))
    address = urlsplit(url)
    place = f"{address.hostname}:{address.port or 5432}"
    try:
        socket.create_connection((address.hostname or "", address.port or 5432), timeout=_NETWORK_S).close()
    except OSError as error:
        return Finding("database", Level.PROBLEM, f"{place} cannot be reached: {error}", "start the database server")
    return Finding("database", Level.OK, f"{place} answers; its schema is checked at the start")


def _check_sqlite(path: Path) -> Finding:
    from gateway.usage.tables import REVISION  # noqa: PLC0415 - imports SQLAlchemy, which no other command needs

    if not path.exists():
        return Finding("database", Level.OK, f"{path} will be created at the first start")
    # Without a write-ahead log nobody has it open, and `immutable` leaves no files behind in its directory.
    mode = "mode=ro" if Path(f"{path}-wal").exists() else "immutable=1"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?{mode}", uri=True, timeout=_NETWORK_S)) as database:
            row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        advice = "move the file away to start a new ledger, or restore it from a backup"
        return Finding("database", Level.PROBLEM, f"{path} cannot be read: {error}", advice)
    revision = row[0] if row else "none"
    if revision == REVISION:
        return Finding("database", Level.OK, f"{path}, schema {revision}")
    return Finding("database", Level.WARNING, f"{path} has schema {revision}, not {REVISION}", _OTHER_SCHEMA)


_OTHER_SCHEMA = "an older schema is brought up to date at the next start; for a newer one, install a newer Headwater"


def check_port(base_url: str) -> Finding:
    """Who answers where the server would listen: nobody, Headwater, Ollama, or a stranger."""
    place = urlsplit(base_url).netloc
    another = "stop it, or let Headwater listen elsewhere: OLLAMA_HOST=127.0.0.1:11435"
    try:
        with httpx.Client(base_url=base_url, timeout=_NETWORK_S, trust_env=False) as client:
            if _is_headwater(client.get("/health")):
                return Finding("port", Level.OK, f"Headwater is running at {place}")
            if client.get("/").text.strip() == "Ollama is running":
                return Finding("port", Level.PROBLEM, f"{place} is held by Ollama", another)
    except httpx.ConnectError:
        return Finding("port", Level.OK, f"{place} is free; start the server with `headwater serve`")
    except (httpx.HTTPError, httpx.InvalidURL):
        pass  # somebody listens, and it is not HTTP
    return Finding("port", Level.PROBLEM, f"{place} is held by another program", another)


def _is_headwater(answer: httpx.Response) -> bool:
    try:
        return bool(answer.json()["server"] == "headwater")
    except (ValueError, TypeError, KeyError):
        return False


def check_memory() -> Finding:
    """Memory that a model could take now."""
    memory = psutil.virtual_memory()
    detail = f"{size(memory.available)} of {size(memory.total)} available"
    if memory.available < _LITTLE_MEMORY:
        return Finding("memory", Level.WARNING, detail, "close other programs, or use small models")
    return Finding("memory", Level.OK, detail)


def check_disk(models: Path) -> Finding:
    """Room for further models."""
    free = shutil.disk_usage(_nearest(models)).free
    detail = f"{size(free)} free for models"
    if free < _LITTLE_DISK:
        return Finding("disk", Level.WARNING, detail, "free some space, or set OLLAMA_MODELS to a larger disk")
    return Finding("disk", Level.OK, detail)


def _nearest(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())
