from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from engines.llamacpp import shelf as shelf_module
from engines.llamacpp.kvcache import Tokens
from engines.llamacpp.shelf import Disk, Shelf, fingerprint

MIB = 2**20


def tokens(*numbers: int) -> Tokens:
    """Token ids."""
    return np.array(numbers, np.int32)


def prompt(length: int, *, seed: int = 0) -> Tokens:
    """A prompt that no other begins like."""
    return np.random.default_rng(seed).integers(0, 1000, length).astype(np.int32)


def state(size: int = 1000) -> memoryview:
    """Bytes that stand for a sequence's state."""
    return memoryview(bytes(range(256)) * (size // 256 + 1))[:size]


def read(shelf: Shelf, key: str) -> bytes | None:
    """What comes back, waited for."""
    found = shelf.state(key)
    if found is not None:
        return bytes(found)
    answers: list[bytes | None] = []
    arrived = threading.Event()

    def take(state: bytes | None) -> None:
        answers.append(state)
        arrived.set()

    shelf.read(key, take)
    assert arrived.wait(10)
    if answers[0] is None:
        shelf.drop(key)
    return answers[0]


def on_disk(root: Path, name: str = "model", limit_bytes: int = MIB) -> Shelf:
    """A shelf that keeps nothing in memory."""
    return Shelf(0, Disk(root, name, limit_bytes))


def key_of(shelf: Shelf, wanted: Tokens) -> str:
    """The key of the prefix that shares most."""
    found = shelf.longest(wanted)
    assert found is not None
    return found[0]


def files(root: Path) -> list[Path]:
    """The prefixes on the disk, by whoever."""
    return sorted(root.glob("*/*.kv"))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_saved_prefix_is_found_by_what_begins_like_it(tmp_path: Path, in_memory: bool) -> None:
    """The longest common beginning counts, whichever of the two is longer."""
    shelf = Shelf(MIB) if in_memory else on_disk(tmp_path)
    saved = prompt(300)
    shelf.save(saved, state())
    longer = np.concatenate([saved, tokens(5, 6)])
    other = np.concatenate([saved[:200], tokens(-1, -2, -3)])
    assert shelf.longest(longer) == (key_of(shelf, saved), 300)
    assert shelf.longest(other) == (key_of(shelf, saved), 200)
    assert shelf.longest(prompt(300, seed=1)) is None
    assert read(shelf, key_of(shelf, saved)) == bytes(state())
    shelf.close()


def test_what_has_no_room_in_memory_goes_to_the_disk(tmp_path: Path) -> None:
    """The least recently used first; what is asked for again stays."""
    shelf = Shelf(10_000, Disk(tmp_path, "model", MIB))
    for seed in range(2):
        shelf.save(prompt(300, seed=seed), state(4000))
    assert files(tmp_path) == []
    assert shelf.state(key_of(shelf, prompt(300))) is not None
    shelf.save(prompt(300, seed=2), state(4000))
    assert shelf.state(key_of(shelf, prompt(300, seed=1))) is None
    for seed in range(3):
        assert read(shelf, key_of(shelf, prompt(300, seed=seed))) == bytes(state(4000))
    shelf.close()


def test_without_a_disk_what_has_no_room_is_forgotten() -> None:
    """And so is what is too short for a file."""
    shelf = Shelf(10_000)
    for seed in range(3):
        shelf.save(prompt(300, seed=seed), state(4000))
    assert shelf.longest(prompt(300)) is None
    assert len(shelf) == 2


def test_a_short_prefix_stays_in_memory_only(tmp_path: Path) -> None:
    """It is not worth a file."""
    shelf = Shelf(MIB, Disk(tmp_path, "model", MIB))
    shelf.save(prompt(100), state())
    assert not shelf.wants(prompt(10, seed=1)), "nor this one memory"
    shelf.close()
    assert files(tmp_path) == []


def test_a_restart_finds_what_was_saved(tmp_path: Path) -> None:
    """Closing puts everything away and waits for the writes, and the next one reads the folder."""
    first = Shelf(MIB, Disk(tmp_path, "model", MIB))
    first.save(prompt(300), state(5000))
    first.close()
    second = on_disk(tmp_path)
    assert read(second, key_of(second, prompt(300))) == bytes(state(5000))
    second.close()


def test_another_model_sees_nothing(tmp_path: Path) -> None:
    """States are valid for one fingerprint only."""
    first = on_disk(tmp_path)
    first.save(prompt(300), state())
    first.close()
    other = on_disk(tmp_path, "other")
    assert other.longest(prompt(300)) is None
    other.close()


@pytest.mark.parametrize("at", [3, 30, 2000, -1])
def test_a_damaged_file_is_ignored_and_removed(tmp_path: Path, at: int) -> None:
    """One flipped bit in header, tokens or state."""
    first = on_disk(tmp_path)
    first.save(prompt(300), state(5000))
    first.close()
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    second = on_disk(tmp_path)
    found = second.longest(prompt(300))
    assert found is None or read(second, found[0]) is None
    assert second.longest(prompt(300)) is None
    assert files(tmp_path) == []
    second.close()


def test_half_a_file_is_ignored_and_removed(tmp_path: Path) -> None:
    """As a full disk or a killed process might leave one."""
    first = on_disk(tmp_path)
    first.save(prompt(300), state(5000))
    first.close()
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    second = on_disk(tmp_path)
    assert len(second) == 0
    assert files(tmp_path) == []
    second.close()


def test_a_file_that_vanished_is_forgotten(tmp_path: Path) -> None:
    """Another worker may have needed the room."""
    shelf = on_disk(tmp_path)
    shelf.save(prompt(300), state())
    key = key_of(shelf, prompt(300))
    assert read(shelf, key) is not None
    files(tmp_path)[0].unlink()
    assert read(shelf, key) is None
    assert read(shelf, key) is None, "and asking once more does no harm"
    assert len(shelf) == 0
    shelf.close()


def test_a_longer_prefix_takes_the_place_of_its_beginning(tmp_path: Path) -> None:
    """A chat that goes on leaves one file, not one for each turn; and its beginning is not wanted again."""
    shelf = on_disk(tmp_path)
    shelf.save(prompt(400)[:300], state())
    shelf.save(prompt(400), state())
    assert not shelf.wants(prompt(400)[:350])
    assert shelf.wants(prompt(500, seed=2))
    shelf.close()
    assert len(files(tmp_path)) == 1


def test_the_least_recently_used_files_make_room(tmp_path: Path) -> None:
    """Whichever model they belong to; a hit counts as a use."""
    other = on_disk(tmp_path, "other", 16_000)
    other.save(prompt(300, seed=9), state(4000))
    other.close()
    shelf = on_disk(tmp_path, "model", 16_000)
    for seed in range(2):
        shelf.save(prompt(300, seed=seed), state(4000))
        assert read(shelf, key_of(shelf, prompt(300, seed=seed))) is not None
    shelf.save(prompt(300, seed=5), state(4000))
    assert read(shelf, key_of(shelf, prompt(300, seed=5))) is not None
    assert {path.parent.name for path in files(tmp_path)} == {"model"}
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 16_000
    shelf.close()


def test_a_full_disk_costs_the_prefix_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half-written stays."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    shelf = on_disk(tmp_path)
    monkeypatch.setattr(shelf_module, "_checksum", full)
    shelf.save(prompt(300), state())
    assert read(shelf, key_of(shelf, prompt(300))) is None
    shelf.close()
    assert len(shelf) == 0
    assert list(tmp_path.glob("*/*")) == []


def test_what_exceeds_the_limit_alone_is_not_written(tmp_path: Path) -> None:
    """And costs no other file its place."""
    shelf = on_disk(tmp_path, limit_bytes=10_000)
    shelf.save(prompt(300), state(2000))
    shelf.save(prompt(300, seed=1), state(20_000))
    shelf.close()
    assert [path.stat().st_size < 10_000 for path in files(tmp_path)] == [True]


def test_a_disk_that_is_too_slow_costs_prefixes_and_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits to be written is bounded."""
    monkeypatch.setattr(Disk, "MAX_PENDING_BYTES", -1)
    shelf = on_disk(tmp_path)
    shelf.save(prompt(300), state())
    assert len(shelf) == 0
    shelf.close()


def test_the_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    """It says what people asked."""
    on_disk(tmp_path / "prefixes").close()
    assert (tmp_path / "prefixes/model").stat().st_mode & 0o777 == 0o700


def test_a_fingerprint_depends_on_the_weights_and_the_parameters(tmp_path: Path) -> None:
    """One changed byte among the samples, or another cache type, is another model."""
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(100_000))
    names = {fingerprint([file], "f16"), fingerprint([file], "q8_0"), fingerprint([file, file], "f16")}
    file.write_bytes(bytes(99_999) + b"\1")
    assert len(names | {fingerprint([file], "f16")}) == 4
