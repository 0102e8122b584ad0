"""A wire between a client and a server that remembers the conversation as HTTP: what a client's own parser hides."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

_READ_BYTES = 1 << 16


@dataclass
class Exchange:
    """One request and its answer.

    Attributes:
        sent: the request's body.
        headers: the answer's, with lower-case names.
        chunks: the answer's body, cut as it was written.
        complete: whether the answer's end was seen.
    """

    method: str
    path: str
    sent: bytes
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    complete: bool = False

    @property
    def body(self) -> bytes:
        """The whole answer."""
        return b"".join(self.chunks)

    @property
    def asked(self) -> Any:
        """The request's JSON."""
        return json.loads(self.sent)


class Recorder:
    """What has gone over the wire so far.

    Attributes:
        url: where clients connect.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._connections: list[tuple[bytearray, bytearray]] = []

    def connected(self) -> tuple[bytearray, bytearray]:
        """Room for what one connection's client and server say."""
        self._connections.append((bytearray(), bytearray()))
        return self._connections[-1]

    def exchanges(self) -> list[Exchange]:
        """Everything, in the order of each connection, the oldest connection first."""
        return [exchange for up, down in list(self._connections) for exchange in _exchanges(bytes(up), bytes(down))]

    def forget(self) -> None:
        """Start over with the next connection."""
        self._connections.clear()


@contextmanager
def recording(server_url: str) -> Iterator[Recorder]:
    """A wire to that server."""
    address = urlsplit(server_url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        recorder = Recorder(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def accept() -> None:
            with suppress(OSError):  # the listener was closed
                while True:
                    client, _ = listener.accept()
                    server = socket.create_connection((str(address.hostname), address.port or 80))
                    carried = (client, server, *recorder.connected())
                    threading.Thread(target=_carry, args=carried, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield recorder
        listener.shutdown(socket.SHUT_RDWR)


def _carry(client: socket.socket, server: socket.socket, up: bytearray, down: bytearray) -> None:
    with client, server:
        answers = threading.Thread(target=_copy, args=(server, client, down), daemon=True)
        answers.start()
        _copy(client, server, up)
        answers.join()


def _copy(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
    with suppress(OSError):
        while data := source.recv(_READ_BYTES):
            record += data  # before it goes on, so that who has read an answer finds it recorded
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _exchanges(up: bytes, down: bytes) -> Iterator[Exchange]:
    while up:
        server = h11.Connection(h11.SERVER)
        server.receive_data(up)
        asked = server.next_event()
        if not isinstance(asked, h11.Request):
            return
        sent, _ = _body(server)
        exchange = Exchange(asked.method.decode(), asked.target.decode(), b"".join(sent))
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=asked.method, target=asked.target, headers=[("Host", "recorded")]))
        client.send(h11.EndOfMessage())
        client.receive_data(down)
        answer = client.next_event()
        if isinstance(answer, h11.Response):
            exchange.status = answer.status_code
            exchange.headers = {name.decode(): value.decode() for name, value in answer.headers}
            exchange.chunks, exchange.complete = _body(client)
        yield exchange
        up, down = server.trailing_data[0], client.trailing_data[0]


def _body(connection: h11.Connection) -> tuple[list[bytes], bool]:
    """The pieces of a body as they were framed, and whether it ended."""
    pieces: list[bytes] = []
    while True:
        event = connection.next_event()
        if not isinstance(event, h11.Data):
            return pieces, isinstance(event, h11.EndOfMessage)
        pieces.append(bytes(event.data))
