"""The benchmark that kills writers, in short: it passes on our store and fails on a broken one."""

from pathlib import Path

import pytest

from benchmarks.kills import StoreBroken, check, kill_repeatedly
from engines.store.manifests import read_manifest
from engines.store.names import parse_name


def test_the_store_is_whole_after_kills(tmp_path: Path) -> None:
    """Killed at random instants of create, copy and delete, the store shows old states or new ones and nothing else."""
    kill_repeatedly(tmp_path, 8)


def test_a_broken_store_is_noticed(tmp_path: Path) -> None:
    """The check is no formality: a blob that lost a byte, or is gone, is found."""
    kill_repeatedly(tmp_path, 1)
    manifest, _ = read_manifest(tmp_path, parse_name("base"))
    weights = tmp_path / "blobs" / manifest.layers[0].digest.replace(":", "-")
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    with pytest.raises(StoreBroken, match="has other bytes"):
        check(tmp_path)
    weights.unlink()
    with pytest.raises(StoreBroken, match="has no model"):
        check(tmp_path)
