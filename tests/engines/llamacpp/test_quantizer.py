"""Weights rewritten by llama.cpp in a process of its own, from the parent's side."""

import os
import subprocess
import sys
import time
from pathlib import Path

import gguf
import psutil
import pytest
from random_models import Shape, write_model

from engines.errors import Cancelled
from engines.library import CreateRequest, Progress
from engines.llamacpp.quantizer import QuantizeFailed, rewrite
from engines.store.blob_writer import BlobWriter
from engines.store.catalog import Catalog
from engines.store.create import Creator
from engines.store.gguf import read_header
from engines.store.writer import StoreWriter

SMALL = Shape("llama", num_layers=2, num_vocab=1024)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in half precision."""
    return write_model(SMALL, tmp_path_factory.mktemp("half") / "half.gguf")


def children() -> list[psutil.Process]:
    """Our child processes that quantize."""
    return [child for child in psutil.Process().children() if "engines.llamacpp.quantize" in child.cmdline()]


def test_a_model_is_quantized(half: Path, tmp_path: Path) -> None:
    """The result is smaller, says what it is, and progress never goes back."""
    shares: list[float] = []
    rewrite(half, tmp_path / "out.gguf", "Q4_K_M", shares.append)
    before, after = read_header(half), read_header(tmp_path / "out.gguf")
    assert (before.file_type, after.file_type) == ("F16", "Q4_K_M")
    assert after.num_parameters == before.num_parameters
    assert after.data_bytes < before.data_bytes / 2
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)
    assert children() == []


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """With llama.cpp's own words, and no process left."""
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(QuantizeFailed, match="could not write Q8_0"):
        rewrite(tmp_path / "bad.gguf", tmp_path / "out.gguf", "Q8_0", lambda share: None)
    assert children() == []


def test_whoever_is_not_interested_any_more_ends_it(half: Path, tmp_path: Path) -> None:
    """What the listener raises comes out, and the process is gone."""

    def leave(share: float) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        rewrite(half, tmp_path / "out.gguf", "Q4_K_M", leave)
    assert children() == []


def test_it_ends_with_its_parent(half: Path, tmp_path: Path) -> None:
    """When whoever started it is killed, its standard input closes."""
    os.mkfifo(tmp_path / "never")  # opening it blocks, as a disk that hangs does
    command = [sys.executable, "-m", "engines.llamacpp.quantize", str(tmp_path / "never"), str(tmp_path / "o"), "Q8_0"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert child.stdin is not None
    time.sleep(0.1)
    child.stdin.close()
    assert child.wait(20) == 1


def test_create_quantizes(half: Path, tmp_path: Path) -> None:
    """Through the store: told in Ollama's words, with the right config, and a failure leaves nothing."""
    writer = StoreWriter(tmp_path)
    creator = Creator(writer, rewrite=rewrite, check_template=lambda text: None)
    with BlobWriter(tmp_path) as blob:
        blob.write(half.read_bytes())
        blob.publish()
    request = CreateRequest(name="small", files={"half.gguf": blob.digest}, quantize="q4_K_M")
    said: list[Progress] = []
    creator.run(request, said.append)
    quantizing = [each for each in said if each.status == "quantizing F16 model to Q4_K_M"]
    assert {each.digest for each in quantizing} == {"0" * 19}
    assert {each.total_bytes for each in quantizing} == {half.stat().st_size}
    assert quantizing[-1].completed_bytes == half.stat().st_size
    assert "verifying conversion" in [each.status for each in said]
    assert said[-1] == Progress("success")
    card = Catalog(tmp_path).find("small")
    assert (card.quantization, card.weights_digest != blob.digest) == ("Q4_K_M", True)

    before = sorted(path.name for path in (tmp_path / "blobs").iterdir())

    def leave(progress: Progress) -> None:
        if progress.status == "verifying conversion":
            raise Cancelled

    with pytest.raises(Cancelled):
        creator.run(CreateRequest(name="other", files={"half.gguf": blob.digest}, quantize="q8_0"), leave)
    assert sorted(path.name for path in (tmp_path / "blobs").iterdir()) == before


def write_part(whole: gguf.GGUFReader, path: Path, number: int, count: int) -> None:
    """One part of a split model, as llama.cpp's own splitter writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    for field in whole.fields.values() if number == 0 else ():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    writer.add_int32("split.tensors.count", len(whole.tensors))
    share = len(whole.tensors) // count + 1
    for tensor in whole.tensors[number * share : (number + 1) * share]:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_create_merges_what_is_split(half: Path, tmp_path: Path) -> None:
    """Parts of uploaded models become one file with every tensor, which Ollama could go on with."""
    whole, files = gguf.GGUFReader(half), {}
    for number in range(3):
        part = tmp_path / f"m-{number + 1:05}-of-00003.gguf"
        write_part(whole, part, number, 3)
        with BlobWriter(tmp_path) as blob:
            blob.write(part.read_bytes())
            blob.publish()
        files[f"sub/{part.name}"] = blob.digest
    creator = Creator(StoreWriter(tmp_path), rewrite=rewrite, check_template=lambda text: None)
    creator.run(CreateRequest(name="whole", files=files), lambda progress: None)
    card = Catalog(tmp_path).find("whole")
    merged = read_header(card.weights)
    assert {tensor.name for tensor in merged.tensors} == {tensor.name for tensor in whole.tensors}
    assert (card.weight_parts, merged.num_parameters) == ((), read_header(half).num_parameters)
