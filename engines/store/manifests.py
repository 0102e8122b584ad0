"""Manifests: which blobs make up a model, under `manifests/<host>/<namespace>/<model>/<tag>`.

The form is Ollama's to the byte (`spec/ollama.md` section 10), so that digests agree and both programs can share a
directory. Reading is lenient where Go's decoder is: unknown keys are ignored and null means "not said".
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from engines.errors import HeadwaterError, InvalidModelName
from engines.request import JSON
from engines.store.blobs import DIGEST_PATTERN, blob_path, read_bounded, write_atomically
from engines.store.gojson import encode_json
from engines.store.names import ModelName

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
OCI_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
LAYER_TYPE = "application/vnd.ollama.image."
"""A layer's media type is this and its kind: model, projector, adapter, template, system, params, license, ..."""

_KINDS = {
    f"{LAYER_TYPE}prompt": "template",
    "application/vnd.docker.ai.gguf.v3": "model",
    "application/vnd.docker.ai.mmproj": "projector",
    "application/vnd.docker.ai.license": "license",
    "application/vnd.docker.ai.chat.template.jinja": "chat_template",
    "application/vnd.cncf.model.weight.v1.raw": "model",
    "application/vnd.cncf.model.weight.v1.gguf": "model",
}
"""Kinds that are not the media type's last word: Ollama's old one, Docker's and ModelPack's."""

MAX_JSON_BYTES = 4 << 20
"""Of a manifest or a config. A safetensors model of several thousand tensors has a manifest of about 1 MB."""

Digest = Annotated[str, msgspec.Meta(pattern=DIGEST_PATTERN)]
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]  # bounded, so that a sum of sizes still fits 64 bits
_T = TypeVar("_T")


class ManifestDamaged(HeadwaterError):
    """A manifest, or one of the JSON blobs it names, is not what it should be."""

    code = "manifest_damaged"


class Layer(msgspec.Struct, frozen=True, omit_defaults=True, rename={"media_type": "mediaType", "source": "from"}):
    """One blob of a model. `source` is the model or file it came from, `name` a tensor's or file's name."""

    media_type: str
    digest: Digest
    size: Size
    source: str = ""
    name: str = ""

    @property
    def kind(self) -> str:
        """What the blob is for; the whole media type when that is nothing we know."""
        return _KINDS.get(self.media_type) or self.media_type.removeprefix(LAYER_TYPE)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """All blobs of one model."""

    schema_version: int = 2
    media_type: str = MANIFEST_TYPE
    config: Layer
    layers: tuple[Layer, ...] = ()

    @property
    def size_bytes(self) -> int:
        """All layers and the config, as declared."""
        return self.config.size + sum(layer.size for layer in self.layers)

    @property
    def digests(self) -> set[str]:
        """Of all blobs."""
        return {self.config.digest, *(layer.digest for layer in self.layers)}

    def of_kind(self, kind: str) -> list[Layer]:
        """The layers of that kind in order; where a model can have but one, the last counts."""
        return [layer for layer in self.layers if layer.kind == kind]


class DraftConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a model's config says of the draft model that comes with it."""

    model_format: str = ""
    architecture: str = ""
    tensor_prefix: str = ""
    config: dict[str, Any] = {}


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The config blob. Fields without a default are always written; `model_type` is the parameter size for people."""

    model_format: str
    model_family: str
    model_families: tuple[str, ...] | None
    model_type: str
    file_type: str
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    remote_host: str = ""
    remote_model: str = ""
    capabilities: tuple[str, ...] = ()
    context_length: Size = 0
    embedding_length: Size = 0
    base_name: str = ""
    draft: DraftConfig | None = None
    architecture: str
    os: str


_BLANK_CONFIG: Mapping[str, JSON] = {
    "model_format": "",
    "model_family": "",
    "model_families": None,
    "model_type": "",
    "file_type": "",
    "architecture": "",
    "os": "",
}


BLANK_CONFIG = ModelConfig(**_BLANK_CONFIG)
"""The config of a model of which nothing is said."""


def manifest_path(models: Path, name: ModelName) -> Path:
    """Where the manifest of that name belongs, in exactly that spelling."""
    return models.joinpath("manifests", *name.parts)


def read_manifest(models: Path, name: ModelName) -> tuple[Manifest, str]:
    """The manifest and its digest: 64 hex digits, the SHA-256 of the file's bytes.

    Raises:
        FileNotFoundError: there is none.
        ManifestDamaged, StoreUnreadable: it is no manifest, or cannot be read.
    """
    data = read_bounded(manifest_path(models, name), MAX_JSON_BYTES)
    manifest = decode_json(data, Manifest, f"the manifest of {name.display}")
    return manifest, hashlib.sha256(data).hexdigest()


def read_config(models: Path, manifest: Manifest) -> ModelConfig:
    """The manifest's config blob. Raises as `read_manifest` does."""
    data = read_bounded(blob_path(models, manifest.config.digest), MAX_JSON_BYTES)
    return decode_json(data, ModelConfig, f"the config {manifest.config.digest}", _BLANK_CONFIG)


def write_manifest(models: Path, name: ModelName, manifest: Manifest) -> str:
    """Write or replace a manifest, whose blobs must be there already, and return its digest.

    Raises:
        StoreNotWritable: the directory or the disk refuses.
    """
    data = encode_json(manifest)
    write_atomically(manifest_path(models, name), data)
    return hashlib.sha256(data).hexdigest()


def decode_json(data: bytes, kind: type[_T], what: str, defaults: Mapping[str, JSON] | None = None) -> _T:
    """JSON as `kind`. A member that is null, or is missing and in `defaults`, gets its default.

    Raises:
        ManifestDamaged: it is something else; the message begins with `what`.
    """
    try:
        value = _without_nulls(msgspec.json.decode(data))
        return msgspec.convert({**defaults, **value} if defaults and isinstance(value, dict) else value, kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ManifestDamaged(f"{what} is damaged: {error}") from error


def _without_nulls(value: JSON) -> JSON:
    match value:
        case dict():
            return {key: _without_nulls(member) for key, member in value.items() if member is not None}
        case list():
            return [_without_nulls(item) for item in value]
    return value


def walk(models: Path) -> Iterator[ModelName]:
    """Every name that has a manifest file, in no order. Files at another depth or with an invalid part are ignored."""
    return _search(models, (None, None, None, None))


def locate(models: Path, name: ModelName) -> ModelName | None:
    """The name in the spelling it has on disk, upper and lower case ignored; the exact spelling is preferred."""
    found = _search(models, tuple(part.lower() for part in name.parts))
    return min(found, key=lambda each: (each != name, each.parts), default=None)


def adopt_spelling(models: Path, name: ModelName) -> ModelName:
    """The name with each part spelled as in a manifest that is there, if one has it in another case.

    Every part by itself, as Ollama does it (server/routes.go, getExistingName); an exact spelling is preferred.
    """
    known: dict[tuple[int, str], str] = {}
    for each in sorted(walk(models), key=lambda each: each.parts):
        for index, part in enumerate(each.parts):
            if part == name.parts[index] or (index, part.lower()) not in known:
                known[index, part.lower()] = part
    host, namespace, model, tag = (known.get((index, part.lower()), part) for index, part in enumerate(name.parts))
    return ModelName(host, namespace, model, tag)


def _search(models: Path, wanted: tuple[str | None, ...]) -> Iterator[ModelName]:
    for parts in _paths(models / "manifests", wanted):
        try:
            yield ModelName(*parts)
        except InvalidModelName:
            continue


def _paths(directory: Path, wanted: tuple[str | None, ...]) -> Iterator[tuple[str, ...]]:
    """Files exactly as deep below `directory` as `wanted` is long; each part must match in lower case unless None."""
    for entry in _entries(directory):
        if wanted[0] is not None and entry.lower() != wanted[0]:
            continue
        if len(wanted) > 1:
            for rest in _paths(directory / entry, wanted[1:]):
                yield entry, *rest
        elif os.path.isfile(directory / entry):  # noqa: PTH113 (unlike Path.is_file it never raises)
            yield (entry,)


def _entries(directory: Path) -> list[str]:
    try:
        return [entry.name for entry in directory.iterdir()]
    except OSError:  # missing, a file, or not ours to see: in any case nothing to list
        return []
