"""What to answer a registry that says 401: a password, or a token that has to be fetched first.

Three kinds of token are fetched from where the challenge says (its realm), in this order:
- with the password that `docker login` left for this registry (Docker's token authentication);
- signed with Ollama's key, if the realm is on the registry's own host (`spec/ollama.md` section 10.1): signing for
  another host would let one registry borrow our name at another;
- without saying who we are, which public models need.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec

from engines.errors import RegistryDenied, RegistryError
from engines.store.credentials import Credentials, find_credentials
from engines.store.registry_http import read_small, same_origin
from engines.store.registry_keys import sign

_MAX_HEADER = 4096
_MAX_TOKEN_BYTES = 1 << 20
_ITEM = re.compile(
    r"""\s*(?P<name>[\w!#$%&'*+.^`|~-]+)(?:\s*=\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>[^\s,"]+)))?"""
)
_EMPTY = base64.b64encode(hashlib.sha256(b"").hexdigest().encode()).decode()


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate that a server offers (RFC 9110, section 11). `scheme` is in lower case."""

    scheme: str
    parameters: Mapping[str, str]


class _TokenReply(msgspec.Struct):
    token: str = ""
    access_token: str = ""


class Authorizer:
    """Answers challenges.

    Args:
        docker_config: where `docker login` keeps passwords. key_file: Ollama's private key, made when it is missing.
        clock: seconds since the epoch.
    """

    def __init__(self, docker_config: Path, key_file: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._docker_config = docker_config
        self._key_file = key_file
        self._clock = clock

    async def answer(self, client: httpx.AsyncClient, host: str, response: httpx.Response) -> str:
        """The Authorization header to repeat a request with, after `response` to it, a 401.

        `host` is the registry's in the name that the user typed. Raises RegistryDenied, RegistryError, httpx's errors.
        """
        challenges = {each.scheme: each for each in parse_challenges(response.headers.get("www-authenticate", ""))}
        credentials = await asyncio.to_thread(find_credentials, self._docker_config, host)
        if "bearer" in challenges:
            return f"Bearer {await self._fetch_token(client, response.url, challenges['bearer'], credentials)}"
        if "basic" in challenges and credentials:
            return credentials.basic
        raise RegistryDenied

    async def _fetch_token(
        self, client: httpx.AsyncClient, asked: httpx.URL, challenge: Challenge, credentials: Credentials | None
    ) -> str:
        realm = _realm(challenge, asked)
        query = httpx.QueryParams(
            {
                "service": challenge.parameters.get("service", ""),
                "scope": challenge.parameters.get("scope", "").split(),
            }
        )
        if credentials:
            return await _get_token(client, realm.copy_merge_params(query), credentials.basic)
        if same_origin(realm, asked):
            nonce = secrets.token_urlsafe(16)
            url = realm.copy_merge_params(query.merge({"ts": int(self._clock()), "nonce": nonce}))
            signature = await asyncio.to_thread(sign, self._key_file, f"GET,{url},{_EMPTY}")
            try:
                return await _get_token(client, url, signature)
            except RegistryDenied:
                pass  # no server of Ollama's kind, or a key that it does not know
        return await _get_token(client, realm.copy_merge_params(query), "")


def parse_challenges(header: str) -> list[Challenge]:
    """The challenges of a WWW-Authenticate header, in order. What is no challenge is passed over."""
    challenges: list[tuple[str, dict[str, str]]] = []
    position = 0
    header = header[:_MAX_HEADER]
    while position < len(header):
        item = _ITEM.match(header, position)
        if item is None:
            position += 1
            continue
        position = item.end()
        name = item["name"].lower()
        if item["quoted"] is not None:
            value = re.sub(r"\\(.)", r"\1", item["quoted"])
        elif item["bare"] is not None:
            value = item["bare"]
        else:
            challenges.append((name, {}))
            continue
        if challenges:
            challenges[-1][1].setdefault(name, value)
    return [Challenge(scheme, parameters) for scheme, parameters in challenges]


def _realm(challenge: Challenge, asked: httpx.URL) -> httpx.URL:
    """Where to fetch the token. Raises RegistryError for what is no address, or one less safe than the registry's."""
    text = challenge.parameters.get("realm", "")
    try:
        realm = httpx.URL(text)
    except httpx.InvalidURL:
        realm = httpx.URL("")
    if not realm.host or realm.scheme not in {asked.scheme, "https"}:
        raise RegistryError(f"the registry sends us to {text[:200]!r} for a token, which is no place to get one")
    return realm


async def _get_token(client: httpx.AsyncClient, url: httpx.URL, authorization: str) -> str:
    headers = {"Authorization": authorization} if authorization else {}
    request = client.build_request("GET", url, headers=headers)
    response = await client.send(request, stream=True, follow_redirects=False)
    try:
        data = await read_small(response, _MAX_TOKEN_BYTES)
    finally:
        await response.aclose()
    if response.status_code in (400, 401, 403):
        raise RegistryDenied
    if response.status_code != 200:
        raise RegistryError(f"{response.status_code}: no token from {url.host}", transient=response.is_server_error)
    try:
        reply = msgspec.json.decode(data, type=_TokenReply)
    except msgspec.MsgspecError as error:
        raise RegistryError(f"no token from {url.host}: {error}") from error
    token = reply.token or reply.access_token
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise RegistryError(f"no token from {url.host}")
    return token
