"""Log lines that know their request: id and origin come from context, prompts and replies never come at all."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

request_context: ContextVar[str] = ContextVar("request_context", default="-")
"""`<request id> <caller>` of the request being served in this task."""

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s [%(request)s] %(message)s"


class _AddRequest(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request = request_context.get()
        return True


def set_up_logging(*, debug: bool = False) -> None:
    """One line per decision on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(_AddRequest())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("engines", "compat", "gateway"):
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.INFO)
    for name in ("httpx", "httpcore", "alembic", "aiosqlite", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
