"""A blob on its way into the store: written to a temporary file, hashed meanwhile, and visible only once it is whole.

Memory is bounded by what the caller writes at once. Its surprise: bytes whose digest is not the promised one are thrown
away, where Ollama keeps them under the digest that they have.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from engines.store.blobs import (
    StoreNotWritable,
    blob_path,
    flush_directory,
    keep_blob,
    make_directories,
    temporary_beside,
)

_HASH_BYTES = 4 << 20


class BlobWriter:
    """Used as a context manager; what was not published by then is deleted. Every method blocks on the disk.

    Raises:
        StoreNotWritable: from every method, when the directory or the disk refuses.
    """

    def __init__(self, models: Path) -> None:
        self._models = models
        self._hash = hashlib.sha256()
        self._file: FileIO | None = None
        self.path = temporary_beside(models / "blobs" / "blob")
        self.size_bytes = 0

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Create the file; only then can be written."""
        try:
            make_directories(self.path.parent)
            self._file = FileIO(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb")
        except OSError as error:
            raise self._not_writable(error) from error

    def close(self) -> None:
        """Delete what was not published."""
        if self._file is not None:
            self._file.close()
            self.path.unlink(missing_ok=True)

    @property
    def digest(self) -> str:
        """Of what has been written so far."""
        return f"sha256:{self._hash.hexdigest()}"

    def write(self, data: bytes | bytearray) -> None:
        """Add bytes at the end."""
        assert self._file is not None
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._not_writable(error) from error
        self._hash.update(data)
        self.size_bytes += len(data)

    def take_in(self, on_progress: Callable[[int, int], None]) -> None:
        """Hash what somebody else has written to `path` from the start; told the bytes done and the bytes in all."""
        try:
            with self.path.open("rb", buffering=0) as file:
                total = os.fstat(file.fileno()).st_size
                while data := file.read(_HASH_BYTES):
                    self._hash.update(data)
                    self.size_bytes += len(data)
                    on_progress(self.size_bytes, total)
        except OSError as error:
            raise self._not_writable(error) from error

    def publish(self) -> bool:
        """Make the blob visible under its digest; whether it was new."""
        if keep_blob(self._models, self.digest, self.size_bytes):
            return False
        try:
            with self.path.open("rb") as written:  # whoever wrote it, and under whichever inode
                os.fsync(written.fileno())
            self.path.replace(blob_path(self._models, self.digest))
            flush_directory(self.path.parent)
        except OSError as error:
            raise self._not_writable(error) from error
        return True

    def _not_writable(self, error: OSError) -> StoreNotWritable:
        return StoreNotWritable(f"cannot write {self.path.parent}: {error.strerror}")
