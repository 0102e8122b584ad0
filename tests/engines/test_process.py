from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import eventually, is_alive, pid_in

from engines.process import LINE_BYTES, TAIL_LINES, ProcessExited, clean_environment, run_process

READY = """
import os, pathlib, signal, subprocess, sys, time
def ready(pid):
    pathlib.Path(sys.argv[1]).write_text(f"{pid}\\n")
def sleeper(first="pass"):
    return subprocess.Popen([sys.executable, "-c", f"import signal, time; {first}; time.sleep(60)"]).pid
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
"""


def python(program: str, *args: str | Path) -> list[str]:
    """A child that runs a line of Python."""
    return [sys.executable, "-c", READY + program, *map(str, args)]


async def said(program: str) -> ProcessExited:
    """How a child ended by itself."""
    with pytest.raises(ProcessExited) as caught:
        await run_process(python(program), name="test")
    return caught.value


async def cancel_when_ready(program: str, ready: Path, grace_s: float) -> tuple[int, float]:
    """Start a child, cancel the run once it is ready; its reported process id, and how long the end took."""
    running = asyncio.create_task(run_process(python(program, ready), name="test", grace_s=grace_s))
    pid = await asyncio.to_thread(pid_in, ready)
    started = time.monotonic()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    return pid, time.monotonic() - started


@pytest.mark.parametrize("status", [0, 3])
async def test_a_child_that_ends_by_itself_is_an_error(status: int) -> None:
    """Whatever its exit status: it was to run until told otherwise."""
    end = await said(f"sys.exit({status})")
    assert end.status == status
    assert str(end) == f"exit status {status}"


async def test_a_signal_is_told_by_name() -> None:
    """A crash of the child reads as one."""
    end = await said("os.kill(os.getpid(), signal.SIGKILL)")
    assert end.status == -signal.SIGKILL
    assert str(end) == "killed by SIGKILL"


async def test_the_last_words_are_kept() -> None:
    """The end of stderr is kept by lines, blank ones left out, stdout is not."""
    end = await said("print('no'); [print(f'line {i}\\n', file=sys.stderr) for i in range(100)]")
    assert end.tail.splitlines() == [f"line {i}" for i in range(100 - TAIL_LINES, 100)]


async def test_enormous_lines_are_bounded() -> None:
    """Megabytes without a line break neither block the child nor fill our memory."""
    end = await said("sys.stderr.write('x' * 5_000_000 + '\\nlast words'); sys.exit(1)")
    assert len(end.tail) <= TAIL_LINES * (LINE_BYTES + 1)
    assert end.tail.splitlines()[-1] == "last words"


async def test_words_that_are_no_text_are_kept_as_well_as_can_be() -> None:
    """Bytes that are no UTF-8 do not lose the line."""
    end = await said("sys.stderr.buffer.write(b'bad \\xff byte'); sys.exit(1)")
    assert end.tail == "bad \ufffd byte"


async def test_cancelling_ends_a_polite_child_at_once(tmp_path: Path) -> None:
    """SIGTERM is enough, and nothing waits for the grace time."""
    pid, took_s = await cancel_when_ready("ready(os.getpid()); time.sleep(60)", tmp_path / "pid", grace_s=30)
    assert not is_alive(pid)
    assert took_s < 10


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """After the grace time, and not before it."""
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(os.getpid()); time.sleep(60)"
    pid, took_s = await cancel_when_ready(program, tmp_path / "pid", grace_s=0.2)
    assert not is_alive(pid)
    assert 0.2 <= took_s < 10


async def test_grandchildren_die_with_the_child(tmp_path: Path) -> None:
    """The whole process group goes when we stop, polite or not."""
    program = "ready(sleeper(DEAF)); time.sleep(60)"
    grandchild, _ = await cancel_when_ready(program, tmp_path / "pid", grace_s=10)
    eventually(lambda: not is_alive(grandchild))


async def test_grandchildren_die_when_the_child_ended_by_itself(tmp_path: Path) -> None:
    """They may even hold its stderr open; that is waited for a moment and not for ever."""
    started = time.monotonic()
    program = "ready(sleeper(DEAF)); sys.exit(4)"
    with pytest.raises(ProcessExited) as caught:
        await run_process(python(program, tmp_path / "pid"), name="test")
    assert caught.value.status == 4
    assert time.monotonic() - started < 20
    grandchild = pid_in(tmp_path / "pid")
    eventually(lambda: not is_alive(grandchild))


def test_a_child_that_watches_us_is_gone_when_we_are_killed(tmp_path: Path) -> None:
    """SIGKILL gives us no chance to clean up; the closing of the child's standard input does it."""
    child = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(f'{os.getpid()}\\n'); os.read(0, 1)"
    program = f"""
import asyncio, sys
from engines.process import run_process
asyncio.run(run_process([sys.executable, "-c", {child!r}, sys.argv[1]], name="test"))
"""
    parent = subprocess.Popen([sys.executable, "-c", program, tmp_path / "pid"])
    try:
        pid = pid_in(tmp_path / "pid")
        assert is_alive(pid)
    finally:
        parent.kill()
        parent.wait()
    eventually(lambda: not is_alive(pid))


async def test_secrets_do_not_reach_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a worker needs is in its environment."""
    monkeypatch.setenv("HEADWATER_ADMIN_KEY", "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    end = await said(
        "print(os.environ.get('HEADWATER_ADMIN_KEY'), os.environ['CUDA_VISIBLE_DEVICES'], file=sys.stderr)"
    )
    assert end.tail == "None 0"


def test_the_environment_keeps_what_libraries_read() -> None:
    """Paths, locale and the settings of accelerators stay; the rest goes."""
    kept = {"PATH": "/bin", "LC_ALL": "C", "OMP_NUM_THREADS": "2", "GGML_METAL": "1"}
    assert clean_environment({**kept, "OPENAI_API_KEY": "x", "DATABASE_URL": "y"}) == kept


async def test_a_program_that_cannot_start_says_so() -> None:
    """The operating system's error comes through."""
    with pytest.raises(FileNotFoundError):
        await run_process(["/no/such/program"], name="test")
