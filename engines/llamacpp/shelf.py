"""Prefixes outside the KV cache: in memory, and beyond that on the disk.

Cells that nobody computes with slow down everyone who does, and a prefix is brought back into the cache much faster
than it is computed; so what finished is moved here soon. Memory is limited; the least recently used prefixes go on to
the disk, as they all do when the model is unloaded.

One file a prefix: the tokens, then llama.cpp's state of one sequence. The file's name says which tokens; the folder's
name, a fingerprint, says for which model and context parameters the state is valid. A file is believed only if its
checksum holds, and one that does not is removed. All workers share one size limit; least recently used files go first,
whoever wrote them. Files are read and written in a thread of their own, and what is being written is still in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import struct
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engines.llamacpp.kvcache import Tokens, common_prefix

log = logging.getLogger(__name__)

MIN_TOKENS = 32
"""Shorter prefixes are computed again sooner than they are brought back."""

MIN_FILE_TOKENS = 256
"""Shorter prefixes are not worth a file."""

CLOSE_S = 3.0
"""How long closing waits for what is still to be written."""

_HEADER = struct.Struct("<8sIQI")  # magic, number of tokens, bytes of the state, CRC-32 of both
_MAGIC = b"HWPREFX1"
_KEY_TOKENS = 16  # prefixes that differ here are not looked at
_SUFFIX = ".kv"


class Shelf:
    """The prefixes of one model.

    Args:
        memory_bytes: of the states in memory. disk: where the others go; None forgets them.
    """

    def __init__(self, memory_bytes: int, disk: Disk | None = None) -> None:
        self._memory_bytes = memory_bytes
        self._disk = disk
        self._index: dict[str, Tokens] = {}
        self._alike: dict[bytes, list[str]] = {}  # keys, by what the prefixes begin with
        self._states: OrderedDict[str, memoryview] = OrderedDict()  # least recently used first
        self._num_bytes = 0
        self.version = 0
        for key, tokens in disk.stored() if disk else ():
            self._add(key, tokens)

    def __len__(self) -> int:
        return len(self._index)

    def longest(self, tokens: Tokens) -> tuple[str, int] | None:
        """The prefix that shares most with `tokens`: its key, and how much."""
        alike = self._alike.get(_beginning(tokens), ())
        best = max(((common_prefix(self._index[key], tokens), key) for key in alike), default=None)
        return (best[1], best[0]) if best else None

    def wants(self, tokens: Tokens) -> bool:
        """Whether a prefix is worth saving: long enough, and not the beginning of one that is here already."""
        found = self.longest(tokens) if len(tokens) >= MIN_TOKENS else None
        return len(tokens) >= MIN_TOKENS and (found is None or found[1] < len(tokens))

    def save(self, tokens: Tokens, state: memoryview) -> None:
        """Take a prefix in. Those that it continues are dropped: it is as good for everybody."""
        for other in tuple(self._alike.get(_beginning(tokens), ())):
            known = self._index[other]
            if len(known) < len(tokens) and common_prefix(known, tokens) == len(known):
                self.drop(other)
        key = _key(tokens)
        self._add(key, tokens)
        self._states[key] = state
        self._num_bytes += len(state)
        while self._num_bytes > self._memory_bytes:
            self._put_away(next(iter(self._states)))

    def tokens(self, key: str) -> Tokens | None:
        """The tokens of a prefix, if it is still here."""
        return self._index.get(key)

    def state(self, key: str) -> memoryview | None:
        """The state of a prefix that is in memory, which counts as a use."""
        if key in self._states:
            self._states.move_to_end(key)
        return self._states.get(key)

    def read(self, key: str, then: Callable[[bytes | None], None]) -> None:
        """Read a state from the disk and hand it, in another thread, to `then`; None if it is gone or damaged."""
        tokens = self._index.get(key)
        if self._disk is None or tokens is None:
            then(None)
        else:
            self._disk.read(key, tokens, then)

    def drop(self, key: str) -> None:
        """Forget a prefix, wherever it is."""
        tokens = self._index.pop(key, None)
        if tokens is None:
            return
        self._alike[_beginning(tokens)].remove(key)
        self._num_bytes -= len(self._states.pop(key, b""))
        if self._disk is not None:
            self._disk.remove(key)

    def close(self) -> None:
        """Put everything away, the most recently used first: there may not be time for all."""
        for key in reversed(list(self._states)):
            self._put_away(key)
        if self._disk is not None:
            self._disk.close()

    def _add(self, key: str, tokens: Tokens) -> None:
        self.version += 1
        if key not in self._index:
            self._index[key] = tokens
            self._alike.setdefault(_beginning(tokens), []).append(key)
        self._num_bytes -= len(self._states.pop(key, b""))

    def _put_away(self, key: str) -> None:
        """From memory to the disk, or to nowhere."""
        state, tokens = self._states.pop(key), self._index[key]
        self._num_bytes -= len(state)
        if self._disk is None or len(tokens) < MIN_FILE_TOKENS or not self._disk.write(key, tokens, state):
            self.drop(key)


class Disk:
    """A folder of prefixes, and the thread that reads and writes it.

    Args:
        root: where all models' prefixes are. fingerprint: see `fingerprint`. limit_bytes: of everything in `root`.

    Raises:
        OSError: the folder cannot be made.
    """

    MAX_PENDING_BYTES = 256 << 20
    """States that wait to be written; beyond that, prefixes are forgotten instead."""

    def __init__(self, root: Path, fingerprint: str, limit_bytes: int) -> None:
        self._root = root
        self._folder = root / fingerprint
        self._limit_bytes = limit_bytes
        self._pending: dict[str, memoryview] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shelf")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is in there says what people asked

    def stored(self) -> list[tuple[str, Tokens]]:
        """Keys and tokens of what is there; what makes no sense is removed."""
        found = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            tokens = _read_tokens(path)
            if tokens is None:
                path.unlink(missing_ok=True)
            else:
                found.append((path.stem, tokens))
        return found

    def write(self, key: str, tokens: Tokens, state: memoryview) -> bool:
        """Write a prefix in the background, unless it is there; False when too much waits already."""
        if self._path(key).exists():
            return True
        if sum(map(len, self._pending.values())) > self.MAX_PENDING_BYTES:
            return False
        self._pending[key] = state
        self._thread.submit(self._write, key, tokens)
        return True

    def read(self, key: str, tokens: Tokens, then: Callable[[bytes | None], None]) -> None:
        """Read a state in the background, after what waits to be written."""
        future: Future[bytes | None] = self._thread.submit(self._read, key, tokens)
        future.add_done_callback(lambda done: then(done.result()))

    def remove(self, key: str) -> None:
        """Delete a file in the background, if there is one."""
        self._thread.submit(self._path(key).unlink, missing_ok=True)

    def close(self) -> None:
        """Write what is to be written, within `CLOSE_S`."""
        deadline = time.monotonic() + CLOSE_S
        while self._pending and time.monotonic() < deadline:
            time.sleep(0.01)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

    def _write(self, key: str, tokens: Tokens) -> None:
        state = self._pending[key]
        partial = self._folder / f"{key}.{os.getpid()}.partial"
        try:
            self._make_room(_HEADER.size + tokens.nbytes + len(state))
            with partial.open("wb") as file:
                file.write(_HEADER.pack(_MAGIC, len(tokens), len(state), _checksum(tokens, state)))
                file.write(tokens.tobytes())
                file.write(state)
            partial.replace(self._path(key))
        except OSError as error:  # reading it will find nothing
            log.warning("a prefix could not be written: %s", error)
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

    def _read(self, key: str, tokens: Tokens) -> bytes | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        state = _checked_state(data, tokens)
        if state is None:
            log.warning("the prefix %s is damaged and was removed", path.name)
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
            if magic != _MAGIC or size != _HEADER.size + 4 * num_tokens + num_bytes:
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
