"""One repository of a registry, in Ollama's protocol and in the OCI distribution protocol, which are nearly one.

Knows addresses, authentication, redirects and what each exchange means; when and how often they are made is decided in
`download`, `upload` and `transfer`. Credentials go to the registry itself and never along a redirect to another host.
Redirects from https to http are refused unless plain http was allowed. Where Ollama asks once for the address that
a blob is redirected to, every part here takes the redirect anew: signed addresses run out in the middle of a download.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx

from engines.errors import RegistryError
from engines.store.manifests import MANIFEST_TYPE, MAX_JSON_BYTES, OCI_MANIFEST_TYPE
from engines.store.names import ModelName
from engines.store.registry_auth import Authorizer
from engines.store.registry_http import STALL_S, check, explained, read_small, same_origin

MAX_REDIRECTS = 10
CONNECT_S = 10.0
SMALL_S = 60.0
"""How long an exchange without a blob may take as a whole, however steadily it trickles."""

Content = Callable[[], AsyncIterator[bytes]]
"""Makes a body, and makes it again when the request has to be repeated."""

_MANIFESTS = f"{MANIFEST_TYPE}, {OCI_MANIFEST_TYPE}"
_BINARY = "application/octet-stream"
_NEAR = ("all://localhost", "all://127.0.0.1", "all://[::1]")
"""Never asked through a proxy of the environment, as in Go."""
_HOSTS = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}


@dataclass(frozen=True, slots=True)
class ChunkSent:
    """What a registry said to a chunk: where the next one goes, and where this one is wanted instead, if anywhere."""

    next_url: httpx.URL
    redirected: httpx.URL | None


class Repository:
    """The repository that a name says, at its registry or at a mirror.

    Args:
        client: must verify certificates unless `insecure`.
        mirror: the address of a registry to ask in place of the name's own.
        insecure: plain http may be spoken where https is not; https is tried first.
        token: a bearer token that the caller brought along.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        authorizer: Authorizer,
        name: ModelName,
        *,
        mirror: str = "",
        insecure: bool = False,
        token: str = "",
    ) -> None:
        self._client = client
        self._authorizer = authorizer
        self._authorization = f"Bearer {token}" if token else ""
        self._renewing = asyncio.Lock()
        self._insecure = insecure
        self._scheme_known = bool(mirror)
        try:
            self._base = httpx.URL(mirror or f"https://{_HOSTS.get(name.host, name.host)}")
        except httpx.InvalidURL as error:
            raise RegistryError(f"{mirror or name.host} is no address of a registry: {error}") from error
        self._host = self._base.netloc.decode() if mirror else name.host
        self._path = f"{self._base.path.rstrip('/')}/v2/{name.namespace}/{name.model}"

    @property
    def address(self) -> str:
        """What sets this repository apart from every other."""
        return f"{self._base.netloc.decode()}{self._path}"

    async def read_manifest(self, tag: str) -> bytes:
        """The manifest, to the byte. Raises NotInRegistry, RegistryDenied, RegistryError."""
        async with self._small("GET", f"manifests/{tag}", headers={"Accept": _MANIFESTS}) as response:
            await check(response, 200)
            return await read_small(response, MAX_JSON_BYTES)

    async def write_manifest(self, tag: str, data: bytes, media_type: str) -> None:
        """Raises RegistryDenied, RegistryError."""
        headers = {"Content-Type": media_type, "Content-Length": str(len(data))}
        async with self._small("PUT", f"manifests/{tag}", headers=headers, content=_once(data)) as response:
            await check(response, 200, 201, 202)

    async def read_blob(self, digest: str, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """A blob's bytes from `start` to before `stop`, and never more.

        Raises NotInRegistry, RegistryDenied, RegistryError; the last too when the answer ends too early or begins
        elsewhere. A server that knows no ranges sends everything, of which what comes first is passed over.
        """
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        async with self._ask("GET", self._url(f"blobs/{digest}"), headers) as response:
            await check(response, 200, 206)
            skip = start - _first_byte(response, start)
            left = stop - start
            async for chunk in response.aiter_raw():
                wanted = chunk[skip : skip + left]
                skip = max(skip - len(chunk), 0)
                left -= len(wanted)
                if wanted:
                    yield wanted
                if not left:
                    return
            raise RegistryError("unexpected EOF", transient=True)

    async def has_blob(self, digest: str) -> bool:
        """Raises RegistryDenied, RegistryError."""
        async with self._small("HEAD", f"blobs/{digest}") as response:
            if response.status_code == 404:
                return False
            await check(response, 200)
            return True

    async def begin_upload(self, digest: str, source: str = "") -> httpx.URL | None:
        """Where to send the first chunk; None if the registry could take the blob from its repository `source`.

        Raises RegistryDenied, RegistryError.
        """
        query = {"mount": digest, "from": source} if source else {}
        headers = {"Content-Length": "0"}
        async with self._small("POST", "blobs/uploads/", query=query, headers=headers) as response:
            await check(response, 201, 202)
            return None if source and response.status_code == 201 else self._next_url(response)

    async def send_chunk(self, url: httpx.URL, start: int, stop: int, content: Content) -> ChunkSent:
        """Send bytes `start` to before `stop` of a blob. Raises RegistryDenied, RegistryError."""
        headers = {
            "Content-Type": _BINARY,
            "Content-Length": str(stop - start),
            "Content-Range": f"{start}-{stop - 1}",
            "X-Redirect-Uploads": "1",
        }
        async with self._ask("PATCH", url, headers, content) as response:
            await check(response, 202, 204, 307)
            redirected = response.status_code == 307
            return ChunkSent(
                self._next_url(response), self._target(response.url, response, "location") if redirected else None
            )

    async def send_redirected(self, url: httpx.URL, size_bytes: int, content: Content) -> None:
        """Send a chunk to where the registry wants it. Raises RegistryDenied, RegistryError."""
        headers = {"Content-Type": _BINARY, "Content-Length": str(size_bytes)}
        async with self._ask("PUT", url, headers, content) as response:
            await check(response, 200, 201, 202, 204)

    async def resume_upload(self, url: httpx.URL) -> tuple[int, httpx.URL] | None:
        """How many bytes of an upload have arrived, and where to go on; None if there is nothing to go on with."""
        try:
            async with self._small("GET", url) as response:
                await check(response, 204)
                arrived = re.fullmatch(
                    r"(?:bytes=)?0-([1-9]\d{0,17})", response.headers.get("range", "")
                )  # 0-0 is none
                return (int(arrived[1]) + 1, self._next_url(response)) if arrived else None
        except RegistryError:
            return None

    async def finish_upload(self, url: httpx.URL, digest: str, etag: str) -> None:
        """Name what was sent. Raises RegistryDenied, RegistryError."""
        headers = {"Content-Type": _BINARY, "Content-Length": "0"}
        async with self._small("PUT", url, query={"digest": digest, "etag": etag}, headers=headers) as response:
            await check(response, 200, 201, 202, 204)

    @asynccontextmanager
    async def _small(
        self,
        method: str,
        where: str | httpx.URL,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        content: Content | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """An exchange that takes `SMALL_S` at most."""
        url = self._url(where) if isinstance(where, str) else where
        url = url.copy_merge_params(query) if query else url
        try:
            async with asyncio.timeout(SMALL_S), self._ask(method, url, headers or {}, content) as response:
                yield response
        except TimeoutError:
            raise RegistryError(f"{url.host} took longer than {SMALL_S:g} s", transient=True) from None

    @asynccontextmanager
    async def _ask(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], content: Content | None = None
    ) -> AsyncIterator[httpx.Response]:
        """One exchange, with one repetition when the registry wants to know who we are."""
        with explained(method, url):
            used = self._authorization
            response = await self._follow(method, url, headers, content)
            try:
                if response.status_code == 401 and same_origin(response.url, self._base):
                    await response.aclose()
                    await self._renew_authorization(used, response)
                    response = await self._follow(method, url, headers, content)
                yield response
            finally:
                await response.aclose()

    async def _renew_authorization(self, used: str, refused: httpx.Response) -> None:
        """Find what to say in place of `used`; of many parts that are refused at once, one asks for all."""
        async with self._renewing:
            if self._authorization == used:
                async with asyncio.timeout(SMALL_S):
                    self._authorization = await self._authorizer.answer(self._client, self._host, refused)

    async def _follow(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], content: Content | None
    ) -> httpx.Response:
        """The answer at the end of the redirects, which only reading follows."""
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._send(method, url, headers, content)
            if method not in ("GET", "HEAD") or not response.has_redirect_location:
                return response
            await response.aclose()
            url = self._target(response.url, response, "location")
        raise RegistryError(f"maximum redirects exceeded ({MAX_REDIRECTS})")

    async def _send(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], content: Content | None
    ) -> httpx.Response:
        """One request; the first of all finds out whether the registry speaks https, if it need not."""
        try:
            return await self._send_once(method, url, headers, content)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.RemoteProtocolError):
            if self._scheme_known or not self._insecure or not same_origin(url, self._base):
                raise
            self._base = self._base.copy_with(scheme="http")
            return await self._send_once(method, url, headers, content)
        finally:
            self._scheme_known = True

    async def _send_once(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], content: Content | None
    ) -> httpx.Response:
        if url.netloc == self._base.netloc:  # made before it was known which scheme that host speaks
            url = url.copy_with(scheme=self._base.scheme)
        sent = {**headers, "Accept-Encoding": "identity"}
        if self._authorization and same_origin(url, self._base):
            sent["Authorization"] = self._authorization
        request = self._client.build_request(method, url, headers=sent, content=content() if content else None)
        return await self._client.send(request, stream=True, follow_redirects=False)

    def _url(self, path: str) -> httpx.URL:
        return self._base.copy_with(path=f"{self._path}/{path}")

    def _next_url(self, response: httpx.Response) -> httpx.URL:
        header = "docker-upload-location" if "docker-upload-location" in response.headers else "location"
        return self._target(response.url, response, header)

    def _target(self, url: httpx.URL, response: httpx.Response, header: str) -> httpx.URL:
        """The address in a header. Raises RegistryError for what is none, or is less safe than where it came from."""
        text = response.headers.get(header, "")
        try:
            target = url.join(text)
        except httpx.InvalidURL:
            target = httpx.URL("")
        allowed = {"https", "http"} if self._insecure or url.scheme == "http" else {"https"}
        if not text or not target.host or target.scheme not in allowed:
            where = target.copy_with(query=None) if target.host else text[:200]
            raise RegistryError(f"{url.host} sends us to {str(where)!r}, where we do not go")
        return target


def make_client(user_agent: str, *, verify: bool) -> httpx.AsyncClient:
    """A client for any number of registries at once: no cookies, no redirects of its own, a limit on every silence."""
    context = httpx.create_ssl_context(verify=verify)  # knows the public authorities
    if verify:
        context.load_default_certs()  # and those of the house
    return httpx.AsyncClient(
        verify=context,
        headers={"User-Agent": user_agent},
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        timeout=httpx.Timeout(STALL_S, connect=CONNECT_S, pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
        mounts=dict.fromkeys(_NEAR),
    )


def _once(data: bytes) -> Content:
    async def body() -> AsyncIterator[bytes]:
        yield data

    return body


def _first_byte(response: httpx.Response, asked: int) -> int:
    """Where in the blob the answer begins. Raises RegistryError if that is after what was asked for, or untold."""
    if response.status_code == 200:
        return 0
    told = re.match(r"bytes (\d{1,18})-", response.headers.get("content-range", ""))
    if told is None or int(told[1]) > asked:
        raise RegistryError(f"{response.url.host} sent another part of the blob than was asked for")
    return int(told[1])
