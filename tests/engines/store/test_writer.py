"""Everything that changes the store: commit, copy, delete, tidy, and who may do so when."""

import hashlib
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from store_samples import OllamaDirectory, small_llama

from engines.errors import ModelNotFound
from engines.store.blob_writer import BlobWriter
from engines.store.blobs import StoreNotWritable
from engines.store.catalog import Catalog
from engines.store.gojson import encode_json
from engines.store.holds import PROMISE_S, Holds
from engines.store.lock import store_lock
from engines.store.manifests import CONFIG_TYPE, LAYER_TYPE, Layer, Manifest, ManifestDamaged
from engines.store.names import parse_name
from engines.store.writer import BlobMissing, StoreWriter

LIBRARY = "registry.ollama.ai/library"


@pytest.fixture
def directory(tmp_path: Path) -> OllamaDirectory:
    """A store as Ollama lays it out, with the models `a` and `b`, which share their weights."""
    directory = OllamaDirectory(tmp_path / "models")
    weights = small_llama()
    for name in "ab":
        layers = [directory.layer("model", weights), directory.layer("system", f"I am {name}".encode())]
        directory.model(f"{LIBRARY}/{name}/latest", layers)
    return directory


@pytest.fixture
def writer(directory: OllamaDirectory) -> StoreWriter:
    """What changes it."""
    return StoreWriter(directory.root)


def blobs(directory: OllamaDirectory) -> set[str]:
    """Names of all files where blobs are."""
    return {path.name for path in (directory.root / "blobs").iterdir()}


def blob_name(data: bytes) -> str:
    """The file of a blob."""
    return f"sha256-{hashlib.sha256(data).hexdigest()}"


def manifest_of(*texts: str) -> Manifest:
    """A manifest of texts, whose blobs need not be there."""
    layers = [Layer(f"{LAYER_TYPE}system", f"sha256:{hashlib.sha256(t.encode()).hexdigest()}", len(t)) for t in texts]
    return Manifest(config=Layer(CONFIG_TYPE, layers[0].digest, layers[0].size), layers=tuple(layers))


def test_a_manifest_whose_blobs_are_missing_is_refused(writer: StoreWriter, directory: OllamaDirectory) -> None:
    """Or have another size; nothing changes then."""
    with pytest.raises(BlobMissing):
        writer.commit(parse_name("c"), encode_json(manifest_of("nowhere")))
    directory.path_of(directory.blob(b"here")).write_bytes(b"her")
    with pytest.raises(BlobMissing, match="3 bytes in the store and 4 in the manifest"):
        writer.commit(parse_name("c"), encode_json(manifest_of("here")))
    with pytest.raises(ManifestDamaged):
        writer.commit(parse_name("c"), b"{}")
    assert not (directory.root / "manifests" / LIBRARY / "c").exists()


def test_what_a_replaced_model_alone_needed_goes(writer: StoreWriter, directory: OllamaDirectory) -> None:
    """What others share stays."""
    directory.blob(b"new")
    assert writer.commit(parse_name("a"), encode_json(manifest_of("new")))
    assert blob_name(b"I am a") not in blobs(directory)
    assert blob_name(small_llama()) in blobs(directory)


def test_noprune_keeps_what_is_replaced(directory: OllamaDirectory) -> None:
    """But not what is deleted, as in Ollama."""
    writer = StoreWriter(directory.root, keeps_unused=True)
    directory.blob(b"new")
    assert not writer.commit(parse_name("a"), encode_json(manifest_of("new")))
    assert blob_name(b"I am a") in blobs(directory)
    writer.delete(parse_name("b"))
    assert blob_name(b"I am b") not in blobs(directory)


def test_a_name_in_another_case_is_the_same_model(writer: StoreWriter, directory: OllamaDirectory) -> None:
    """Each part is spelled as a model that is there spells it."""
    directory.blob(b"new")
    writer.commit(parse_name("LIBRARY/A:LATEST"), encode_json(manifest_of("new")))
    assert sorted(path.name for path in (directory.root / "manifests" / LIBRARY).iterdir()) == ["a", "b"]
    writer.copy(parse_name("B"), parse_name("New:LATEST"))
    assert (directory.root / "manifests" / LIBRARY / "New" / "latest").is_file()


def test_a_copy_is_the_same_to_the_byte(writer: StoreWriter, directory: OllamaDirectory) -> None:
    """With a time of its own; onto itself nothing happens, onto another it replaces that one."""
    source = directory.root / "manifests" / LIBRARY / "a" / "latest"
    os.utime(source, (1, 1))
    writer.copy(parse_name("a"), parse_name("ns/c:t"))
    copy = directory.root / "manifests" / "registry.ollama.ai" / "ns" / "c" / "t"
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_mtime > time.time() - 60
    writer.copy(parse_name("a"), parse_name("A"))
    assert source.stat().st_mtime == 1
    writer.copy(parse_name("a"), parse_name("b"))
    assert blob_name(b"I am b") not in blobs(directory)
    with pytest.raises(ModelNotFound):
        writer.copy(parse_name("nobody"), parse_name("x"))


def test_a_deleted_model_takes_its_own_blobs_and_folders_along(writer: StoreWriter, directory: OllamaDirectory) -> None:
    """Shared blobs stay until the last of those who share them is gone."""
    writer.copy(parse_name("a"), parse_name("host.org/ns/deep:tag"))
    writer.delete(parse_name("host.org/NS/deep:tag"))
    assert not (directory.root / "manifests" / "host.org").exists()
    assert blob_name(b"I am a") in blobs(directory)
    writer.delete(parse_name("a"))
    assert blob_name(b"I am a") not in blobs(directory)
    assert blob_name(small_llama()) in blobs(directory)
    writer.delete(parse_name("b"))
    assert blobs(directory) == set()
    with pytest.raises(ModelNotFound):
        writer.delete(parse_name("b"))


def test_a_damaged_model_can_be_deleted(writer: StoreWriter, directory: OllamaDirectory) -> None:
    """Though nobody knows what it named."""
    path = directory.raw_manifest(f"{LIBRARY}/bad/latest", b"{")
    writer.delete(parse_name("bad"))
    assert not path.exists()


def test_a_huge_manifest_protects_every_blob(writer: StoreWriter, directory: OllamaDirectory) -> None:
    """It is never read whole, and what it may name is not deleted."""
    path = directory.raw_manifest(f"{LIBRARY}/huge/latest", b"")
    with path.open("wb") as file:
        file.truncate(100 << 20)
    writer.delete(parse_name("a"))
    assert blob_name(b"I am a") in blobs(directory)
    assert writer.tidy(grace_s=0) == 0
    assert [card.name for card in Catalog(directory.root).list()] == ["b:latest"]
    writer.delete(parse_name("huge"))
    assert writer.tidy(grace_s=0) > 0
    assert blob_name(b"I am a") not in blobs(directory)


def test_held_blobs_stay(writer: StoreWriter, directory: OllamaDirectory) -> None:
    """Whoever makes a model of them can rely on it, although the last model that names them goes."""
    digest = directory.blob(b"I am a")
    with writer.holds.holding() as hold:
        hold.add(digest)
        writer.delete(parse_name("a"))
        assert blob_name(b"I am a") in blobs(directory)
    writer.discard([digest])
    assert blob_name(b"I am a") not in blobs(directory)


def test_a_promised_blob_stays_for_an_hour() -> None:
    """Or until a manifest names it."""
    now = 0.0
    holds = Holds(lambda: now)
    deleted: list[str] = []

    def delete(digest: str) -> Callable[[], bool]:
        def do() -> bool:
            deleted.append(digest)
            return True

        return do

    holds.promise("a")
    holds.promise("b")
    assert not holds.delete("a", delete("a"))
    holds.redeem(["a"])
    assert holds.delete("a", delete("a"))
    now = PROMISE_S + 1
    assert holds.delete("b", delete("b"))
    assert deleted == ["a", "b"]


def test_tidy_follows_ollamas_rules(writer: StoreWriter, directory: OllamaDirectory) -> None:
    """Old blobs that nobody names and old files that are none go; young ones, and what is named, stay."""
    root = directory.root / "blobs"
    old = ["sha256-" + "0" * 64, "sha256-123456", ".0123.tmp", "sha256-" + "1" * 64 + "-partial"]
    young = ["sha256-" + "2" * 64, "sha256-" + "3" * 64 + "-partial", "sha256-" + "3" * 64 + "-partial-0"]
    for name in (*old, *young):
        (root / name).write_bytes(b"x")
    (root / ("." + "a" * 32 + ".tmp")).mkdir()
    for name in (*old, young[-1], *blobs(directory) & {blob_name(b"I am a")}, "." + "a" * 32 + ".tmp"):
        os.utime(root / name, (1, 1))
    legacy = root / f"sha256:{hashlib.sha256(b'I am a').hexdigest()}"
    (root / blob_name(b"I am a")).rename(legacy)
    (directory.root / "manifests" / "empty" / "below").mkdir(parents=True)
    (directory.root / "manifests" / LIBRARY / "a" / f".{'b' * 32}.tmp").write_bytes(b"")
    before = blobs(directory)
    assert writer.tidy() == len(old)
    assert blobs(directory) == before - {*old, legacy.name, f".{'a' * 32}.tmp"} | {blob_name(b"I am a")}
    assert not (directory.root / "manifests" / "empty").exists()
    assert [path.name for path in (directory.root / "manifests" / LIBRARY / "a").iterdir()] == ["latest"]


def test_tidy_touches_nothing_beside_a_damaged_manifest(writer: StoreWriter, directory: OllamaDirectory) -> None:
    """Nor where there is no store at all."""
    directory.raw_manifest(f"{LIBRARY}/bad/latest", b"{")
    directory.blob(b"nobody's")
    assert writer.tidy(grace_s=0) == 0
    assert StoreWriter(directory.root / "nowhere").tidy() == 0
    assert not (directory.root / "nowhere").exists()


def test_nothing_outside_the_store_is_touched(writer: StoreWriter, directory: OllamaDirectory, tmp_path: Path) -> None:
    """A blob that is a link elsewhere loses the link only, and names and digests lead nowhere else."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"I am a")
    (directory.root / "blobs" / blob_name(b"I am a")).unlink()
    (directory.root / "blobs" / blob_name(b"I am a")).symlink_to(outside)
    writer.delete(parse_name("a"))
    assert outside.read_bytes() == b"I am a"
    assert blob_name(b"I am a") not in blobs(directory)
    directory.raw_manifest(f"{LIBRARY}/evil/latest", encode_json(manifest_of("x")).replace(b"sha256:", b"sha256:../"))
    writer.delete(parse_name("evil"))


def test_two_writers_take_turns(directory: OllamaDirectory) -> None:
    """In another process too; who waits too long is told."""
    with store_lock(directory.root):
        context = multiprocessing.get_context("spawn")
        other = context.Process(target=try_lock, args=(directory.root,))
        other.start()
        other.join(20)
        assert other.exitcode == 7
        with pytest.raises(StoreNotWritable, match="another program"), store_lock(directory.root, wait_s=0.05):
            pass
    with store_lock(directory.root, wait_s=0):
        pass


def try_lock(models: Path) -> None:
    """Exit with 7 if somebody else holds the lock."""
    try:
        with store_lock(models, wait_s=0.05):
            pass
    except StoreNotWritable:
        raise SystemExit(7) from None


def test_many_threads_leave_the_store_whole(writer: StoreWriter, directory: OllamaDirectory) -> None:
    """Copies and deletions of the same names at once: each model is there or not, and no blob of one is missing."""

    def work(number: int) -> None:
        for turn in range(20):
            try:
                if (turn + number) % 3:
                    writer.copy(parse_name("a"), parse_name(f"x{turn % 2}"))
                else:
                    writer.delete(parse_name(f"x{turn % 2}"))
            except ModelNotFound:
                pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {card.name for card in Catalog(directory.root).list()}
    assert {"a:latest", "b:latest"} <= names <= {"a:latest", "b:latest", "x0:latest", "x1:latest"}


@pytest.mark.parametrize("size", [0, 1, 10_000_000])
def test_a_blob_is_visible_once_it_is_whole(tmp_path: Path, size: int) -> None:
    """Under the digest of its bytes, however they came; before that nothing is."""
    data = os.urandom(size)
    with BlobWriter(tmp_path) as writer:
        for start in range(0, size, 3_000_000):
            writer.write(data[start : start + 3_000_000])
            assert [path.suffix for path in (tmp_path / "blobs").iterdir()] == [".tmp"]
        assert writer.publish()
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [blob_name(data)]
    with BlobWriter(tmp_path) as again:
        again.write(data)
        assert not again.publish()


def test_an_abandoned_blob_leaves_nothing(tmp_path: Path) -> None:
    """Whatever happened."""

    def give_up() -> None:
        with BlobWriter(tmp_path) as writer:
            writer.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        give_up()
    assert list((tmp_path / "blobs").iterdir()) == []


def test_a_blob_cut_short_is_replaced(tmp_path: Path) -> None:
    """A file that lies about its content by its length does not pass for the blob."""
    directory = OllamaDirectory(tmp_path)
    directory.path_of(directory.blob(b"whole")).write_bytes(b"who")
    with BlobWriter(tmp_path) as writer:
        writer.write(b"whole")
        assert writer.publish()
    assert (tmp_path / "blobs" / blob_name(b"whole")).read_bytes() == b"whole"


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """Is told in so many words, and what was written goes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with BlobWriter(tmp_path) as writer, pytest.raises(StoreNotWritable, match="File too large"):
            writer.write(bytes(1 << 21))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "blobs").iterdir()) == []
