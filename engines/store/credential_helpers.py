"""Programs that keep passwords for Docker: `docker-credential-NAME get`, asked on standard input.

The protocol is that of docker-credential-helpers: the registry's address goes in, `{"Username", "Secret"}` comes out,
and any other end means that there is no password. A helper is somebody else's program and may wait for a person to
unlock something, so it has a time limit, and nothing that goes wrong with it keeps a public model from being pulled.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import threading

import msgspec

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
_MAX_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_IDENTITY_TOKEN = "<token>"  # noqa: S105  # the user name that says that the secret is one


class Secret(msgspec.Struct):
    """What a helper knows of a registry."""

    username: str = msgspec.field(default="", name="Username")
    secret: str = msgspec.field(default="", name="Secret")


def ask_helper(name: str, server: str, *, timeout_s: float = TIMEOUT_S) -> Secret | None:
    """The user name and password that a helper has for a server's address; None without any.

    Identity tokens, which are no passwords, count as none.
    """
    program = shutil.which(f"docker-credential-{name}") if _NAME.fullmatch(name) else None
    if program is None:
        log.warning("there is no credential helper docker-credential-%s, which Docker's config names", name[:100])
        return None
    try:
        answer = _run([program, "get"], server.encode(), timeout_s)
        found = msgspec.json.decode(answer, type=Secret)
    except (OSError, TimeoutError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.warning("docker-credential-%s has nothing for %s: %s", name, server, error)
        return None
    return found if found.username and found.secret and found.username != _IDENTITY_TOKEN else None


def _run(command: list[str], question: bytes, timeout_s: float) -> bytes:
    """What a program answers, empty when it fails. Raises OSError, TimeoutError."""
    process = subprocess.Popen(  # noqa: S603  # the user's own program, found on the user's own path
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        _kill(process)

    timer = threading.Timer(timeout_s, end)
    timer.start()
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as asked:
            asked.write(question)
        with process.stdout as answered:
            answer = answered.read(_MAX_BYTES)
    finally:
        timer.cancel()
        _kill(process)
        process.wait()
    if is_late.is_set():
        raise TimeoutError(f"it has not answered for {timeout_s:g} s")
    return answer


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a program, and whatever it has started; harmless once it has ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
