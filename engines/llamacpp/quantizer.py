"""Starts the process that rewrites weights (`quantize.py`), listens to it, and ends it when its work is not wanted."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

from engines.errors import HeadwaterError
from engines.process import clean_environment

_POLL_S = 0.1
_TAIL_LINES = 12
_LINE_BYTES = 500
_PROGRESS = re.compile(rb"(\d+) (\d+)")


class QuantizeFailed(HeadwaterError):
    """llama.cpp did not rewrite the weights; the message carries the end of what it said."""

    code = "quantize_failed"


def rewrite(source: Path, target: Path, kind: str, on_progress: Callable[[float], None]) -> None:
    """Rewrite a GGUF's weights as the type `kind`, or merge its parts with `COPY`. Blocks until it is done.

    `on_progress` is told the share that is done, from 0 to 1, several times a second; what it raises ends the work.

    Raises:
        QuantizeFailed: llama.cpp refused.
    """
    child = subprocess.Popen(  # noqa: S603  # our own module
        [sys.executable, "-m", "engines.llamacpp.quantize", str(source), str(target), kind],
        stdin=subprocess.PIPE,  # the child watches it: when we die, it closes
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=clean_environment(os.environ),
        start_new_session=True,
    )
    try:
        assert child.stdout is not None
        said = _listen(child.stdout, on_progress)
        if (status := child.wait()) != 0:
            end = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
            raise QuantizeFailed(f"llama.cpp could not write {kind}: {said or end}")
    finally:
        child.kill()
        child.communicate()


def _listen(output: IO[bytes], on_progress: Callable[[float], None]) -> str:
    """Read until the child falls silent; its last words that are no progress."""
    words: deque[str] = deque(maxlen=_TAIL_LINES)
    share, rest = 0.0, b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            ready = selector.select(_POLL_S)
            if ready and not (data := os.read(output.fileno(), 1 << 16)):
                return "\n".join(words)
            if ready:
                *lines, rest = (rest + data).split(b"\n")
                rest = rest[-_LINE_BYTES:]
                for line in lines:
                    if counted := _PROGRESS.fullmatch(line):
                        share = (int(counted[1]) - 1) / max(int(counted[2]), 1)
                    elif line.strip():
                        words.append(line[:_LINE_BYTES].decode(errors="replace"))
            on_progress(share)
