"""Blobs in the hands of somebody who makes a model: kept from being deleted, written, rewritten.

Every blob is held before it is looked for or made visible, so that whoever deletes a model meanwhile leaves it alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from engines.errors import BadRequest
from engines.library import Progress
from engines.store.blob_writer import BlobWriter
from engines.store.blobs import StoreNotWritable, blob_path, write_blob
from engines.store.gguf import GGUFHeader, read_header
from engines.store.holds import Hold
from engines.store.manifests import LAYER_TYPE, Layer

Report = Callable[[Progress], None]
"""Takes in how far the work is. Raises Cancelled when nobody wants it any more."""

Rewrite = Callable[[Path, Path, str, Callable[[float], None]], None]
"""Writes the weights of one file to another as a type such as `Q4_K_M`, or merges parts with `COPY`."""

REWRITING_DIGEST = "0" * 19
"""What stands for the digest, not yet known, of weights that are being rewritten."""

COPY = "COPY"


@dataclass(frozen=True, slots=True)
class Piece:
    """A layer of the model to be: what is told of it at the end, its header if it is a GGUF, and what it was made of.

    `parts` are the layers of a split model in order, each with the name of its file, until it is rewritten as one.
    """

    layer: Layer
    status: str
    header: GGUFHeader | None = None
    parts: tuple[Layer, ...] = ()


class Workbench:
    """Makes pieces out of blobs and bytes.

    Args:
        made: takes in the digests of blobs that were not there before.

    Raises:
        StoreNotWritable: from every method, when the directory or the disk refuses.
    """

    def __init__(self, models: Path, hold: Hold, report: Report, rewrite: Rewrite, made: set[str]) -> None:
        self._models = models
        self._hold = hold
        self._made = made
        self.report = report
        self._rewrite = rewrite

    def new(self, kind: str, data: bytes, media_type: str = "") -> Piece:
        """A layer of these bytes."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self._hold.add(digest)
        is_new = not blob_path(self._models, digest).exists()
        write_blob(self._models, data)
        return Piece(Layer(media_type or f"{LAYER_TYPE}{kind}", digest, len(data)), self._status(digest, is_new))

    def reuse(self, digest: str, media_type: str, source: str, name: str = "") -> Piece:
        """A layer of a blob that is there, as large as it is, whatever anybody says.

        Raises:
            BadRequest: it is not there, or the text is no digest.
        """
        digest = digest.replace("-", ":", 1).lower()
        path = blob_path(self._models, digest)
        self._hold.add(digest)
        try:
            size = path.stat().st_size
        except OSError:
            raise BadRequest(f'blob "{digest}" not found') from None
        with suppress(OSError):  # another user's
            os.utime(path)  # an Ollama that shares the directory looks at the age of what no manifest names
        return Piece(Layer(media_type, digest, size, source, name), f"using existing layer {digest}")

    def open(self, piece: Piece) -> Piece:
        """The piece with its GGUF header. Raises GGUFParseError."""
        return dataclasses.replace(piece, header=read_header(blob_path(self._models, piece.layer.digest), arrays=False))

    def magic(self, digest: str) -> bytes:
        """The first four bytes of a blob; nothing when it is not there."""
        try:
            with blob_path(self._models, digest.replace("-", ":", 1).lower()).open("rb") as file:
                return file.read(4)
        except OSError:
            return b""

    def rewrite(self, piece: Piece, kind: str, status: str) -> Piece:
        """The piece's weights as another type, with their new header; `status` is told meanwhile.

        Raises:
            GGUFParseError: what came out is damaged. Whatever the rewriting raises.
        """
        total = piece.layer.size

        def tell(share: float) -> None:
            self.report(Progress(status, REWRITING_DIGEST, total, int(share * total)))

        with self._source(piece) as source, BlobWriter(self._models) as writer:
            self._rewrite(source, writer.path, kind, tell)
            tell(1.0)
            self.report(Progress("verifying conversion"))
            writer.take_in(lambda done, total: self.report(Progress("verifying conversion")))
            header = read_header(writer.path, arrays=False)
            self._hold.add(writer.digest)
            status = self._status(writer.digest, writer.publish())
            layer = Layer(piece.layer.media_type, writer.digest, writer.size_bytes)
        return Piece(layer, status, header)

    def _status(self, digest: str, is_new: bool) -> str:
        if is_new:
            self._made.add(digest)
        return f"{'creating new layer' if is_new else 'using existing layer'} {digest}"

    @contextmanager
    def _source(self, piece: Piece) -> Iterator[Path]:
        """The file to rewrite. Parts of a split model get the names that llama.cpp looks for, in a directory."""
        if not piece.parts:
            yield blob_path(self._models, piece.layer.digest)
            return
        directory = self._models / "blobs" / f".{secrets.token_hex(16)}.tmp"
        try:
            directory.mkdir()
            yield _link(directory, [(layer.source, blob_path(self._models, layer.digest)) for layer in piece.parts])
        except OSError as error:
            raise StoreNotWritable(f"cannot write {directory}: {error.strerror}") from error
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _link(directory: Path, files: Sequence[tuple[str, Path]]) -> Path:
    links = []
    for name, target in files:
        links.append(directory / PurePosixPath(name).name)
        links[-1].symlink_to(target)
    return links[0]
