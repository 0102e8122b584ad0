import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from store_samples import OllamaDirectory

from engines.store.blobs import StoreNotWritable
from engines.store.catalog import Catalog
from engines.store.manifests import walk
from engines.store.seed import seed_demo


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models directory that does not exist yet."""
    return tmp_path / "deep/models"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A marker file that does not exist yet."""
    return tmp_path / "state/seeded"


def test_an_empty_store_gets_the_demo(models: Path, marker: Path) -> None:
    """It is a whole model, described as Ollama would describe it."""
    assert seed_demo(models, marker) is True
    (card,) = Catalog(models).list()
    assert (card.name, card.format, card.family, card.families) == ("demo:latest", "gguf", "llama", ("llama",))
    assert (card.parameter_size, card.quantization, card.context_length) == ("2.74M", "Q8_0", 4096)
    assert card.capabilities == ("completion", "tools", "insert", "thinking")
    assert card.weights.stat().st_size == 2984736
    assert Catalog(models).describe("demo").num_parameters == 2742720
    manifest = json.loads((models / "manifests/registry.ollama.ai/library/demo/latest").read_text())
    config = (models / "blobs" / manifest["config"]["digest"].replace(":", "-")).read_text()
    assert config == (
        '{"model_format":"gguf","model_family":"llama","model_families":["llama"],"model_type":"2.74M",'
        '"file_type":"Q8_0","architecture":"amd64","os":"linux"}\n'
    )


def test_the_demo_stays_deleted(models: Path, marker: Path) -> None:
    """A directory is seeded once, whatever happens to the demo later."""
    seed_demo(models, marker)
    assert seed_demo(models, marker) is False
    shutil.rmtree(models)
    assert seed_demo(models, marker) is False
    assert not models.exists()


def test_each_directory_is_seeded_for_itself(models: Path, marker: Path, tmp_path: Path) -> None:
    """One marker serves several stores, and another path to the same one counts as the same."""
    assert seed_demo(models, marker)
    assert seed_demo(tmp_path / "other", marker)
    (tmp_path / "link").symlink_to(models)
    assert not seed_demo(tmp_path / "link", marker)
    assert marker.read_text().splitlines() == [str(models), str(tmp_path / "other")]


def test_a_store_with_models_is_left_alone(models: Path, marker: Path) -> None:
    """Even a damaged model makes it somebody's store."""
    OllamaDirectory(models).raw_manifest("registry.ollama.ai/library/mine/latest", b"")
    assert seed_demo(models, marker) is False
    assert [name.display for name in walk(models)] == ["mine:latest"]


def test_killed_before_the_manifest_the_next_start_seeds(models: Path, marker: Path) -> None:
    """Blobs without a manifest are no model, and are used again."""
    seed_demo(models, marker)
    shutil.rmtree(models / "manifests")
    marker.write_text("")
    assert seed_demo(models, marker) is True
    assert len(list((models / "blobs").iterdir())) == 2


def test_killed_before_the_marker_the_next_start_records(models: Path, marker: Path) -> None:
    """Otherwise the demo would come back after it was deleted."""
    seed_demo(models, marker)
    marker.unlink()
    assert seed_demo(models, marker) is False
    shutil.rmtree(models)
    assert seed_demo(models, marker) is False


def test_a_torn_marker_line_does_not_spoil_the_next(models: Path, marker: Path) -> None:
    """What a power cut left of a line stays a line of its own."""
    marker.parent.mkdir()
    marker.write_text(str(models)[:-3])
    assert seed_demo(models, marker) is True
    assert seed_demo(models, marker) is False


@pytest.mark.parametrize("blocked", ["models", "marker"])
def test_a_place_that_cannot_be_written_is_a_clear_error(models: Path, marker: Path, blocked: str) -> None:
    """The error names the path, and nothing is half recorded."""
    path = {"models": models, "marker": marker}[blocked]
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    path.parent.write_text("a file where a directory belongs")
    with pytest.raises(StoreNotWritable, match=str(path)):
        seed_demo(models, marker)
    assert not marker.is_file() or marker.read_bytes() == b""
    path.parent.unlink()
    assert seed_demo(models, marker) is True


def test_servers_that_start_at_once_agree(models: Path, marker: Path) -> None:
    """Several processes seed the same directory at the same time and leave one whole demo."""
    program = (
        "import sys; from pathlib import Path; from engines.store.seed import seed_demo; sys.stdin.read();"
        "seed_demo(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, str(models), str(marker)]
    servers = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(4)]
    for server in servers:
        assert server.stdin is not None
        server.stdin.close()
    assert [server.wait() for server in servers] == [0] * 4
    assert [card.name for card in Catalog(models).list()] == ["demo:latest"]
    assert len(list((models / "blobs").iterdir())) == 2
    assert set(marker.read_text().splitlines()) == {str(models)}
