"""What is remembered of one request, whatever its end.

One object feeds the ledger and the metrics, so that the two cannot disagree. It never holds prompt or reply text. Some
of its strings were typed by a client and may be of any length, so whoever keeps one keeps `bounded_text` of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engines.events import FinishReason, Timings, Usage
from engines.request import Origin

REFUSED = "refused"
"""The finish reason of a request that was turned away before an engine had it."""

FAILURES = (FinishReason.ERROR.value, REFUSED)
"""The finish reasons that count as errors; a caller who left (`cancel`) is none."""


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One request and what it cost.

    Attributes:
        started_at: arrival in seconds since the epoch.
        route: HTTP path of the route, such as `/api/chat`.
        model: the name as the client typed it. model_digest: empty when there is no such model.
        mode: a `Mode` value, empty when the request never had one.
        status: HTTP status as the client saw it, or would have seen it.
        finish_reason: a `FinishReason` value or `REFUSED`. error_code: `HeadwaterError.code`, empty without an error.
        wasted_tokens: generated but never delivered.
        draft_tokens, accepted_tokens: proposed by speculation, and kept of those.
    """

    id: str
    started_at: float
    origin: Origin
    route: str
    model: str
    status: int
    finish_reason: str
    model_digest: str = ""
    backend: str = ""
    mode: str = ""
    error_code: str = ""
    stream: bool = False
    usage: Usage = field(default_factory=Usage)
    wasted_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    timings: Timings = field(default_factory=Timings)


def bounded_text(text: str, max_bytes: int) -> str:
    """The text cut to `max_bytes` of UTF-8, without what no database or metric can hold: NUL and lone surrogates."""
    encoded = text[:max_bytes].replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")
    return encoded[:max_bytes].decode("utf-8", "ignore")
