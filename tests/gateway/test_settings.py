import contextlib
import ipaddress
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.request import FOREVER
from gateway.policy import PINNABLE
from gateway.settings import Settings, SettingsError


def read(**env: str) -> Settings:
    """The settings of an environment."""
    return Settings.from_env(env)


def test_an_empty_environment_is_enough() -> None:
    """The defaults are Ollama's (spec/ollama.md section 12)."""
    settings = read(HEADWATER_DATA="/d")
    assert (settings.host, settings.port) == ("127.0.0.1", 11434)
    assert settings.models == Path.home() / ".ollama/models"
    assert settings.database_url == "sqlite+aiosqlite:////d/usage.db"
    assert (settings.keep_alive_s, settings.load_timeout_s, settings.shutdown_grace_s) == (300, 300, 30)
    assert (settings.num_parallel, settings.max_loaded_models, settings.max_queue) == (0, 3, 512)
    assert settings.context_length == 0
    assert settings.origins == ()
    assert settings.trusted_proxies == ()
    assert settings.body_limit_bytes == 64 * 2**20
    assert not settings.debug


def test_the_data_directory_defaults_to_where_a_users_data_belongs() -> None:
    """It is never the working directory."""
    assert read().data.is_absolute()
    assert read().data.name == "headwater"


@pytest.mark.parametrize(
    ("value", "host", "port"),
    [
        ("", "127.0.0.1", 11434),
        ("1.2.3.4", "1.2.3.4", 11434),
        ("1.2.3.4:5678", "1.2.3.4", 5678),
        (":1234", "0.0.0.0", 1234),
        ("0.0.0.0", "0.0.0.0", 11434),
        ("example.com", "example.com", 11434),
        ("example.com:1", "example.com", 1),
        ("http://1.2.3.4", "1.2.3.4", 80),
        ("https://1.2.3.4", "1.2.3.4", 443),
        ("https://1.2.3.4:4321", "1.2.3.4", 4321),
        ("http://example.com/ollama", "example.com", 80),
        ("example.com:56789/ollama/", "example.com", 56789),
        ("example.com/ollama", "example.com", 11434),
        ("::1", "::1", 11434),
        ("[::1]", "::1", 11434),
        ("[::1]:1337", "::1", 1337),
        ("[::]:1337", "::", 1337),
        ("::", "::", 11434),
        ("[0001:002:003:0004::1]:1337", "0001:002:003:0004::1", 1337),
        ("http://[::1]:9", "::1", 9),
        (" 1.2.3.4:5 ", "1.2.3.4", 5),
        ('"1.2.3.4:5"', "1.2.3.4", 5),
        ("' 1.2.3.4:5 '", "1.2.3.4", 5),
        ("127.0.0.1:", "127.0.0.1", 11434),
        ("localhost:65535", "localhost", 65535),
    ],
)
def test_hosts_are_read_as_ollama_reads_them(value: str, host: str, port: int) -> None:
    """Scheme, host, port and path, each optional (spec/ollama.md section 12)."""
    settings = read(OLLAMA_HOST=value)
    assert (settings.host, settings.port) == (host, port)


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        (":1", "http://127.0.0.1:1"),
        ("0.0.0.0:1", "http://127.0.0.1:1"),
        ("[::]:1", "http://[::1]:1"),
        ("[::1]:1", "http://[::1]:1"),
        ("192.0.2.1:1", "http://192.0.2.1:1"),
        ("box.local:1", "http://box.local:1"),
    ],
)
def test_the_base_url_reaches_the_server_from_this_machine(value: str, url: str) -> None:
    """An address that means all interfaces is no address to connect to."""
    assert read(OLLAMA_HOST=value).base_url == url


VALID: list[tuple[str, str, str, Any]] = [
    ("OLLAMA_FLASH_ATTENTION", "1", "flash_attention", True),
    ("OLLAMA_FLASH_ATTENTION", "false", "flash_attention", False),
    ("OLLAMA_KV_CACHE_TYPE", "Q8_0", "cache_type", "q8_0"),
    ("HEADWATER_MLOCK", "1", "use_mlock", True),
    ("HEADWATER_TENSOR_SPLIT", "3, 1.5", "tensor_split", (3.0, 1.5)),
    ("HEADWATER_MEMORY_LIMIT", "12GiB", "memory_limit_bytes", 12 << 30),
    ("HEADWATER_MEMORY_LIMIT", "1.5g", "memory_limit_bytes", 3 << 29),
    ("HEADWATER_MEMORY_LIMIT", "800 MB", "memory_limit_bytes", 800 << 20),
    ("HEADWATER_MEMORY_LIMIT", "123456", "memory_limit_bytes", 123456),
    ("HEADWATER_STEP_LIMIT", "10m", "step_limit_s", 600.0),
    ("HEADWATER_STEP_LIMIT", "-1", "step_limit_s", float("inf")),
    ("OLLAMA_MODELS", "/m", "models", Path("/m")),
    ("OLLAMA_MODELS", "~/m", "models", Path.home() / "m"),
    ("OLLAMA_MODELS", "m", "models", Path.cwd() / "m"),
    ("HEADWATER_DATA", "/d", "data", Path("/d")),
    ("HEADWATER_DATABASE_URL", "postgresql+asyncpg://db/usage", "database_url", "postgresql+asyncpg://db/usage"),
    ("OLLAMA_KEEP_ALIVE", "10", "keep_alive_s", 10.0),
    ("OLLAMA_KEEP_ALIVE", "1h30m", "keep_alive_s", 5400.0),
    ("OLLAMA_KEEP_ALIVE", "0", "keep_alive_s", 0.0),
    ("OLLAMA_KEEP_ALIVE", "-1", "keep_alive_s", FOREVER),
    ("OLLAMA_KEEP_ALIVE", "-1m", "keep_alive_s", FOREVER),
    ("OLLAMA_LOAD_TIMEOUT", "90", "load_timeout_s", 90.0),
    ("OLLAMA_LOAD_TIMEOUT", "0", "load_timeout_s", FOREVER),
    ("OLLAMA_LOAD_TIMEOUT", "-5s", "load_timeout_s", FOREVER),
    ("OLLAMA_NUM_PARALLEL", "4", "num_parallel", 4),
    ("OLLAMA_MAX_LOADED_MODELS", "1", "max_loaded_models", 1),
    ("OLLAMA_MAX_LOADED_MODELS", "0", "max_loaded_models", 3),
    ("OLLAMA_MAX_QUEUE", "1", "max_queue", 1),
    ("OLLAMA_CONTEXT_LENGTH", "8192", "context_length", 8192),
    ("HEADWATER_MAX_CONTEXT", "8192", "max_context", 8192),
    ("HEADWATER_MAX_KEEP_ALIVE", "1h", "max_keep_alive_s", 3600.0),
    ("HEADWATER_MAX_KEEP_ALIVE", "-1", "max_keep_alive_s", FOREVER),
    ("HEADWATER_PINNED_OPTIONS", "num_ctx, Keep_Alive,", "pinned_options", {"num_ctx", "keep_alive"}),
    ("HEADWATER_PINNED_OPTIONS", "all", "pinned_options", {*PINNABLE}),
    ("HEADWATER_REGISTRY_MIRROR", "https://m.lan:5000/v", "registry_mirrors",
     {"registry.ollama.ai": "https://m.lan:5000/v"}),
    ("HEADWATER_REGISTRY_MIRROR", "Docker.io=http://a, quay.io=https://b", "registry_mirrors",
     {"docker.io": "http://a", "quay.io": "https://b"}),
    ("OLLAMA_ORIGINS", "http://a.example,app://*", "origins", ("http://a.example", "app://*")),
    ("HEADWATER_TRUSTED_PROXIES", "10.0.0.0/8, ::1", "trusted_proxies",
     (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128"))),
    ("HEADWATER_TRUSTED_PROXIES", "10.1.2.3/8", "trusted_proxies", (ipaddress.ip_network("10.0.0.0/8"),)),
    ("HEADWATER_BODY_LIMIT", "1000", "body_limit_bytes", 1000),
    ("HEADWATER_SHUTDOWN_GRACE", "5s", "shutdown_grace_s", 5.0),
    ("HEADWATER_SHUTDOWN_GRACE", "0", "shutdown_grace_s", 0.0),
    ("HEADWATER_SHUTDOWN_GRACE", "-1", "shutdown_grace_s", FOREVER),
    ("OLLAMA_DEBUG", "1", "debug", True),
    ("OLLAMA_DEBUG", "true", "debug", True),
    ("OLLAMA_DEBUG", "yes", "debug", True),
    ("OLLAMA_DEBUG", "0", "debug", False),
    ("OLLAMA_DEBUG", "F", "debug", False),
    ("OLLAMA_DEBUG", "false", "debug", False),
]  # fmt: skip


@pytest.mark.parametrize(("variable", "value", "attribute", "expected"), VALID)
def test_each_variable_is_read(variable: str, value: str, attribute: str, expected: Any) -> None:
    """In each of its forms."""
    assert getattr(read(**{variable: value}), attribute) == expected


@pytest.mark.parametrize("value", ["", "  ", '""', "''"])
def test_an_empty_variable_is_an_unset_one(value: str) -> None:
    """For every variable alike; compose files and service units set empty ones."""
    unset = read()
    assert read(**{variable: value for variable, *_ in VALID}) == unset


INVALID = [
    ("HEADWATER_REGISTRY_MIRROR", "mirror.lan"),
    ("HEADWATER_REGISTRY_MIRROR", "ftp://mirror.lan"),
    ("HEADWATER_REGISTRY_MIRROR", "=https://mirror.lan"),
    ("HEADWATER_REGISTRY_MIRROR", "https://user:password@mirror.lan"),
    ("OLLAMA_KV_CACHE_TYPE", "q5_1"),
    ("HEADWATER_TENSOR_SPLIT", "1,two"),
    ("HEADWATER_TENSOR_SPLIT", "-1,2"),
    ("HEADWATER_TENSOR_SPLIT", "0,0"),
    ("HEADWATER_TENSOR_SPLIT", "inf"),
    ("HEADWATER_MEMORY_LIMIT", "lots"),
    ("HEADWATER_MEMORY_LIMIT", "-1"),
    ("HEADWATER_MEMORY_LIMIT", "9" * 400),
    ("HEADWATER_STEP_LIMIT", "soon"),
    ("OLLAMA_HOST", "1.2.3.4:port"),
    ("OLLAMA_HOST", "1.2.3.4:99999"),
    ("OLLAMA_HOST", "1.2.3.4:-1"),
    ("OLLAMA_HOST", "ftp://1.2.3.4"),
    ("OLLAMA_HOST", "[::1"),
    ("OLLAMA_KEEP_ALIVE", "soon"),
    ("OLLAMA_KEEP_ALIVE", "5 minutes"),
    ("OLLAMA_KEEP_ALIVE", "9" * 5000),
    ("OLLAMA_LOAD_TIMEOUT", "5x"),
    ("OLLAMA_NUM_PARALLEL", "-1"),
    ("OLLAMA_NUM_PARALLEL", "two"),
    ("OLLAMA_NUM_PARALLEL", "٣"),
    ("OLLAMA_MAX_LOADED_MODELS", "1.5"),
    ("OLLAMA_MAX_QUEUE", "0"),
    ("OLLAMA_MAX_QUEUE", "many"),
    ("OLLAMA_CONTEXT_LENGTH", "4k"),
    ("HEADWATER_MAX_CONTEXT", "-1"),
    ("HEADWATER_MAX_KEEP_ALIVE", "long"),
    ("HEADWATER_PINNED_OPTIONS", "num_ctx,temperature"),
    ("HEADWATER_PINNED_OPTIONS", "all,num_ctx"),
    ("OLLAMA_ORIGINS", "a.example"),
    ("HEADWATER_TRUSTED_PROXIES", "proxy.local"),
    ("HEADWATER_TRUSTED_PROXIES", "10.0.0.0/33"),
    ("HEADWATER_BODY_LIMIT", "0"),
    ("HEADWATER_BODY_LIMIT", "64M"),
    ("HEADWATER_SHUTDOWN_GRACE", "later"),
]


@pytest.mark.parametrize(("variable", "value"), INVALID, ids=lambda text: text[:30])
def test_a_bad_value_names_variable_value_and_what_is_accepted(variable: str, value: str) -> None:
    """Whoever reads it can mend it."""
    with pytest.raises(SettingsError) as refusal:
        read(**{variable: value})
    assert (refusal.value.variable, refusal.value.value) == (variable, value)
    assert str(refusal.value) == f"{variable}={value!r} is not valid: expected {refusal.value.accepted}"
    assert refusal.value.accepted


def test_quantized_caches_need_flash_attention() -> None:
    """Which the refusal says."""
    assert read(OLLAMA_KV_CACHE_TYPE="q4_0", OLLAMA_FLASH_ATTENTION="1").cache_type == "q4_0"
    with pytest.raises(SettingsError, match="not with OLLAMA_FLASH_ATTENTION=0"):
        read(OLLAMA_KV_CACHE_TYPE="q4_0", OLLAMA_FLASH_ATTENTION="0")


@given(st.sampled_from(sorted({variable for variable, _ in INVALID})), st.text(st.characters(exclude_characters="\0")))
def test_any_value_is_read_or_refused(variable: str, value: str) -> None:
    """There is no third way."""
    with contextlib.suppress(SettingsError):
        settings = read(**{variable: value})
        assert 0 <= settings.port <= 65535
        assert settings.base_url.startswith("http://")
        assert settings.max_queue > 0


def test_further_places_for_models() -> None:
    """Folders are separated as in PATH; Docker's store has its usual place; blobs are pruned unless told otherwise."""
    settings = Settings.from_env({"HEADWATER_MODELS_PATH": f"/a{os.pathsep}{os.pathsep}~/b", "OLLAMA_NOPRUNE": "1"})
    assert settings.model_folders == (Path("/a"), Path.home() / "b")
    assert settings.keeps_unused
    assert Settings.from_env({}).docker_models == Path.home() / ".docker" / "models"
    assert Settings.from_env({}).model_folders == ()
