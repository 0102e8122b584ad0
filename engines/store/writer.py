"""Everything that changes the store once blobs are there: naming, copying, deleting, and tidying up.

The order keeps the store whole whenever we are killed: a manifest is written after its blobs and deleted before them,
so what a kill can leave is blobs that nobody names, which `tidy` removes. Its surprise: the rules of what may be
deleted are Ollama's (`spec/ollama.md` section 10), because both programs may work in one directory.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from engines.errors import HeadwaterError, ModelNotFound
from engines.store.blobs import (
    StoreNotWritable,
    StoreUnreadable,
    blob_path,
    flush_directory,
    read_bounded,
    write_atomically,
)
from engines.store.holds import Holds
from engines.store.lock import store_lock
from engines.store.manifests import (
    MAX_JSON_BYTES,
    Manifest,
    adopt_spelling,
    decode_json,
    locate,
    manifest_path,
    read_manifest,
    walk,
)
from engines.store.names import ModelName

log = logging.getLogger(__name__)

GRACE_S = 3600.0
"""How old a blob that nobody names must be before it is deleted: another program may be about to name it."""

_BLOB = re.compile(r"sha256-[0-9a-f]{64}")
_OLD_BLOB = re.compile(r"sha256:[0-9a-f]{64}")
_PART = re.compile(r"-\d+\Z")
"""What is added to the name of a download's file for the notes on its parts."""
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")


class BlobMissing(HeadwaterError):
    """A manifest names a blob that is not there, or not whole."""

    code = "blob_missing"


class StoreWriter:
    """Changes the models below a directory. Every method blocks on the disk; all may run beside each other.

    Args:
        keeps_unused: leave blobs that nobody needs any more, except when a model is deleted (OLLAMA_NOPRUNE).

    Raises:
        StoreNotWritable: from every method, when the directory or the disk refuses.
    """

    def __init__(self, models: Path, *, keeps_unused: bool = False) -> None:
        self.models = models
        self.holds = Holds()
        self._keeps_unused = keeps_unused

    def commit(self, name: ModelName, data: bytes) -> bool:
        """Make a manifest of these bytes the model of that name; whether blobs of an older one were deleted.

        The name is spelled as another model spells its parts, if one does.

        Raises:
            ManifestDamaged: the bytes are no manifest. BlobMissing: not all of its blobs are there.
        """
        manifest = decode_json(data, Manifest, f"the manifest of {name.display}")
        with store_lock(self.models):
            self._require_blobs(manifest)
            path = manifest_path(self.models, adopt_spelling(self.models, name))
            replaced = _digests_in(path)
            write_atomically(path, data)
            self.holds.redeem(manifest.digests)
            return not self._keeps_unused and self._delete_unused(replaced - manifest.digests) > 0

    def copy(self, source: ModelName, destination: ModelName) -> None:
        """Give a model a second name; a model that has it already is replaced.

        Raises:
            ModelNotFound: there is no such model, or one of its blobs is missing. ManifestDamaged, StoreUnreadable.
        """
        located = locate(self.models, source)
        if located is None:
            raise ModelNotFound(source.display)
        if located == adopt_spelling(self.models, destination):
            return
        try:
            self.commit(destination, read_bounded(manifest_path(self.models, located), MAX_JSON_BYTES))
        except (FileNotFoundError, BlobMissing):
            raise ModelNotFound(source.display) from None

    def delete(self, name: ModelName) -> None:
        """Delete a model, and the blobs that no other one names.

        Raises:
            ModelNotFound: there is no such model.
        """
        with store_lock(self.models):
            located = locate(self.models, name)
            if located is None:
                raise ModelNotFound(name.display)
            path = manifest_path(self.models, located)
            digests = _digests_in(path)
            try:
                path.unlink()
                flush_directory(path.parent)
                self._remove_empty(path.parent)
            except OSError as error:
                raise StoreNotWritable(f"cannot delete {path}: {error.strerror}") from error
            self._delete_unused(digests)

    def discard(self, digests: Iterable[str]) -> None:
        """Delete blobs of a model that was never finished, unless another one names them."""
        with store_lock(self.models):
            self._delete_unused(digests)

    def tidy(self, grace_s: float = GRACE_S) -> int:
        """Delete what earlier runs, ours and Ollama's, left behind; how many files.

        Nothing is deleted while there is a manifest that cannot be read, for nobody knows what it names.
        """
        if not self.models.is_dir():
            return 0
        with store_lock(self.models):
            blobs = self.models / "blobs"
            _rename_old(blobs)
            try:
                used = _digests_in_use(self.models)
            except HeadwaterError as error:
                log.warning("blobs that nobody needs stay: %s", error.message)
                return 0
            before = time.time() - grace_s
            old = [path for path in _files(blobs) if _is_older(path, before)]
            unnamed = [path for path in old if not _BLOB.fullmatch(path.name)]
            unused = {path.name.replace("-", ":") for path in old if _BLOB.fullmatch(path.name)} - used
            num_deleted = sum(map(_unlink, unnamed)) + sum(map(self._delete_blob, unused))
            for directory in blobs.glob(".*.tmp/") if blobs.is_dir() else ():
                if _TEMPORARY.fullmatch(directory.name) and _is_older(directory, before):
                    shutil.rmtree(directory, ignore_errors=True)
            self._tidy_manifests()
            return num_deleted

    def _require_blobs(self, manifest: Manifest) -> None:
        for layer in (manifest.config, *manifest.layers):
            try:
                size = blob_path(self.models, layer.digest).stat().st_size
            except OSError:
                raise BlobMissing(f"{layer.digest} is not in the store") from None
            if size != layer.size:
                raise BlobMissing(f"{layer.digest} has {size} bytes in the store and {layer.size} in the manifest")

    def _delete_unused(self, digests: Iterable[str]) -> int:
        """Delete those that no manifest names; damaged manifests name none, as in Ollama."""
        wanted = set(digests)
        if not wanted:
            return 0
        try:
            used = _digests_in_use(self.models, skip_damaged=True)
        except StoreUnreadable as error:
            log.warning("blobs that may be in use stay: %s", error.message)
            return 0
        return sum(map(self._delete_blob, wanted - used))

    def _delete_blob(self, digest: str) -> bool:
        path = blob_path(self.models, digest)
        return self.holds.delete(digest, lambda: _unlink(path))

    def _remove_empty(self, directory: Path) -> None:
        """Remove a directory of manifests and those above it, as far as they are empty."""
        top = self.models / "manifests"
        while directory != top:
            try:
                directory.rmdir()
            except OSError:
                return
            directory = directory.parent

    def _tidy_manifests(self) -> None:
        for directory, _, files in os.walk(self.models / "manifests", topdown=False):
            for file in files:
                if _TEMPORARY.fullmatch(file):  # ours, and nobody else holds the lock
                    _unlink(Path(directory, file))
            self._remove_empty(Path(directory))


def _digests_in(path: Path) -> set[str]:
    """What a manifest names; nothing if there is none or it is damaged."""
    try:
        return decode_json(read_bounded(path, MAX_JSON_BYTES), Manifest, str(path)).digests
    except (FileNotFoundError, HeadwaterError):
        return set()


def _digests_in_use(models: Path, *, skip_damaged: bool = False) -> set[str]:
    """What all manifests name. Raises StoreUnreadable, and ManifestDamaged unless those are skipped."""
    used: set[str] = set()
    for name in walk(models):
        try:
            used |= read_manifest(models, name)[0].digests
        except FileNotFoundError:
            continue
        except StoreUnreadable:
            raise
        except HeadwaterError:
            if not skip_damaged:
                raise
    return used


def _rename_old(blobs: Path) -> None:
    """Blobs had a colon in their names once."""
    for path in _files(blobs):
        if _OLD_BLOB.fullmatch(path.name):
            try:
                path.rename(path.with_name(path.name.replace(":", "-")))
            except OSError as error:
                raise StoreNotWritable(f"cannot rename {path}: {error.strerror}") from error


def _files(directory: Path) -> Iterator[Path]:
    try:
        yield from (Path(entry.path) for entry in os.scandir(directory) if not entry.is_dir(follow_symlinks=False))
    except OSError:
        return


def _is_older(path: Path, than: float) -> bool:
    """Whether nobody has touched it since; what belongs to a download is as young as the file that it fills."""
    filled = path.with_name(_PART.sub("", path.name))
    try:
        return max(file.lstat().st_mtime for file in (path, filled) if file == path or file.exists()) < than
    except OSError:
        return False


def _unlink(path: Path) -> bool:
    """Delete a file; what cannot be deleted is told and stays."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("cannot delete %s: %s", path, error.strerror)
        return False
    return True
