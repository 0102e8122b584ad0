import io
import json
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")

from benchmarks.bare import BareRates
from benchmarks.decode import DIALECTS, DecodeOptions, DecodeResult, Round
from benchmarks.hop import Hop
from benchmarks.load import LoadRates
from benchmarks.report import print_decode, save_decode
from engines.inference import LoadConfig

OPTIONS = DecodeOptions(clients=(1, 8), tokens=64, prompt=32, repeat=2, hops=10)


def measured(clients: int, bare: float, gateway: float) -> Round:
    """A round with these decode rates."""
    load = LoadRates(gateway, gateway / 2, 0.2, 0.016, 0.02, 40, 64)
    return Round(clients, BareRates(300.0, bare), {dialect.name: load for dialect in DIALECTS})


def result(*rounds: Round) -> DecodeResult:
    """A whole result of these rounds."""
    return DecodeResult(LoadConfig(), list(rounds), Hop(0.001, 0.002, 0.0015, 0.003))


QUIET = result(measured(1, 60, 57), measured(1, 59, 57), measured(8, 120, 118), measured(8, 120, 116))


def printed(found: DecodeResult) -> str:
    """What a user sees."""
    console = Console(file=io.StringIO(), width=120)
    print_decode(found, OPTIONS, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_ratio_compares_within_rounds() -> None:
    """A machine at half speed for one round slows both halves of it and leaves the ratio alone."""
    found = result(measured(1, 60, 57), measured(1, 30, 28.5), measured(1, 60, 57))
    assert found.ratio(1, "ollama") == pytest.approx(0.95)


def test_a_quiet_machine_gets_a_plain_table() -> None:
    """Ratios of every number of clients are there, and no warning."""
    text = printed(QUIET)
    assert "0.958" in text
    assert "0.975" in text
    assert "+0.50 ms to the first byte, +1.00 ms to the last" in text
    assert "TRUSTED" not in text


def test_a_busy_machine_is_named() -> None:
    """Numbers that cannot be right are not left standing alone."""
    assert "differ by 98%" in printed(result(measured(1, 60, 57), measured(1, 1, 57), measured(8, 120, 118)))


def test_json_and_plot_are_written(tmp_path: Path) -> None:
    """The record holds every round and the ratios; the plot is a PNG."""
    record, plot = save_decode(QUIET, OPTIONS, Path("model.gguf"), tmp_path / "out")
    saved = json.loads(record.read_text())
    assert len(saved["rounds"]) == 4
    assert saved["ratios"]["8"]["openai"] == pytest.approx(0.975)
    assert plot.read_bytes().startswith(b"\x89PNG")
