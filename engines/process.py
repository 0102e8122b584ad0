"""One child process, from start to the last trace of it.

Owns the process group, the pipe that tells the child we are alive, the tail of what it said on stderr, and stopping:
SIGTERM, a grace time, SIGKILL, always reaped. It knows nothing of models or sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

TAIL_LINES = 40
_KEPT = (
    "PATH", "HOME", "USER", "TMPDIR", "TEMP", "TMP", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
    "SYSTEMROOT",
)  # fmt: skip
_KEPT_PREFIXES = ("LC_", "LANG", "PYTHON", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "GGML_", "LLAMA_", "OMP_", "XDG_")


class ProcessExited(Exception):
    """The child ended by itself. `status` is its exit status, negative for a signal; `tail` its last words."""

    def __init__(self, status: int, tail: str) -> None:
        super().__init__(f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}")
        self.status = status
        self.tail = tail


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a worker needs of our environment; keys and passwords stay here."""
    return {k: v for k, v in environment.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)}


async def run_process(argv: Sequence[str], *, name: str, grace_s: float = 5.0) -> None:
    """Run a child until it ends or this call is cancelled; either way it is gone when this returns.

    Returns normally never: cancellation raises CancelledError as usual.

    Raises:
        ProcessExited: the child ended by itself, with whatever status.
    """
    child = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,  # the child watches it: when we die, it closes
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(os.environ),
        start_new_session=True,
    )
    assert child.stderr is not None
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    reading = asyncio.create_task(_keep_tail(child.stderr, tail, name))
    try:
        status = await child.wait()
        await asyncio.wait({reading}, timeout=1)
        raise ProcessExited(status, "\n".join(tail))
    finally:
        await asyncio.shield(asyncio.ensure_future(_stop(child, grace_s)))
        reading.cancel()


async def _stop(child: asyncio.subprocess.Process, grace_s: float) -> None:
    """End the child's whole group, politely first."""
    if child.returncode is None:
        _signal_group(child.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(child.wait(), grace_s)
        except TimeoutError:
            log.warning("process %d ignored SIGTERM for %g s and is killed", child.pid, grace_s)
    _signal_group(child.pid, signal.SIGKILL)  # whatever is left of the group
    await child.wait()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already; macOS says EPERM for zombies
        os.killpg(pid, number)


async def _keep_tail(stream: asyncio.StreamReader, tail: deque[str], name: str) -> None:
    while chunk := await _read_line(stream):
        line = chunk.decode("utf-8", "replace").rstrip()
        if line:
            tail.append(line[:500])
            log.debug("%s: %s", name, line)


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """A line, or a part of one that is too long for the buffer; empty at the end."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as end:
        return end.partial
    except asyncio.LimitOverrunError as overrun:
        return await stream.readexactly(overrun.consumed)
