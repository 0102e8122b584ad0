import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines.errors import BadRequest
from engines.store.blobs import (
    StoreNotWritable,
    StoreUnreadable,
    blob_path,
    read_bounded,
    write_atomically,
    write_blob,
)

BYE = "sha256:4c5f51faac758fecaff8db42f0b7382891a4d0c0bb885f7b86be88c814a7cc86"


def test_blobs_are_named_by_their_content(tmp_path: Path) -> None:
    """A blob gets Ollama's digest, file name and modes, and nothing else is left behind."""
    before = os.umask(0o022)
    try:
        assert write_blob(tmp_path / "models", b"Say bye!") == BYE
    finally:
        os.umask(before)
    path = blob_path(tmp_path / "models", BYE)
    assert path == tmp_path / "models/blobs" / BYE.replace(":", "-")
    assert path.read_bytes() == b"Say bye!"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o644
    assert {each.stat().st_mode & 0o777 for each in (path.parent, path.parent.parent)} == {0o755}


def test_a_blob_that_is_there_is_touched_not_written(tmp_path: Path) -> None:
    """The file stays the same and becomes young again, so that nobody prunes it."""
    path = blob_path(tmp_path, write_blob(tmp_path, b"Say bye!"))
    os.utime(path, (1000, 1000))
    inode = path.stat().st_ino
    write_blob(tmp_path, b"Say bye!")
    assert path.stat().st_ino == inode
    assert path.stat().st_mtime > 1000


def test_a_blob_of_the_wrong_size_is_replaced(tmp_path: Path) -> None:
    """Half a blob from a crash is mended by writing the blob again."""
    path = blob_path(tmp_path, write_blob(tmp_path, b"Say bye!"))
    path.write_bytes(b"Say")
    write_blob(tmp_path, b"Say bye!")
    assert path.read_bytes() == b"Say bye!"


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../etc/passwd", BYE + "0", BYE + "\n", BYE.upper()])
def test_only_digests_name_blobs(digest: str) -> None:
    """Anything else never becomes a path."""
    with pytest.raises(BadRequest, match="invalid digest format"):
        blob_path(Path("/models"), digest)


def test_reading_is_bounded(tmp_path: Path) -> None:
    """The limit itself is allowed, one byte more is not."""
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(StoreUnreadable, match="larger than 4 bytes"):
        read_bounded(path, 4)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """Opening one would wait for a writer for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing", tmp_path / "pipe/below"):
        with pytest.raises(FileNotFoundError):
            read_bounded(path, 5)


def test_failing_to_write_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A file where a directory belongs, or a directory where the file belongs, is told with its path."""
    (tmp_path / "file").write_text("")
    (tmp_path / "directory/full").mkdir(parents=True)
    for path in (tmp_path / "file/below", tmp_path / "directory"):
        with pytest.raises(StoreNotWritable, match=path.name):
            write_atomically(path, b"data")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "directory"}


def test_readers_see_the_old_or_the_new_while_a_writer_is_killed(tmp_path: Path) -> None:
    """A file that is replaced all the time by a process that is killed is whole afterwards."""
    path = tmp_path / "file"
    write_atomically(path, b"0" * 100_000)
    program = """
import sys
from pathlib import Path
from engines.store.blobs import write_atomically
print("ready", flush=True)
while True:
    for digit in b"123456789":
        write_atomically(Path(sys.argv[1]), bytes([digit]) * 100_000)
"""
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        for _ in range(200):
            data = path.read_bytes()
            assert len(data) == 100_000
            assert len(set(data)) == 1
        writer.kill()
    assert len(path.read_bytes()) == 100_000
