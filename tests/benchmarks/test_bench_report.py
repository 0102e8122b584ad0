import io
import json
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
pytest.importorskip("jsonschema", reason="the extra `bench` is not installed")

from benchmarks.clients import CLIENTS, mixed_requests
from benchmarks.load import Answer, Load
from benchmarks.prefix import ENDING_TOKENS, QUESTION, distinct_tokens
from benchmarks.report import Found, missed, print_found, save_found
from benchmarks.scenario import Sample
from benchmarks.targets import HEADWATER, LLAMA_SERVER

FLAGS = {LLAMA_SERVER: {"--parallel 1"}}


def found(ours: list[float], theirs: list[float]) -> Found:
    """What `clients` found with these throughputs, round by round."""
    rounds = enumerate(zip(ours, theirs, strict=True))
    samples = [
        Sample("1 client", via, turn, {"wall_tps": rate, "ttft_p50_s": 0.1})
        for turn, rates in rounds
        for via, rate in zip((HEADWATER, LLAMA_SERVER), rates, strict=True)
    ]
    return Found(CLIENTS, samples)


def printed(one: Found) -> str:
    """What a user sees."""
    console = Console(file=io.StringIO(), width=160)
    print_found([one], FLAGS, 3, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_ratio_compares_within_rounds() -> None:
    """A machine at half speed for one round slows both halves of it and leaves the ratio alone."""
    assert found([60, 30, 60], [50, 25, 50]).ratio("1 client", "wall_tps", LLAMA_SERVER) == pytest.approx(1.2)


def test_the_table_has_values_ratios_goals_and_flags() -> None:
    """One table says how much, beside whom, what was aimed at, and how the other was started."""
    text = printed(found([60, 61, 62], [50, 51, 52]))
    for part in ("61.0", "51.0 x 1.20", "1.196 of 1", "--parallel 1"):
        assert part in text
    assert "TRUSTED" not in text


def test_a_busy_machine_is_named() -> None:
    """Numbers that cannot be right are not left standing alone."""
    assert "differ by 90%" in printed(found([60, 6, 60], [50, 51, 52]))


def test_a_goal_that_is_missed_is_known() -> None:
    """What a goal is held against is the median ratio."""
    assert [goal.case for goal in missed([found([40, 40, 60], [50, 50, 50])])] == ["1 client"]
    assert missed([found([60, 60, 40], [50, 50, 50])]) == []


def test_failures_are_told_beside_what_was_found() -> None:
    """A target that failed is named; the others' numbers stay."""
    one = found([60], [50])
    one.failures.append("Ollama: connection refused")
    assert "failed: Ollama: connection refused" in printed(one)


def test_json_and_plot_are_written(tmp_path: Path) -> None:
    """The record holds every sample and the ratios; the plot is a PNG."""
    record, plot = save_found([found([60, 61], [50, 51])], FLAGS, {"rounds": 2}, tmp_path / "out")
    saved = json.loads(record.read_text())["scenarios"]["clients"]
    assert len(saved["samples"]) == 4
    assert saved["ratios"]["1 client"][LLAMA_SERVER]["wall_tps"] == pytest.approx(1.198, abs=0.001)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_mixed_prompts_are_of_all_lengths_and_half_share_a_system_prompt() -> None:
    """From 32 to about 512 words each, the same for every target of a round and others in the next."""
    clients = mixed_requests(8, 3, seed=1)
    lengths = [sum(text.count(" ") for _, text in one.messages) for client in clients for one in client]
    assert min(lengths) < 128 < 256 < max(lengths) <= 512
    assert sum(len(client[0].messages) == 2 for client in clients) == 4
    assert mixed_requests(8, 3, seed=1) == clients != mixed_requests(8, 3, seed=2)


def test_a_shared_beginning_is_counted_once() -> None:
    """Three prompts of 700 tokens that differ in their questions alone are not 2,100 tokens."""
    answer = Answer(0.0, (1.0,), 2.0, prompt_tokens=700, completion_tokens=1)
    assert distinct_tokens(Load([[answer]] * 3, 0.0)) == 700 + 2 * (QUESTION + ENDING_TOKENS)
