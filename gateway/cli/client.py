"""The command line's way to the server: httpx behind three verbs, and every failure in words for the person typing.

It speaks to whatever answers at the configured address, so nothing that comes back is taken on trust: answers are
decoded into the shape the caller names, and what does not fit is an error, never a traceback.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self, TypeVar

import httpx
import msgspec

from engines.request import JSON
from gateway.cli.format import printable

if TYPE_CHECKING:
    from gateway.settings import Settings

T = TypeVar("T")
_ANSWER_S = 30.0
_CONNECT_S = 5.0
_REPORT_S = 0.1
_UPLOAD_BYTES = 1 << 20


class CommandFailed(Exception):
    """A command cannot do its work; the message says why and, where possible, what to do about it.

    `status` is the HTTP status of a refusal, 0 when it was none.
    """

    def __init__(self, message: str, *, exit_code: int = 1, status: int = 0) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.status = status


class _Refusal(msgspec.Struct):
    error: JSON = None


class Client:
    """One connection to the server, used as a context manager.

    Every method raises CommandFailed. `timeout_s` bounds the wait for answers that need no model; a model may take as
    long as it needs.
    """

    def __init__(self, base_url: str, *, timeout_s: float = _ANSWER_S) -> None:
        self.base_url = base_url
        self._timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S))
        self._patient = httpx.Timeout(None, connect=_CONNECT_S)
        # Proxies are for the outside world, but httpx would send them even what is meant for localhost.
        self._http = httpx.Client(base_url=base_url, headers={"User-Agent": "headwater/cli"}, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, shape: type[T], **query: str) -> T:
        """The answer to GET, decoded as `shape`."""
        with self._explained():
            response = self._http.get(path, params=query, timeout=self._timeout)
            _check(response)
            return msgspec.json.decode(response.content, type=shape)

    def post(self, path: str, body: JSON, shape: type[T]) -> T:
        """The answer to POST, decoded as `shape`. Waits without limit: a model may be loading."""
        with self._explained():
            response = self._http.post(path, json=body, timeout=self._patient)
            _check(response)
            return msgspec.json.decode(response.content, type=shape)

    def stream(self, path: str, body: JSON, shape: type[T]) -> Generator[T, None, None]:
        """The objects of an NDJSON answer as they come. Closing the iterator hangs up, which cancels the request."""
        with self._explained(), self._http.stream("POST", path, json=body, timeout=self._patient) as response:
            if response.is_error:
                response.read()
            _check(response)
            for line in _lines(response.iter_bytes()):
                _check_line(line)
                yield msgspec.json.decode(line, type=shape)

    def send(self, method: str, path: str, body: JSON) -> None:
        """A request whose answer is its status alone."""
        with self._explained():
            _check(self._http.request(method, path, json=body, timeout=self._timeout))

    def upload(self, path: str, file: Path) -> Iterator[int]:
        """Send a file, unless the server has it; how many bytes have gone, again and again until the end."""
        with self._explained():
            if self._http.head(path, timeout=self._timeout).is_success:
                yield file.stat().st_size
                return
            with ThreadPoolExecutor(1) as threads, file.open("rb") as content:
                sending = threads.submit(self._post_file, path, content)
                while not wait([sending], timeout=_REPORT_S).done:
                    yield content.tell()
                _check(sending.result())
                yield content.tell()

    def _post_file(self, path: str, content: BinaryIO) -> httpx.Response:
        chunks = iter(lambda: content.read(_UPLOAD_BYTES), b"")
        length = str(os.fstat(content.fileno()).st_size)
        return self._http.post(path, content=chunks, headers={"Content-Length": length}, timeout=self._patient)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            raise CommandFailed(f"cannot reach Headwater at {self.base_url}; start it with `headwater serve`") from None
        except httpx.TimeoutException:
            raise CommandFailed(f"Headwater at {self.base_url} did not answer in time") from None
        except OSError as error:
            raise CommandFailed(f"cannot read {error.filename}: {error.strerror}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise CommandFailed(f"lost the connection to {self.base_url}: {error}") from None
        except msgspec.MsgspecError as error:
            raise CommandFailed(f"{self.base_url} did not answer as Headwater does: {error}") from None


def connect(*, timeout_s: float = _ANSWER_S) -> Client:
    """A client for the server that the settings name."""
    return Client(load_settings().base_url, timeout_s=timeout_s)


def load_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of an environment.

    Raises:
        CommandFailed: with exit code 2, when a setting has a bad value.
    """
    from gateway.settings import Settings, SettingsError  # noqa: PLC0415 - keeps --help and completion quick

    try:
        return Settings.from_env(environment)
    except SettingsError as error:
        raise CommandFailed(str(error), exit_code=2) from None


def _check(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        text = _error_text(msgspec.json.decode(response.content, type=_Refusal))
    except msgspec.MsgspecError:
        text = ""
    if not text:
        body = response.text.strip()[:200]
        status = f"{response.status_code} {response.reason_phrase}".strip()
        text = f"{response.url} answered {status}" + (f": {body}" if body else "")
    raise CommandFailed(printable(text), status=response.status_code)


def _check_line(line: bytes) -> None:
    text = _error_text(msgspec.json.decode(line, type=_Refusal))
    if text:
        raise CommandFailed(printable(text))


def _error_text(refusal: _Refusal) -> str:
    """The message in either form of error body: Ollama's string, or OpenAI's object."""
    error = refusal.error
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else ""


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Split at newlines only: httpx's own iter_lines also cuts at U+0085 and U+2028, which JSON strings may hold."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest
