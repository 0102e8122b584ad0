"""Where models come from: what a catalog asks of each place, and Ollama's directory as the first of them.

Every method blocks on the disk, may be called from any thread, and looks anew at each call.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from engines.store.blobs import blob_path
from engines.store.cards import InstalledModel, read_model
from engines.store.manifests import locate, walk
from engines.store.names import ModelName, parse_name, without_local

K = TypeVar("K", bound=Hashable)


class Provider(Protocol[K]):
    """One place with models, each under a key of the place's own.

    Attributes:
        title: what the place is called when somebody must be told, such as `the folder /models`.
        is_writable: whether models there may be changed.
    """

    title: str
    is_writable: bool

    def walk(self) -> Iterator[K]:
        """The keys of all models, in no order. Never raises for what is on disk."""

    def locate(self, name: str) -> K | None:
        """The model that a client means by a name. Raises InvalidModelName."""

    def read(self, key: K) -> InstalledModel:
        """The model. Raises FileNotFoundError, ManifestDamaged, StoreUnreadable."""

    def weights(self, digest: str) -> Path | None:
        """The file of that digest, if it is here."""


class OllamaStore:
    """The directory that Ollama calls OLLAMA_MODELS, which need not exist."""

    is_writable = True

    def __init__(self, models: Path, *, go_templates: bool | None = None) -> None:
        self.title = f"the store {models}"
        self._models = models
        self._go_templates = go_templates

    def walk(self) -> Iterator[ModelName]:
        """See Provider."""
        return walk(self._models)

    def locate(self, name: str) -> ModelName | None:
        """Upper and lower case are ignored."""
        return locate(self._models, parse_name(without_local(name)))

    def read(self, key: ModelName) -> InstalledModel:
        """See Provider."""
        return read_model(self._models, key, go_templates=self._go_templates)

    def weights(self, digest: str) -> Path | None:
        """See Provider."""
        path = blob_path(self._models, digest)
        return path if path.is_file() else None
