"""What rendering one template may cost, whatever language it is written in.

A template is untrusted code: every turn of a loop and everything that can grow passes the meter of the running render,
which stops it when it has run too long or built too much. Both languages have the same limits.
"""

from __future__ import annotations

import time

from engines.errors import TemplateError

MAX_SOURCE_CHARS = 256 * 1024
MAX_OUTPUT_CHARS = 4 * 1024 * 1024
MAX_BUILT_CHARS = 32 * MAX_OUTPUT_CHARS
MAX_SECONDS = 2.0


class Meter:
    """What one render may still spend."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._num_left = MAX_BUILT_CHARS

    def tick(self) -> str:
        """Called at every turn of a loop and every call; renders as nothing."""
        if time.monotonic() > self._deadline:
            raise TemplateError(f"the chat template ran longer than {MAX_SECONDS:g} s")
        return ""

    def spend(self, size: int) -> None:
        """Called where something of `size` characters is built, before it is wherever that can be told."""
        self._num_left -= size
        if size > MAX_OUTPUT_CHARS or self._num_left < 0:
            raise TemplateError(f"the chat template built a text of more than {MAX_OUTPUT_CHARS} characters")
        self.tick()
