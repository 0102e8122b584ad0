"""One writer at a time: the lock under which manifests are written and blobs deleted.

Held for milliseconds, never while something is uploaded, downloaded or computed, and let go of by the system when its
holder dies. It keeps Headwaters apart; Ollama knows no lock, so beside it the rules of age hold (`writer.py`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.store.blobs import StoreNotWritable, make_directories

WAIT_S = 30.0
_POLL_S = 0.01
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What network file systems without locks say; there the store is as safe as Ollama's own."""


@contextmanager
def store_lock(models: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold the store's lock, alone among all threads and processes.

    Raises:
        StoreNotWritable: the directory refuses, or somebody has held the lock for `wait_s` seconds.
    """
    path = models / ".headwater.lock"
    try:
        make_directories(models)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreNotWritable(f"cannot write {models}: {error.strerror}") from error
    try:
        _wait_for(descriptor, path, time.monotonic() + wait_s)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, path: Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise StoreNotWritable(f"cannot lock {path}: {error.strerror}") from error
        if time.monotonic() > deadline:
            raise StoreNotWritable(f"cannot lock {path}: another program has been changing the store for too long")
        time.sleep(_POLL_S)
