"""The acceptance list is complete: every row is run, named elsewhere or excluded with a reason."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from acceptance_rows import ELSEWHERE, EXCLUDED, PARTS_EXCLUDED, ROWS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def functions_of(path: Path) -> set[str]:
    """Names of a file's test functions."""
    defined = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in defined if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def rows_run() -> set[int]:
    """Rows that a test of this folder is named for."""
    names = {name for path in HERE.glob("test_ollama_accept_*.py") for name in functions_of(path)}
    return {int(found[1]) for name in names if (found := re.match(r"test_row_(\d\d)_", name))}


def test_every_row_is_run_or_excluded_by_name() -> None:
    """No row is left out in silence, and none is both run and excluded."""
    assert set(ROWS) == set(range(1, 60))
    assert rows_run() | set(EXCLUDED) == set(ROWS)
    assert not rows_run() & set(EXCLUDED)
    assert all(row in ROWS and reason for (row, _), reason in PARTS_EXCLUDED.items())


@pytest.mark.parametrize(("row", "test"), [(row, test) for row, tests in ELSEWHERE.items() for test in tests])
def test_what_proves_a_row_elsewhere_exists(row: int, test: str) -> None:
    """A test that is named here and renamed there would leave its row unproved."""
    file, _, name = test.partition("::")
    assert row in ROWS
    assert name in functions_of(ROOT / file)
