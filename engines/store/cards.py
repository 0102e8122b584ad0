"""One installed model, read from its manifest, its small blobs and the header of its weights into a card.

What the config says counts, and the header answers where the config is silent. Its surprise: weights that are damaged
still make a card, of what the config says, so that the model can be seen and loading it can tell what is wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG

from engines.chat.capabilities import detect_capabilities, prefers_chat_template
from engines.errors import GGUFParseError
from engines.model import ModelCard
from engines.request import JSON
from engines.store.blobs import blob_path, read_bounded
from engines.store.gguf import RANKING_HEAD, GGUFHeader, Pooling, merge_parts, read_header
from engines.store.manifests import Layer, ModelConfig, decode_json, manifest_path, read_config, read_manifest
from engines.store.messages import decode_messages
from engines.store.names import ModelName

MAX_TEXT_BYTES = 8 << 20
"""Of a model's template, system prompt, parameters, messages and licences together."""

_TEXT_KINDS = ("template", "system", "params", "messages", "license")


@dataclass(frozen=True, slots=True)
class FileState:
    """Which file was there, as far as can be told without reading it."""

    path: Path
    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Raises FileNotFoundError for what is missing, and for a pipe or a directory."""
        try:
            state = path.stat()
        except OSError as error:
            raise FileNotFoundError(path) from error
        if not S_ISREG(state.st_mode):
            raise FileNotFoundError(path)
        return cls(path, state.st_ino, state.st_size, state.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A card, and the state of the files when it was made. The other blobs never change, being named by digest."""

    card: ModelCard
    files: tuple[FileState, ...]

    @property
    def is_current(self) -> bool:
        """Whether the card still tells what is on disk. Raises FileNotFoundError when one of the files is gone."""
        return all(FileState.of(file.path) == file for file in self.files)


def read_model(models: Path, name: ModelName, *, go_templates: bool | None = None) -> InstalledModel:
    """Read the model of that name, in the spelling that it has on disk.

    Raises:
        FileNotFoundError: the manifest or a blob is missing, or the model has no weights of its own.
        ManifestDamaged, StoreUnreadable: the files are there but make no model.
    """
    manifest_file = FileState.of(manifest_path(models, name))  # before reading, so that a change meanwhile is noticed
    manifest, digest = read_manifest(models, name)
    config = read_config(models, manifest)
    weights_layers = manifest.of_kind("model")
    is_remote = bool(config.remote_host and config.remote_model)
    if not weights_layers and not is_remote:
        raise FileNotFoundError(f"{name.display} has no weights of its own")
    adapters, projectors = (
        tuple(FileState.of(blob_path(models, layer.digest)) for layer in manifest.of_kind(kind))
        for kind in ("adapter", "projector")
    )
    weights = _weights(models, weights_layers) if weights_layers else ()
    weights_layer = next(
        (layer for layer in reversed(weights_layers) if weights and blob_path(models, layer.digest) == weights[0].path),
        None,
    )
    texts = _read_texts(models, manifest.layers)
    card = ModelCard(
        name=name.display,
        full_name=name.full,
        namespace=name.namespace,
        digest=digest,
        weights=weights[0].path if weights else Path(),
        weights_digest=weights_layer.digest if weights_layer else "",
        size_bytes=manifest.size_bytes,
        modified_at=manifest_file.mtime_ns / 1e9,
        format=config.model_format or "gguf",
        parent=weights_layer.source if weights_layer else "",
        template=_last(texts["template"]),
        system=_last(texts["system"]),
        parameters=_parse_parameters(_last(texts["params"])),
        messages=decode_messages(_last(texts["messages"])),
        licenses=tuple(texts["license"]),
        weight_parts=tuple(file.path for file in weights) if len(weights) > 1 else (),
        adapters=tuple(file.path for file in adapters),
        projectors=tuple(file.path for file in projectors),
        requires=config.requires,
        renderer=config.renderer,
        parser=config.parser,
        remote_host=config.remote_host if is_remote else "",
        remote_model=config.remote_model if is_remote else "",
        base_name=config.base_name,
    )
    if is_remote:  # all that is known of it is in its config
        card = dataclasses.replace(with_facts(card, config, None), capabilities=config.capabilities)
        return InstalledModel(card, (manifest_file,))
    headers = [header for file in weights if (header := header_of(file)) is not None]
    header = merge_parts(headers) if len(headers) == len(weights) else None
    return InstalledModel(
        with_facts(card, config, header, go_templates=go_templates), (manifest_file, *weights, *adapters, *projectors)
    )


def _weights(models: Path, layers: Sequence[Layer]) -> tuple[FileState, ...]:
    """The parts of a split model, first to last, when the layers are just these; else the last layer alone."""
    last = FileState.of(blob_path(models, layers[-1].digest))
    if len(layers) == 1 or _split(last)[1] != len(layers):
        return (last,)
    files = [FileState.of(blob_path(models, layer.digest)) for layer in layers]
    parts = {number: file for file in files for number, count in [_split(file)] if count == len(layers)}
    return tuple(parts[number] for number in sorted(parts)) if sorted(parts) == list(range(len(layers))) else (last,)


def _split(weights: FileState) -> tuple[int, int]:
    """Which part of how many a file is, counted from 0; -1 of 0 when it is none."""
    header = header_of(weights)
    number, count = (header.metadata.get(f"split.{name}") if header else None for name in ("no", "count"))
    return (number, count) if isinstance(number, int) and isinstance(count, int) else (-1, 0)


def with_facts(
    card: ModelCard, config: ModelConfig, header: GGUFHeader | None, *, go_templates: bool | None = None
) -> ModelCard:
    """The card with what config and header say about the weights; `header` is None when they are damaged.

    `go_templates` says which of two templates is used; None leaves it to them.
    """
    known = header or GGUFHeader(version=0, metadata={"general.architecture": ""}, tensors=(), num_parameters=0)
    chat_template = known.metadata.get("tokenizer.chat_template")
    chat_template = chat_template if isinstance(chat_template, str) else ""
    families = config.model_families
    if not config.model_family and families is None and header:
        families = (known.architecture,)
    is_jinja = prefers_chat_template(card.template, chat_template, renderer=card.renderer, go_templates=go_templates)
    go_template = "" if is_jinja else card.template
    capabilities = detect_capabilities(
        known.metadata,
        go_template=go_template,
        chat_template=chat_template,
        has_projector=bool(card.projectors),
        is_reranker=known.pooling is Pooling.RANK,
        declared=config.capabilities,
    )
    return dataclasses.replace(
        card,
        family=config.model_family or known.architecture,
        families=families,
        parameter_size=config.model_type or (known.parameter_size if header else ""),
        quantization=known.file_type if config.file_type in ("", "unknown") else config.file_type,
        context_length=config.context_length or known.count("context_length"),
        embedding_length=config.embedding_length or known.count("embedding_length"),
        chat_template=chat_template,
        go_template=go_template,
        capabilities=capabilities if header else ("completion",),
    )


@lru_cache(maxsize=1024)
def header_of(weights: FileState) -> GGUFHeader | None:
    """The header without arrays and most tensors, which are what makes it large; None for damaged weights."""
    try:
        header = read_header(weights.path, arrays=False)
    except GGUFParseError:
        return None
    return dataclasses.replace(header, tensors=tuple(t for t in header.tensors if t.name in RANKING_HEAD))


def _read_texts(models: Path, layers: Iterable[Layer]) -> dict[str, list[str]]:
    """The small layers by kind, in order. The limit is on all together: one blob may be named many times."""
    texts: dict[str, list[str]] = {kind: [] for kind in _TEXT_KINDS}
    left = MAX_TEXT_BYTES
    for layer in layers:
        if layer.kind in texts:
            data = read_bounded(blob_path(models, layer.digest), left)
            left -= len(data)
            texts[layer.kind].append(data.decode(errors="replace"))
    return texts


def _last(texts: list[str]) -> str:
    return texts[-1] if texts else ""


def _parse_parameters(text: str) -> dict[str, JSON]:
    return decode_json(text.encode(), dict[str, JSON], "the params layer") if text else {}
