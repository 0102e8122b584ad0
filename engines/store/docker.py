"""Docker Model Runner's store, only ever read, as a place where models come from (`spec/model-runner.md` section 15).

`models.json` lists models by their tags; each has an OCI manifest, whose layers say by their media types what they are.
Its writers replace that file whole but know no lock, so nothing here ever writes. Models of safetensors and parts that
are still incomplete are left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engines.errors import HeadwaterError
from engines.model import ModelCard
from engines.request import JSON
from engines.store.blobs import DIGEST_PATTERN, StoreUnreadable, read_bounded
from engines.store.cards import FileState, InstalledModel, header_of, with_facts
from engines.store.gguf import merge_parts
from engines.store.manifests import BLANK_CONFIG, MAX_JSON_BYTES, Digest, Layer, Manifest, ManifestDamaged, decode_json

MAX_TEXT_BYTES = 4 << 20

_ID = re.compile(r"(?:sha256:)?([0-9a-f]{64}|[0-9a-f]{12})")
_FILE_PATH = "org.cncf.model.filepath"
_DEFAULT_REGISTRY = "docker.io"
_HUGGING_FACE = "huggingface.co"


class _Entry(msgspec.Struct):
    id: Digest
    tags: list[str] = []


class _Models(msgspec.Struct):
    models: list[_Entry] = []


class _Path(msgspec.Struct):
    annotations: dict[str, JSON] = {}


class _Paths(msgspec.Struct):
    layers: list[_Path] = []


@dataclass(frozen=True, slots=True)
class Tagged:
    """One name of one model: the whole reference, and the model's id."""

    reference: str
    id: str


class DockerStore:
    """The store below `root`, which need not exist."""

    is_writable = False

    def __init__(self, root: Path) -> None:
        self.title = f"Docker Model Runner's store {root}"
        self._root = root

    def walk(self) -> Iterator[Tagged]:
        """See `providers.Provider`."""
        for entry in self._entries():
            for tag in entry.tags:
                yield Tagged(parse_reference(tag), entry.id)

    def locate(self, name: str) -> Tagged | None:
        """By any form of the reference, or by the model's id, whole or its first 12 digits."""
        wanted, tagged = name.strip(), list(self.walk())
        if as_id := _ID.fullmatch(wanted):
            return next((each for each in tagged if each.id.startswith(f"sha256:{as_id[1]}")), None)
        reference = parse_reference(wanted)
        return next((each for each in tagged if each.reference == reference), None)

    def read(self, key: Tagged) -> InstalledModel:
        """See `providers.Provider`."""
        manifest_file = FileState.of(self._root / "manifests" / "sha256" / key.id.removeprefix("sha256:"))
        data = read_bounded(manifest_file.path, MAX_JSON_BYTES)
        if hashlib.sha256(data).hexdigest() != key.id.removeprefix("sha256:"):
            raise ManifestDamaged(f"the manifest of {key.reference} has another digest")
        manifest = decode_json(data, Manifest, f"the manifest of {key.reference}")
        weights, projectors = list[FileState](), list[FileState]()
        for layer, kind in zip(manifest.layers, _kinds(manifest, data, key.reference), strict=True):
            if kind in ("model", "projector"):
                (weights if kind == "model" else projectors).append(FileState.of(self._blob(layer.digest)))
        if not weights:
            raise FileNotFoundError(f"{key.reference} has no GGUF")
        name = display(key.reference)
        card = ModelCard(
            name=name,
            full_name=key.reference,
            namespace=name.rpartition("/")[0].rpartition("/")[2],
            digest=key.id.removeprefix("sha256:"),
            weights=weights[0].path,
            weights_digest=f"sha256:{weights[0].path.name}",
            size_bytes=manifest.size_bytes,
            modified_at=manifest_file.mtime_ns / 1e9,
            weight_parts=tuple(file.path for file in weights) if len(weights) > 1 else (),
            projectors=tuple(file.path for file in projectors),
            licenses=tuple(self._text(layer) for layer in manifest.of_kind("license")),
        )
        headers = [header for file in weights if (header := header_of(file)) is not None]
        header = merge_parts(headers) if len(headers) == len(weights) else None
        card = with_facts(card, BLANK_CONFIG, header)
        if templates := manifest.of_kind("chat_template"):
            card = dataclasses.replace(card, chat_template=self._text(templates[-1]))
        return InstalledModel(card, (manifest_file, *weights, *projectors))

    def weights(self, digest: str) -> Path | None:
        """See `providers.Provider`."""
        path = self._blob(digest)
        return path if path.is_file() else None

    def _entries(self) -> list[_Entry]:
        try:
            data = read_bounded(self._root / "models.json", MAX_JSON_BYTES)
            return decode_json(data, _Models, "models.json").models
        except (FileNotFoundError, HeadwaterError):
            return []

    def _blob(self, digest: str) -> Path:
        if not re.match(DIGEST_PATTERN, digest):
            raise StoreUnreadable(f"{digest[:80]!r} is no digest")
        return self._root / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def _text(self, layer: Layer) -> str:
        return read_bounded(self._blob(layer.digest), MAX_TEXT_BYTES).decode(errors="replace")


def parse_reference(text: str) -> str:
    """A reference with nothing left out: `docker.io/ai/smollm2:latest`, whatever was written for it."""
    rest, tag = text.strip(), "latest"
    if rest.rfind(":") > rest.rfind("/"):
        rest, _, tag = rest.rpartition(":")
    rest = rest.lower()
    first, slash, path = rest.partition("/")
    if not slash:
        return f"{_DEFAULT_REGISTRY}/ai/{rest}:{tag}"
    if first == "hf.co":
        first = _HUGGING_FACE
    if "." in first:
        return f"{first}/{path}:{tag}"
    return f"{_DEFAULT_REGISTRY}/{rest}:{tag}"


def display(reference: str) -> str:
    """The reference as it is shown; what it is looked for by gives the same model."""
    return reference.removeprefix(f"{_DEFAULT_REGISTRY}/").replace(f"{_HUGGING_FACE}/", "hf.co/", 1)


def _kinds(manifest: Manifest, data: bytes, reference: str) -> list[str]:
    """What each layer is for; where a file's name is told, it decides which weights are a GGUF or a projector."""
    paths = decode_json(data, _Paths, f"the manifest of {reference}").layers
    return [_kind(layer, told.annotations.get(_FILE_PATH)) for layer, told in zip(manifest.layers, paths, strict=True)]


def _kind(layer: Layer, path: JSON) -> str:
    if layer.kind != "model" or not isinstance(path, str) or not path:
        return layer.kind
    name = path.rpartition("/")[2].lower()
    if not name.endswith(".gguf"):
        return "file"
    return "projector" if "mmproj" in name else "model"
