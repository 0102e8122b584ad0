"""Content-addressed files, `blobs/sha256-<64 hex>`, and the two ways the store touches a disk: bounded, and atomic.

Whether a blob is a model or a licence is the manifest's business. Its surprise: directory entries are flushed too, so
what was written once is there after a power cut.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

from engines.errors import BadRequest, HeadwaterError

DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}\Z"


class StoreUnreadable(HeadwaterError):
    """A file of the store is there but cannot be read, or is larger than it may be."""

    code = "store_unreadable"


class StoreNotWritable(HeadwaterError):
    """A file of the store could not be written; the message says which and why."""

    code = "store_not_writable"


def blob_path(models: Path, digest: str) -> Path:
    """Where the blob of that digest belongs.

    Raises:
        BadRequest: the text is no digest, so it names no file either.
    """
    if not re.match(DIGEST_PATTERN, digest):
        raise BadRequest("invalid digest format")
    return models / "blobs" / digest.replace(":", "-")


def write_blob(models: Path, data: bytes) -> str:
    """Store bytes under their digest and return it. A blob that is there already is only touched.

    Raises:
        StoreNotWritable: the directory or the disk refuses.
    """
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if not keep_blob(models, digest, len(data)):
        write_atomically(blob_path(models, digest), data)
    return digest


def keep_blob(models: Path, digest: str, size_bytes: int) -> bool:
    """Whether a blob is there and whole. It gets a new time, so that nobody prunes it before a manifest names it."""
    path = blob_path(models, digest)
    try:
        if path.stat().st_size != size_bytes:
            return False
        os.utime(path)
    except OSError:
        return False  # missing, or another user's: writing it tells
    return True


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """A small file's content.

    Raises:
        FileNotFoundError: there is no such file; a pipe or a directory, which could block for ever, is none.
        StoreUnreadable: it may not be read or is too large.
    """
    if not os.path.isfile(path):  # noqa: PTH113 (unlike Path.is_file it never raises)
        raise FileNotFoundError(path)
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreUnreadable(f"cannot read {path}: {error.strerror}") from error
    if len(data) > max_bytes:
        raise StoreUnreadable(f"{path} is larger than {max_bytes} bytes")
    return data


def write_atomically(path: Path, data: bytes) -> None:
    """Create or replace a file, so that whoever looks sees all of the old or all of the new, whenever we are killed.

    Raises:
        StoreNotWritable: the directory or the disk refuses.
    """
    temporary = temporary_beside(path)
    try:
        make_directories(path.parent)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        flush_directory(path.parent)
    except OSError as error:
        raise StoreNotWritable(f"cannot write {path}: {error.strerror}") from error


def temporary_beside(path: Path) -> Path:
    """A name for a file that is to become `path`. A leading dot is valid in no model name and no digest."""
    return path.with_name(f".{secrets.token_hex(16)}.tmp")


def make_directories(directory: Path) -> None:
    """Make what is missing, all with the mode; `mkdir(parents=True)` would give it only to the last."""
    for missing in [each for each in (directory, *directory.parents) if not each.exists()][::-1]:
        missing.mkdir(mode=0o755, exist_ok=True)


def flush_directory(directory: Path) -> None:
    """Make what was created, renamed or removed in a directory outlast a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
