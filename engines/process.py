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
LINE_BYTES = 500
_KEPT = (
    "PATH", "HOME", "USER", "TMPDIR", "TEMP", "TMP", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
    "SYSTEMROOT", "HEADWATER_KERNELS",
)  # fmt: skip
_KEPT_PREFIXES = (
    "LC_", "LANG", "PYTHON", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "GGML_", "LLAMA_", "OMP_", "GOMP_", "XDG_",
)  # fmt: skip


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
    transport, child = await asyncio.get_running_loop().subprocess_exec(
        lambda: _Child(name),
        *argv,
        stdin=asyncio.subprocess.PIPE,  # the child watches it: when we die, it closes
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(os.environ),
        start_new_session=True,
    )
    try:
        await asyncio.wait({child.exited})
        await asyncio.wait({child.fell_silent}, timeout=1)
        raise ProcessExited(transport.get_returncode() or 0, child.tail)
    finally:
        await asyncio.shield(asyncio.ensure_future(_stop(transport, child, grace_s)))


class _Child(asyncio.SubprocessProtocol):
    """What we hear of a child. asyncio's own Process would also wait for everyone who inherited the pipes."""

    def __init__(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[None] = loop.create_future()
        self.fell_silent: asyncio.Future[None] = loop.create_future()
        self._name = name
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._partial = b""

    @property
    def tail(self) -> str:
        """The last lines that it said."""
        return "\n".join(self._lines)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Keep whole lines; of a long one, the beginning."""
        *lines, rest = (self._partial + data).split(b"\n")
        self._partial = rest[:LINE_BYTES]
        for line in lines:
            self._keep(line)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        """Nothing more will be said, once this is stderr."""
        if fd == 2:
            self._keep(self._partial)
            self.fell_silent.set_result(None)

    def process_exited(self) -> None:
        """It ended."""
        self.exited.set_result(None)

    def _keep(self, line: bytes) -> None:
        text = line[:LINE_BYTES].decode("utf-8", "replace").rstrip()
        if text:
            self._lines.append(text)
            log.debug("%s: %s", self._name, text)


async def _stop(transport: asyncio.SubprocessTransport, child: _Child, grace_s: float) -> None:
    """End the child's whole group, politely first."""
    pid = transport.get_pid()
    if not child.exited.done():
        _signal_group(pid, signal.SIGTERM)
        await asyncio.wait({child.exited}, timeout=grace_s)
        if not child.exited.done():
            log.warning("process %d ignored SIGTERM for %g s and is killed", pid, grace_s)
    _signal_group(pid, signal.SIGKILL)  # whatever is left of the group
    await child.exited
    transport.close()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already; macOS says EPERM for zombies
        os.killpg(pid, number)
