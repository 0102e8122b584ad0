"""Prefixes on the disk: what the KV cache had no room for, or held when the model was unloaded.

One file a prefix: the tokens, then llama.cpp's state of one sequence. The file's name says which tokens; the folder's
name, a fingerprint, says for which model and context parameters the state is valid. A file is believed only if its
checksum holds, and one that does not is removed. All workers share one size limit; least recently used files go first,
whoever wrote them. Its one surprise: what is saved can be found at once, while the write goes on in a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engines.llamacpp.kvcache import Tokens, common_prefix

log = logging.getLogger(__name__)

MIN_TOKENS = 256
"""Shorter prefixes are computed again sooner than they are worth a file."""

MAX_PENDING_BYTES = 256 << 20
"""States that wait to be written; beyond that, prefixes are forgotten instead."""

CLOSE_S = 3.0
"""How long closing waits for what is still to be written."""

_HEADER = struct.Struct("<8sIQI")  # magic, number of tokens, bytes of the state, CRC-32 of both
_MAGIC = b"HWPREFX1"
_KEY_TOKENS = 128  # prefixes that differ here are not looked at
_SUFFIX = ".kv"


class Shelf:
    """The prefixes of one model.

    Args:
        root: where all models' prefixes are. fingerprint: see `fingerprint`. limit_bytes: of everything in `root`.
    """

    def __init__(self, root: Path, fingerprint: str, limit_bytes: int) -> None:
        self._root = root
        self._folder = root / fingerprint
        self._limit_bytes = limit_bytes
        self._index: dict[str, Tokens] = {}
        self._alike: dict[bytes, list[str]] = {}  # keys, by what the prefixes begin with
        self._pending: dict[str, memoryview] = {}
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="shelf")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is in there says what people asked
        for path in self._folder.glob(f"*{_SUFFIX}"):
            tokens = _read_tokens(path)
            if tokens is None:
                path.unlink(missing_ok=True)
            else:
                self._add(path.stem, tokens)

    def __len__(self) -> int:
        return len(self._index)

    def longest(self, tokens: Tokens) -> tuple[str, int] | None:
        """The prefix that shares most with `tokens`: its key, and how much. Callable from any thread."""
        alike = tuple(self._alike.get(_beginning(tokens), ()))
        known = ((self._index.get(key), key) for key in alike)  # one may be dropped meanwhile
        best = max(((common_prefix(found, tokens), key) for found, key in known if found is not None), default=None)
        return (best[1], best[0]) if best else None

    def wants(self, tokens: Tokens) -> bool:
        """Whether a prefix is worth saving: long enough, and not the beginning of one that is here already."""
        if len(tokens) < MIN_TOKENS or sum(map(len, self._pending.values())) > MAX_PENDING_BYTES:
            return False
        found = self.longest(tokens)
        return found is None or found[1] < len(tokens)

    def save(self, tokens: Tokens, state: memoryview) -> None:
        """Take a prefix in. Those that it continues are dropped: it is as good for everybody."""
        key = _key(tokens)
        for other in tuple(self._alike.get(_beginning(tokens), ())):
            known = self._index.get(other)
            if known is not None and len(known) < len(tokens) and common_prefix(known, tokens) == len(known):
                self._drop(other)
                self._disk.submit(self._path(other).unlink, missing_ok=True)
        self._add(key, tokens)
        self._pending[key] = state
        self._disk.submit(self._write, key, tokens)

    def read(self, key: str, then: Callable[[Tokens, bytes | None], None]) -> None:
        """Read a state in the background and hand it to `then` with its tokens; None if it is not there or damaged."""
        tokens = self._index.get(key)
        if tokens is None:
            then(np.empty(0, np.int32), None)
            return
        future: Future[bytes | None] = self._disk.submit(self._read, key, tokens)
        future.add_done_callback(lambda done: then(tokens, done.result()))

    def close(self) -> None:
        """Write what is to be written, within `CLOSE_S`."""
        deadline = time.monotonic() + CLOSE_S
        while self._pending and time.monotonic() < deadline:
            time.sleep(0.01)
        self._disk.shutdown(wait=False, cancel_futures=True)

    def _add(self, key: str, tokens: Tokens) -> None:
        if key not in self._index:
            self._index[key] = tokens
            self._alike.setdefault(_beginning(tokens), []).append(key)

    def _drop(self, key: str) -> None:
        tokens = self._index.pop(key, None)
        if tokens is not None:
            self._alike[_beginning(tokens)].remove(key)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

    def _write(self, key: str, tokens: Tokens) -> None:
        state = self._pending[key]
        partial = self._folder / f"{key}.{os.getpid()}.partial"
        try:
            size = _HEADER.size + tokens.nbytes + len(state)
            self._make_room(size)
            header = _HEADER.pack(_MAGIC, len(tokens), len(state), _checksum(tokens, state))
            with partial.open("wb") as file:
                file.write(header)
                file.write(tokens.tobytes())
                file.write(state)
            partial.replace(self._path(key))
        except OSError as error:
            log.warning("a prefix could not be written: %s", error)
            self._drop(key)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        finally:
            del self._pending[key]

    def _make_room(self, size: int) -> None:
        """Delete the least recently used files until `size` more bytes are within the limit.

        Raises:
            OSError: it exceeds the limit by itself.
        """
        if size > self._limit_bytes:
            raise OSError(f"{size} bytes are more than the limit of {self._limit_bytes}")
        files = []
        for path in self._root.glob(f"*/*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another worker was faster
                found = path.stat()
                files.append((found.st_mtime, found.st_size, path))
        total = sum(length for _, length, _ in files)
        for _, length, path in sorted(files):
            if total + size <= self._limit_bytes:
                return
            path.unlink(missing_ok=True)
            total -= length
            if path.parent == self._folder:
                self._drop(path.stem)

    def _read(self, key: str, tokens: Tokens) -> bytes | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            self._drop(key)
            return None
        state = _checked_state(data, tokens)
        if state is None:
            log.warning("the prefix %s is damaged and was removed", path.name)
            self._drop(key)
            path.unlink(missing_ok=True)
        return state


def fingerprint(files: list[Path], parameters: str) -> str:
    """A name for everything that a state depends on: the files of the model, and `parameters` of library and context.

    Of each file it takes the size, the beginning and 64 samples, which tells fine-tunes of one model apart without
    reading gigabytes.
    """
    digest = hashlib.sha256(parameters.encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
            for i in range(64):
                file.seek(size * i // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:32]


def _key(tokens: Tokens) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:32]


def _beginning(tokens: Tokens) -> bytes:
    return tokens[:_KEY_TOKENS].tobytes()


def _checksum(tokens: Tokens, state: memoryview) -> int:
    return zlib.crc32(state, zlib.crc32(tokens.tobytes()))


def _read_tokens(path: Path) -> Tokens | None:
    """The tokens of a file whose name, header and size make sense."""
    try:
        with path.open("rb") as file:
            magic, num_tokens, num_bytes, _ = _HEADER.unpack(file.read(_HEADER.size))
            size = os.fstat(file.fileno()).st_size
            if magic != _MAGIC or size != _HEADER.size + 4 * num_tokens + num_bytes or num_tokens < MIN_TOKENS:
                return None
            tokens = np.frombuffer(file.read(4 * num_tokens), np.int32)
            return tokens if _key(tokens) == path.stem else None
    except (OSError, struct.error):
        return None


def _checked_state(data: bytes, tokens: Tokens) -> bytes | None:
    if len(data) < _HEADER.size:
        return None
    magic, num_tokens, num_bytes, checksum = _HEADER.unpack(data[: _HEADER.size])
    start = _HEADER.size + tokens.nbytes
    if magic != _MAGIC or num_tokens != len(tokens) or len(data) != start + num_bytes:
        return None
    if data[_HEADER.size : start] != tokens.tobytes() or zlib.crc32(data[_HEADER.size :]) != checksum:
        return None
    return data[start:]
