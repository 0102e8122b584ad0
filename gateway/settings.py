"""What the server is told from outside, read once at the edge.

Every `OLLAMA_*` variable that users already set keeps its meaning (`spec/ollama.md` section 12); ours are
`HEADWATER_*`. A bad value stops the start and names the variable, the value and what is accepted.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import platformdirs

from compat.browser import parse_origins
from compat.keep_alive import parse_keep_alive
from engines.errors import BadRequest
from engines.store.names import DEFAULT_HOST
from gateway.policy import PINNABLE, LoadPolicy

T = TypeVar("T")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

DEFAULT_PORT = 11434
CACHE_TYPES = ("f16", "q8_0", "q4_0")
CACHE_TYPES_ACCEPTED = "f16, q8_0 or q4_0, the last two not with OLLAMA_FLASH_ATTENTION=0"
_HOST = re.compile(
    r"(?:(?P<scheme>https?)://|(?!.*://))"
    r"(?P<host>\[[^\]]*\]|[^:/]*|[0-9a-fA-F]*:[0-9a-fA-F]*:[0-9a-fA-F:]*)"
    r"(?::(?P<port>\d*))?(?:/.*)?"
)


_MIRROR = re.compile(r"https?://[A-Za-z0-9._\[\]-][A-Za-z0-9._:\[\]-]*(?:/[A-Za-z0-9._~/-]*)?")


class SettingsError(ValueError):
    """A variable has a value that means nothing."""

    def __init__(self, variable: str, value: str, accepted: str) -> None:
        super().__init__(f"{variable}={value!r} is not valid: expected {accepted}")
        self.variable = variable
        self.value = value
        self.accepted = accepted


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set.

    Attributes:
        models: the store, in Ollama's layout. data: database, sockets and logs.
        docker_models: Docker Model Runner's store, which is only read, as are model_folders of GGUF files.
        keeps_unused: leave blobs in the store that no model needs.
        keep_alive_s: how long an idle model stays; infinite for ever. load_timeout_s: the longest load.
        step_limit_s: the longest step of a small model; a worker that takes longer hangs and is ended.
        num_parallel: requests a model serves at once; 0 lets the server choose.
        max_loaded_models: models resident at once. max_queue: requests that may wait for a model or a place.
        context_length: window where neither request nor model says one; 0 lets the server choose.
        max_context: the largest window of any request, 0 for no limit. max_keep_alive_s: how long an idle model stays
            at most, whatever a request says. pinned_options: what requests cannot choose (`gateway.policy`).
        go_templates: which of two templates of a model is used; None leaves it to them.
        flash_attention: None lets the engine choose. cache_type: of the K and V that are kept. use_mlock: keep weights
            from being swapped out. tensor_split: shares of each GPU. memory_limit_bytes: of all models together, 0 lets
            the machine decide.
        prefill_slowdown: how many times longer a step may take for those who are being answered when a prompt is read
            beside them. prefix_memory_bytes, prefix_disk_bytes: what prefixes of prompts may take
            outside the KV cache, of each worker in memory and of all on the disk, 0 for nothing.
        registry_mirrors: registries to ask first, by the host that they stand in for.
        origins: further browser origins. trusted_proxies: peers whose word on where a request came from is believed.
        body_limit_bytes: largest request body. shutdown_grace_s: how long running requests may go on after SIGTERM.
    """

    host: str
    port: int
    models: Path
    docker_models: Path
    model_folders: tuple[Path, ...]
    keeps_unused: bool
    data: Path
    database_url: str
    keep_alive_s: float
    load_timeout_s: float
    step_limit_s: float
    num_parallel: int
    max_loaded_models: int
    max_queue: int
    context_length: int
    max_context: int
    max_keep_alive_s: float
    pinned_options: frozenset[str]
    go_templates: bool | None
    flash_attention: bool | None
    cache_type: str
    use_mlock: bool
    tensor_split: tuple[float, ...]
    memory_limit_bytes: int
    prefill_slowdown: float
    prefix_memory_bytes: int
    prefix_disk_bytes: int
    registry_mirrors: Mapping[str, str]
    origins: tuple[str, ...]
    trusted_proxies: tuple[Network, ...]
    body_limit_bytes: int
    shutdown_grace_s: float
    debug: bool

    @property
    def base_url(self) -> str:
        """Where a client on this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)  # noqa: S104  # a name, not a bind
        return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{self.port}"

    @property
    def load_policy(self) -> LoadPolicy:
        """What clients may choose of how models are loaded."""
        return LoadPolicy(self.context_length, self.max_context, self.max_keep_alive_s, self.pinned_options)

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """The settings that an environment describes. Raises SettingsError."""
        read = _Reader(env)
        host, port = read("OLLAMA_HOST", "", _host, "[http://]host[:port], such as 127.0.0.1:11434")
        flash_attention = read("OLLAMA_FLASH_ATTENTION", "", _optional_flag, "true, false or nothing to choose")
        data = read("HEADWATER_DATA", platformdirs.user_data_dir("headwater"), _path, "a directory")
        return cls(
            host=host,
            port=port,
            models=read("OLLAMA_MODELS", "~/.ollama/models", _path, "a directory"),
            docker_models=read("HEADWATER_DMR_STORE", "~/.docker/models", _path, "a directory"),
            model_folders=read("HEADWATER_MODELS_PATH", "", _paths, f"directories with {os.pathsep!r} between them"),
            keeps_unused=read("OLLAMA_NOPRUNE", "0", _flag, "true or false"),
            data=data,
            database_url=read(
                "HEADWATER_DATABASE_URL", f"sqlite+aiosqlite:///{data / 'usage.db'}", str, "a database's address"
            ),
            keep_alive_s=read("OLLAMA_KEEP_ALIVE", "5m", _keep_alive, "seconds or a duration such as 5m, -1 for ever"),
            load_timeout_s=read("OLLAMA_LOAD_TIMEOUT", "5m", _load_timeout, "seconds or a duration such as 5m"),
            step_limit_s=read("HEADWATER_STEP_LIMIT", "2m", _load_timeout, "seconds or a duration such as 2m"),
            num_parallel=read("OLLAMA_NUM_PARALLEL", "0", _count, "a whole number, 0 to choose"),
            max_loaded_models=read("OLLAMA_MAX_LOADED_MODELS", "0", _count, "a whole number, 0 to choose") or 3,
            max_queue=read("OLLAMA_MAX_QUEUE", "512", _positive, "a whole number above 0"),
            context_length=read("OLLAMA_CONTEXT_LENGTH", "0", _count, "a number of tokens, 0 to choose"),
            max_context=read("HEADWATER_MAX_CONTEXT", "0", _count, "a number of tokens, 0 for no limit"),
            max_keep_alive_s=read(
                "HEADWATER_MAX_KEEP_ALIVE", "-1", _keep_alive, "seconds or a duration such as 1h, -1 for no limit"
            ),
            pinned_options=read(
                "HEADWATER_PINNED_OPTIONS", "", _pins, f"all, or names with commas between them: {', '.join(PINNABLE)}"
            ),
            go_templates=read("OLLAMA_GO_TEMPLATE", "", _optional_flag, "true, false or nothing to choose"),
            flash_attention=flash_attention,
            cache_type=read("OLLAMA_KV_CACHE_TYPE", "f16", partial(_cache_type, flash_attention), CACHE_TYPES_ACCEPTED),
            use_mlock=read("HEADWATER_MLOCK", "0", _flag, "true or false"),
            tensor_split=read("HEADWATER_TENSOR_SPLIT", "", _shares, "a comma-separated list of shares, such as 3,1"),
            memory_limit_bytes=read(
                "HEADWATER_MEMORY_LIMIT", "0", _size, "a number of bytes such as 12GiB, 0 to choose"
            ),
            prefill_slowdown=read("HEADWATER_PREFILL_SLOWDOWN", "2.5", _slowdown, "a factor from 1.1 to 100"),
            prefix_memory_bytes=read("HEADWATER_PREFIX_MEMORY", "512MiB", _size, "a number of bytes, such as 512MiB"),
            prefix_disk_bytes=read("HEADWATER_PREFIX_DISK", "4GiB", _size, "a number of bytes, such as 4GiB"),
            registry_mirrors=read(
                "HEADWATER_REGISTRY_MIRROR",
                "",
                _mirrors,
                "addresses such as https://mirror.lan or docker.io=https://mirror.lan",
            ),
            origins=read("OLLAMA_ORIGINS", "", parse_origins, "a comma-separated list of origins"),
            trusted_proxies=read(
                "HEADWATER_TRUSTED_PROXIES",
                "",
                _networks,
                "a comma-separated list of addresses or networks, such as 10.0.0.0/8",
            ),
            body_limit_bytes=read("HEADWATER_BODY_LIMIT", str(64 << 20), _positive, "a number of bytes"),
            shutdown_grace_s=read(
                "HEADWATER_SHUTDOWN_GRACE", "30s", _keep_alive, "seconds or a duration such as 30s, -1 for ever"
            ),
            debug=read("OLLAMA_DEBUG", "0", _flag, "true or false"),
        )


class _Reader:
    """Reads variables as Ollama does: without surrounding spaces and quotes, empty meaning unset."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env

    def __call__(self, variable: str, default: str, parse: Callable[[str], T], accepted: str) -> T:
        value = self._env.get(variable, "").strip(" \t\r\n\"'") or default
        try:
            return parse(value)
        except (ValueError, BadRequest) as error:
            raise SettingsError(variable, value, accepted) from error


def _host(value: str) -> tuple[str, int]:
    """`[scheme://]host[:port][/path]`; the default port is 80 or 443 when a scheme is given."""
    found = _HOST.fullmatch(value)
    if found is None:
        raise ValueError(value)
    default = {"http": 80, "https": 443}.get(found["scheme"] or "", DEFAULT_PORT)
    port = int(found["port"]) if found["port"] else default
    if port > 65535:
        raise ValueError(value)
    host = found["host"].strip("[]")
    only_port = not host and value.startswith(":")
    return host or ("0.0.0.0" if only_port else "127.0.0.1"), port  # noqa: S104  # what `:1234` means to Ollama


def _path(value: str) -> Path:
    return Path(value).expanduser().absolute()


def _paths(value: str) -> tuple[Path, ...]:
    return tuple(_path(part) for part in value.split(os.pathsep) if part.strip())


def _keep_alive(value: str) -> float:
    """Integer seconds or a Go duration."""
    seconds = parse_keep_alive(int(value) if re.fullmatch(r"[+-]?\d+", value) else value)
    if seconds is None:
        raise ValueError(value)
    return seconds


def _load_timeout(value: str) -> float:
    """As a keep-alive, but zero too means no limit."""
    return _keep_alive(value) or float("inf")


def _count(value: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise ValueError(value)
    return int(value)


def _pins(value: str) -> frozenset[str]:
    names = frozenset(filter(None, (part.strip().lower() for part in value.split(","))))
    if names == {"all"}:
        return frozenset(PINNABLE)
    if not names <= {*PINNABLE}:
        raise ValueError(value)
    return names


def _positive(value: str) -> int:
    if not (count := _count(value)):
        raise ValueError(value)
    return count


def _slowdown(value: str) -> float:
    factor = float(value)
    if not 1.1 <= factor <= 100:
        raise ValueError(value)
    return factor


def _flag(value: str) -> bool:
    """Go's booleans; Ollama takes any other text for true."""
    return value.lower() not in ("0", "f", "false")


def _optional_flag(value: str) -> bool | None:
    return _flag(value) if value else None


def _cache_type(flash_attention: bool | None, value: str) -> str:
    """Quantized values cannot be read without flash attention (llama-context.cpp)."""
    kind = value.lower()
    if kind not in CACHE_TYPES or (kind != "f16" and flash_attention is False):
        raise ValueError(value)
    return kind


def _shares(value: str) -> tuple[float, ...]:
    shares = tuple(float(part) for part in value.split(",")) if value else ()
    if not all(0 <= share < float("inf") for share in shares) or (shares and not any(shares)):
        raise ValueError(value)
    return shares


def _size(value: str) -> int:
    """Bytes, or a number with a unit of powers of 1024."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?)\s*(?:([kmgt])(?:i?b)?|b)?", value.lower())
    if found is None:
        raise ValueError(value)
    return int(float(found[1]) * 1024 ** (" kmgt".index(found[2]) if found[2] else 0))


def _mirrors(value: str) -> dict[str, str]:
    """`[host=]address, ...`; without a host the address stands in for Ollama's registry."""
    mirrors = {}
    for entry in filter(None, (part.strip() for part in value.split(","))):
        host, equals, address = entry.partition("=")
        if not equals:
            host, address = DEFAULT_HOST, entry
        if not _MIRROR.fullmatch(address.strip()) or not host.strip():
            raise ValueError(value)
        mirrors[host.strip().lower()] = address.strip()
    return mirrors


def _networks(value: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(part.strip(), strict=False) for part in value.split(",") if part.strip())
