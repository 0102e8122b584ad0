"""What is true of every conversation with a registry: who is the same host, how much is read, how errors are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from engines.errors import NotInRegistry, RegistryDenied, RegistryError

STALL_S = 30.0
"""A connection on which nothing moves for so long is given up (Ollama server/download.go, downloadStallTimeout)."""

_MAX_ERROR_BYTES = 1000


def same_origin(one: httpx.URL, other: httpx.URL) -> bool:
    """Whether two addresses are on the same server, to which the same secrets may be told."""
    return _origin(one) == _origin(other)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


async def read_small(response: httpx.Response, max_bytes: int) -> bytes:
    """A whole body. Raises RegistryError when it is larger than `max_bytes`, and httpx's errors."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise RegistryError(f"{response.url.host} sent more than {max_bytes} bytes where a few were due")
    return bytes(body)


async def check(response: httpx.Response, *accepted: int) -> None:
    """Nothing, if the status is one of those.

    Raises:
        NotInRegistry, RegistryDenied, RegistryError: otherwise, in Ollama's words; and httpx's errors.
    """
    status = response.status_code
    if status in accepted:
        return
    if status == 404:
        raise NotInRegistry
    if status == 401:
        raise RegistryDenied
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > _MAX_ERROR_BYTES:
            break
    text = body[:_MAX_ERROR_BYTES].decode(errors="replace").strip()
    # A storage's signed address may have run out between two requests, which 403 is for.
    transient = status >= 500 or status in (403, 408, 425, 429)
    raise RegistryError(f"{status}: {text}", transient=transient)


@contextmanager
def explained(method: str, url: httpx.URL) -> Iterator[None]:
    """Turns httpx's errors into RegistryError, in the form of Go's. What an address asks with `?` may be a secret."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        what = str(error) or type(error).__name__
        asked = error.request.url if isinstance(error, httpx.RequestError) else url
        where = asked.copy_with(query=None, userinfo=None)
        raise RegistryError(f'{method.capitalize()} "{where}": {what}', transient=True) from error
