"""What `docker login` left behind: names and passwords by registry, in `~/.docker/config.json`.

Read afresh whenever a registry asks, so that a login counts at once. Where the file names a program that keeps them
(`credHelpers` for one registry, `credsStore` for all) it is asked. Identity tokens are another protocol and left to
Docker.
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
from engines.store.credential_helpers import ask_helper

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


class _DockerConfig(msgspec.Struct, rename="camel"):
    auths: dict[str, _Login] = {}
    creds_store: str = ""
    cred_helpers: dict[str, str] = {}

    def helper(self, host: str) -> str:
        """The program that keeps a registry's password; empty when none does."""
        return next((self.cred_helpers[key] for key in _keys(host) if key in self.cred_helpers), self.creds_store)

    def server(self, host: str) -> str:
        """The spelling under which `docker login` filed a registry; its first one where it has not."""
        keys = [*_keys(host)]
        return next((key for key in keys if key in self.auths), keys[0])


def docker_config_path(env: Mapping[str, str] = os.environ) -> Path:
    """Where Docker keeps them."""
    directory = env.get("DOCKER_CONFIG")
    return (Path(directory) if directory else Path.home() / ".docker") / "config.json"


def find_credentials(config: Path, host: str) -> Credentials | None:
    """The credentials for a registry, `host` or `host:port`; None without any, and when the file makes no sense."""
    try:
        said = msgspec.json.decode(read_bounded(config, _MAX_BYTES), type=_DockerConfig)
    except (FileNotFoundError, StoreUnreadable, msgspec.MsgspecError):
        return None
    if (helper := said.helper(host)) and (kept := ask_helper(helper, said.server(host))):
        return Credentials(kept.username, kept.secret)
    logins = (said.auths[key] for key in _keys(host) if key in said.auths)
    return next((found for login in logins if (found := _read_login(login))), None)


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
