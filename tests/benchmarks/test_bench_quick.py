import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
pytest.importorskip("jsonschema", reason="the extra `bench` is not installed")


@pytest.mark.e2e
def test_a_quick_run_measures_and_writes(tmp_path: Path) -> None:
    """Two scenarios run on a real Headwater from the command line, and leave a record with both of them."""
    for scenario in ("prefix", "hop"):
        command = [sys.executable, "-m", "benchmarks", scenario, "--quick", "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        record = json.loads((tmp_path / "bench.json").read_text())
        assert record["scenarios"][scenario]["samples"]
        assert not record["scenarios"][scenario]["failures"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
