"""A blob that is still arriving, as Ollama keeps one, so that either program can go on where the other stopped.

`blobs/sha256-<hex>-partial` has the blob's full length from the start and holes where nothing has arrived yet; beside
it `-partial-<N>` says of each part where it lies and how much of it is there (`spec/ollama.md` section 10). Ours are
replaced whole: a kill in the middle of writing one would leave a file at which Ollama gives up.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
from pathlib import Path

import msgspec

from engines.errors import RegistryError
from engines.store.blobs import StoreNotWritable, blob_path, flush_directory, make_directories

NUM_PARTS = 16
MIN_PART_BYTES = 100_000_000
MAX_PART_BYTES = 1_000_000_000
"""Ollama server/download.go: a blob is divided by 16, within these bounds."""

HASH_BYTES = 16 << 20

_MAX_NOTE_BYTES = 4096


class WrongBlob(RegistryError):
    """What has arrived has another digest than was asked for."""


class Part(msgspec.Struct, rename="pascal"):
    """A stretch of a blob and how many of its bytes have arrived, from its beginning."""

    n: int
    offset: int
    size: int
    completed: int = 0

    @property
    def missing(self) -> int:
        """Bytes that have not arrived."""
        return self.size - self.completed


def part_size(blob_bytes: int, min_part_bytes: int) -> int:
    """Bytes of each of a blob's parts but the last, when it is sent either way."""
    return min(max(blob_bytes // NUM_PARTS, min_part_bytes), MAX_PART_BYTES)


class PartialBlob:
    """The files of one blob that is arriving. Used by whoever holds its lock; every method blocks on the disk.

    Raises:
        StoreNotWritable: from every method, when the directory or the disk refuses.
    """

    def __init__(self, models: Path, digest: str, size_bytes: int, min_part_bytes: int = MIN_PART_BYTES) -> None:
        self._blob = blob_path(models, digest)
        self._file = self._blob.with_name(f"{self._blob.name}-partial")
        self._digest = digest
        self._size_bytes = size_bytes
        self._min_part_bytes = min_part_bytes
        self._descriptor = -1
        self._hash = hashlib.sha256()
        self.parts: list[Part] = []

    def try_lock(self) -> bool:
        """Open the files, if no other download and no other process has them."""
        try:
            make_directories(self._blob.parent)
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                locked = _lock(descriptor) and _is_still(self._file, descriptor)
            finally:
                if not locked:
                    os.close(descriptor)
        except OSError as error:
            raise self._not_writable(error) from error
        self._descriptor = descriptor if locked else -1
        return locked

    def open(self) -> bool:
        """Find out what is there already, or divide the blob into parts; whether anything was there."""
        try:
            noted = self._read_notes() if os.fstat(self._descriptor).st_size == self._size_bytes else []
        except OSError as error:
            raise self._not_writable(error) from error
        if not _tile(noted, self._size_bytes):
            self.begin_afresh()
            return False
        self.parts = noted
        return any(part.completed for part in noted)

    def begin_afresh(self) -> None:
        """Throw away what is there and divide the blob into parts."""
        try:
            self._forget_notes()
            os.truncate(self._descriptor, 0)  # a hole is as good as what nobody vouches for, and takes no room
            os.truncate(self._descriptor, self._size_bytes)
            self.parts = self._divide()
            self._hash = hashlib.sha256()
            for part in self.parts:  # all of them, for a blob with a part that nobody speaks of is begun afresh
                self._write_note(part)
        except OSError as error:
            raise self._not_writable(error) from error

    def write(self, part: Part, data: bytes) -> None:
        """Add the bytes that come next in a part, and note that they are there."""
        try:
            view, offset = memoryview(data), part.offset + part.completed
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written
            part.completed += len(data)
            self._write_note(part)
        except OSError as error:
            raise self._not_writable(error) from error

    def hash_some(self, offset: int) -> int:
        """Take in the stretch at `offset`; where the next one begins."""
        try:
            data = os.pread(self._descriptor, HASH_BYTES, offset)
        except OSError as error:
            raise self._not_writable(error) from error
        self._hash.update(data)
        return offset + len(data) if data else self._size_bytes

    def publish(self) -> None:
        """Make the blob visible, once all of it has been hashed.

        Raises:
            WrongBlob: it is another blob.
        """
        found = f"sha256:{self._hash.hexdigest()}"
        if found != self._digest:
            raise WrongBlob(f"digest mismatch, file must be downloaded again: want {self._digest}, got {found}")
        try:
            os.fsync(self._descriptor)
            self._file.replace(self._blob)
            flush_directory(self._blob.parent)
            self._forget_notes()  # last: killed before it, notes without their file say nothing
        except OSError as error:
            raise self._not_writable(error) from error

    def discard(self) -> None:
        """Remove what has arrived."""
        try:
            self._file.unlink(missing_ok=True)
            self._forget_notes()
        except OSError as error:
            raise self._not_writable(error) from error

    def close(self) -> None:
        """Let go of the files, which stay as they are."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _divide(self) -> list[Part]:
        size = part_size(self._size_bytes, self._min_part_bytes)
        offsets = range(0, self._size_bytes, size)
        return [Part(n, offset, min(size, self._size_bytes - offset)) for n, offset in enumerate(offsets)]

    def _notes(self) -> list[Path]:
        pattern = re.compile(re.escape(self._file.name) + r"-\d+")
        return [path for path in self._file.parent.iterdir() if pattern.fullmatch(path.name)]

    def _read_notes(self) -> list[Part]:
        parts = []
        for path in self._notes():
            try:
                with path.open("rb") as file:
                    parts.append(msgspec.json.decode(file.read(_MAX_NOTE_BYTES), type=Part))
            except msgspec.MsgspecError:
                return []
        return sorted(parts, key=lambda part: part.n)

    def _write_note(self, part: Part) -> None:
        note = self._file.with_name(f"{self._file.name}-{part.n}")
        temporary = note.with_name(f".{note.name}.tmp")
        temporary.write_bytes(msgspec.json.encode(part) + b"\n")
        temporary.replace(note)

    def _forget_notes(self) -> None:
        for note in self._notes():
            note.unlink(missing_ok=True)

    def _not_writable(self, error: OSError) -> StoreNotWritable:
        return StoreNotWritable(f"cannot write {self._blob}: {error.strerror}")


def _tile(parts: list[Part], size_bytes: int) -> bool:
    """Whether parts cover a blob, each byte once."""
    end = 0
    for number, part in enumerate(parts):
        if part.n != number or part.offset != end or not 0 <= part.completed <= part.size:
            return False
        end += part.size
    return end == size_bytes


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks; two downloads of one blob would then write the same bytes twice.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the file has that name, and has not been published or removed since it was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
