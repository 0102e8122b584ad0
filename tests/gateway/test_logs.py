import logging
from collections.abc import Iterator

import pytest

from gateway.logs import request_context, set_up_logging

log = logging.getLogger("gateway.test_logs")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Handlers and levels are put back."""
    root = logging.getLogger()
    names = ("", "engines", "compat", "gateway", "httpx", "httpcore", "alembic", "aiosqlite", "uvicorn")
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in names}
    root.handlers[:] = []  # pytest's own would be closed by `force`
    token = request_context.set("-")
    yield
    request_context.reset(token)
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_a_line_knows_its_request(capsys: pytest.CaptureFixture[str]) -> None:
    """Id and caller come from context; outside of a request there is a dash."""
    set_up_logging()
    log.info("started")
    request_context.set("req_1 curl@127.0.0.1")
    log.info("served")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("INFO    gateway.test_logs [-] started")
    assert second.endswith("[req_1 curl@127.0.0.1] served")


def test_nobody_can_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters in what a client typed are shown, not obeyed."""
    set_up_logging()
    request_context.set("req_1 -")
    log.info("%s 200", "m\r\n2026-01-01 INFO gateway [-] all is well\x1b[2J\x9b2J")
    (line,) = capsys.readouterr().err.splitlines()
    assert "m\\x0d\\x0a2026-01-01 INFO gateway [-] all is well\\x1b[2J\\x9b2J 200" in line


def test_a_traceback_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """It is ours, and meant to be read."""
    set_up_logging()
    try:
        raise ValueError("oops")
    except ValueError:
        log.exception("failed")
    assert capsys.readouterr().err.splitlines()[-1] == "ValueError: oops"


def test_debug_is_for_our_own_floors(capsys: pytest.CaptureFixture[str]) -> None:
    """Libraries stay quiet either way."""
    set_up_logging()
    log.debug("hidden")
    set_up_logging(debug=True)
    log.debug("shown")
    logging.getLogger("httpx").info("hidden")
    assert [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()] == ["shown"]
