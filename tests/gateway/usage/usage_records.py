"""Records of usage: an ordinary one to vary, and strategies for any."""

from typing import Any

from hypothesis import strategies as st

from engines.events import FinishReason, Timings, Usage
from engines.request import Origin, Trust
from gateway.usage.record import REFUSED, UsageRecord


def make_record(record_id: str = "req_1", caller: str = "alice", **fields: Any) -> UsageRecord:
    """A record of an ordinary request; further fields override, `caller` goes into its origin."""
    ordinary: dict[str, Any] = {
        "started_at": 1_800_000_000.5,
        "origin": Origin("ollama/completion", caller, "curl"),
        "route": "/api/chat",
        "model": "m:latest",
        "model_digest": "a" * 64,
        "backend": "llama.cpp",
        "mode": "completion",
        "status": 200,
        "finish_reason": "stop",
        "usage": Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=6),
        "timings": Timings(prefill_s=0.25, decode_s=0.5, ttft_s=0.25, total_s=1.0),
    }
    return UsageRecord(id=record_id, **ordinary | fields)


HOUR_0 = 1_800_000_000  # a whole hour
_counts = st.integers(0, 10_000)
_eighths = st.integers(0, 8000).map(lambda n: n / 8)  # binary fractions, so that sums are exact in any order

moments = st.one_of(
    st.integers(0, 4 * 3600).map(lambda s: float(HOUR_0 + s)),
    st.floats(HOUR_0, HOUR_0 + 4 * 3600),
    st.sampled_from([float(HOUR_0 + n * 3600 + d) for n in range(5) for d in (-0.5, 0, 0.5)]),
)
record_lists = st.lists(
    st.builds(
        UsageRecord,
        id=st.uuids().map(str),
        started_at=moments,
        origin=st.builds(
            Origin,
            surface=st.sampled_from(["ollama/completion", "openai/chat"]),
            caller=st.sampled_from(["alice", "bob", "\0", "é" * 600]),
            client=st.sampled_from(["curl", "unknown"]),
            user=st.sampled_from(["", "ann"]),
            trust=st.sampled_from(Trust),
        ),
        route=st.just("/api/chat"),
        model=st.sampled_from(["a:latest", "b:latest", "\ud800"]),
        model_digest=st.just("d"),
        backend=st.just("llama.cpp"),
        mode=st.just("completion"),
        status=st.sampled_from([200, 404, 499, 500]),
        finish_reason=st.sampled_from([*(reason.value for reason in FinishReason), REFUSED]),
        error_code=st.just(""),
        stream=st.booleans(),
        usage=st.builds(Usage, _counts, _counts, _counts, _counts, _counts),
        wasted_tokens=_counts,
        draft_tokens=_counts,
        accepted_tokens=_counts,
        timings=st.builds(Timings, _eighths, _eighths, _eighths, _eighths, _eighths, _eighths),
    ),
    max_size=30,
)
