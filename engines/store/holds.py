"""Blobs that are being worked with, which nobody may delete although no manifest names them yet.

Whoever makes or fetches a model holds its blobs until the manifest is written. Who only uploaded one leaves a promise:
the blob stays for an hour, in which the request that uses it can be expected. Blobs of other processes are kept by
their age alone, as Ollama keeps them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

PROMISE_S = 3600.0


class Holds:
    """What may not be deleted now. Safe to use from every thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mutex = threading.Lock()
        self._held: Counter[str] = Counter()
        self._promised: dict[str, float] = {}

    @contextmanager
    def holding(self) -> Iterator[Hold]:
        """A hold to which blobs can be added; it lets go of them all at its end."""
        hold = Hold(self._mutex, self._held)
        try:
            yield hold
        finally:
            hold.release()

    def promise(self, digest: str) -> None:
        """Keep a blob for an hour, or until `redeem`."""
        with self._mutex:
            now = self._clock()
            self._promised = {each: until for each, until in self._promised.items() if until > now}
            self._promised[digest] = now + PROMISE_S

    def redeem(self, digests: Iterable[str]) -> None:
        """A manifest names these blobs now: from here on it is what keeps them."""
        with self._mutex:
            for digest in digests:
                self._promised.pop(digest, None)

    def delete(self, digest: str, delete: Callable[[], bool]) -> bool:
        """Delete a blob unless it is held or promised; whether it was. Nobody can take hold of it meanwhile."""
        with self._mutex:
            if self._held[digest] > 0 or self._promised.get(digest, 0.0) > self._clock():
                return False
            return delete()


class Hold:
    """Blobs held by one piece of work."""

    def __init__(self, mutex: threading.Lock, held: Counter[str]) -> None:
        self._mutex = mutex
        self._held = held
        self._mine: list[str] = []

    def add(self, digest: str) -> None:
        """Hold a blob. Whoever then finds it on the disk can rely on it."""
        with self._mutex:
            self._held[digest] += 1
            self._mine.append(digest)

    def release(self) -> None:
        """Let go of every blob."""
        with self._mutex:
            self._held -= Counter(self._mine)  # in place, and drops what comes to nothing
            self._mine.clear()
