"""What `docker login` left behind: names and passwords by registry, in `~/.docker/config.json`.

Read afresh whenever a registry asks, so that a login counts at once. Credential helpers (`credsStore`) are programs
that would have to be run, and identity tokens are another protocol; both are left to Docker.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from engines.store.blobs import StoreUnreadable, read_bounded

_MAX_BYTES = 1 << 20
_DOCKER_HUB = "https://index.docker.io/v1/"


class Credentials(NamedTuple):
    """Who we are at one registry."""

    username: str
    password: str

    @property
    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class _Login(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""


class _DockerConfig(msgspec.Struct):
    auths: dict[str, _Login] = {}


def docker_config_path(env: Mapping[str, str] = os.environ) -> Path:
    """Where Docker keeps them."""
    directory = env.get("DOCKER_CONFIG")
    return (Path(directory) if directory else Path.home() / ".docker") / "config.json"


def find_credentials(config: Path, host: str) -> Credentials | None:
    """The credentials for a registry, `host` or `host:port`; None without any, and when the file makes no sense."""
    try:
        logins = msgspec.json.decode(read_bounded(config, _MAX_BYTES), type=_DockerConfig).auths
    except (FileNotFoundError, StoreUnreadable, msgspec.MsgspecError):
        return None
    for key in _keys(host):
        if key in logins and (found := _read_login(logins[key])):
            return found
    return None


def _keys(host: str) -> Iterator[str]:
    """The spellings under which Docker and its relatives file a registry."""
    if host in ("docker.io", "index.docker.io", "registry-1.docker.io"):
        yield _DOCKER_HUB
    yield from (host, f"https://{host}", f"https://{host}/", f"https://{host}/v1/", f"https://{host}/v2/")


def _read_login(login: _Login) -> Credentials | None:
    if login.auth:
        try:
            decoded = base64.b64decode(login.auth, validate=True).decode()
        except (binascii.Error, ValueError):
            return None
        username, colon, password = decoded.partition(":")
        password = password.rstrip("\0")  # older Dockers padded it
        return Credentials(username, password) if colon and username and password else None
    return Credentials(login.username, login.password) if login.username and login.password else None
