"""How much prefill rides along with decoding."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engines.llamacpp.pace import MIN_CHUNK, Pace


def costs(pace: Pace) -> Pace:
    """One that knows: decodes take 50 ms, a prompt token 2 ms."""
    pace.observe(num_decodes=4, num_prefill=0, seconds=0.050)
    pace.observe(num_decodes=0, num_prefill=100, seconds=0.200)
    return pace


def test_the_steady_chunk_is_what_the_slowdown_affords() -> None:
    """With decodes of 50 ms and 2 ms a prompt token, a step of 2.5 times the length has room for 37 tokens."""
    assert costs(Pace(slowdown=2.5, max_chunk=512)).steady_chunk == 37


def test_prompt_tokens_cost_what_they_add_to_a_decoding_step() -> None:
    """In a mixed step the decodes are not the prompt's fault."""
    pace = Pace(slowdown=2.0, max_chunk=512)
    pace.observe(num_decodes=4, num_prefill=0, seconds=0.050)
    pace.observe(num_decodes=4, num_prefill=25, seconds=0.100)
    assert pace.steady_chunk == 25


def test_where_both_parts_are_timed_decodes_are_learned_beside_prefill() -> None:
    """No step without prefill is needed for that."""
    pace = Pace(slowdown=2.0, max_chunk=512)
    for _ in range(100):
        pace.observe(num_decodes=4, num_prefill=25, seconds=0.150, prefill_s=0.050)
    assert pace.steady_chunk in (49, 50)


def test_a_prompt_after_a_calm_takes_large_portions() -> None:
    """Half a second of them, until what was saved is spent; then it keeps to the pace."""
    pace = costs(Pace(slowdown=2.5, max_chunk=512))
    chunks = []
    for _ in range(12):
        chunks.append(pace.chunk)
        pace.observe(num_decodes=4, num_prefill=pace.chunk, seconds=0.050 + 0.002 * pace.chunk)
    assert chunks[:8] == [250] * 8, "4 s were saved, and each step adds its 75 ms"
    assert chunks[-1] == 37


def test_steps_without_prefill_save_for_later() -> None:
    """Twenty of them are worth 1.5 s."""
    pace = costs(Pace(slowdown=2.5, max_chunk=512))
    for _ in range(10):
        pace.observe(num_decodes=4, num_prefill=250, seconds=0.550)
    assert pace.chunk == 37
    for _ in range(20):
        pace.observe(num_decodes=4, num_prefill=0, seconds=0.050)
    assert pace.chunk == 250


def test_a_machine_on_which_prefill_is_cheap_takes_the_largest_chunk() -> None:
    """The batch size bounds what is affordable."""
    pace = Pace(max_chunk=512)
    pace.observe(num_decodes=1, num_prefill=0, seconds=0.050)
    pace.observe(num_decodes=0, num_prefill=1000, seconds=0.010)
    assert pace.chunk == 512


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 512), st.floats(0, 100))),
    st.integers(MIN_CHUNK, 4096),
)
def test_the_chunk_stays_within_its_bounds_whatever_is_observed(
    steps: list[tuple[int, int, float]], max_chunk: int
) -> None:
    """No sequence of steps starves a prompt or exceeds the batch."""
    pace = Pace(max_chunk=max_chunk)
    for num_decodes, num_prefill, seconds in steps:
        if num_decodes or num_prefill:
            pace.observe(num_decodes=num_decodes, num_prefill=num_prefill, seconds=seconds)
        assert MIN_CHUNK <= pace.chunk <= max_chunk
