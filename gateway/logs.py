"""Log lines that know their request: id and origin come from context, prompts and replies never come at all.

What a client typed, such as a model's name, may be part of a message, so control characters are shown and not obeyed:
nobody can forge a line or speak to a terminal.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

request_context: ContextVar[str] = ContextVar("request_context", default="-")
"""`<request id> <caller>` of the request being served in this task."""

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s [%(request)s] %(message)s"


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}


class _OneLine(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        return super().formatMessage(record).translate(_CONTROLS)


class _AddRequest(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request = request_context.get()
        return True


def set_up_logging(*, debug: bool = False) -> None:
    """One line per decision on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(_FORMAT))
    handler.addFilter(_AddRequest())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("engines", "compat", "gateway"):
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.INFO)
    for name in ("httpx", "httpcore", "alembic", "aiosqlite", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
