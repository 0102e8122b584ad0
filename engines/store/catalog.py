"""The models that are installed, as cards, wherever they are.

Places are asked in order: Ollama's directory first, then what is only read; a name that is in several means the first.
Every place is looked at on every call, so what `ollama pull` or `rm` does beside us shows at once; only what files say
is remembered, for as long as they are the same files. A model counts as installed when every file that it needs is
there; others are left out of the list, and so are models without a GGUF of their own (safetensors). Models that run on
another server have no files at all and are listed, since their names are taken; nothing here can run them.
Weights that are damaged stay listed, so that loading them can say what is wrong.
All methods block on the disk and may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

from engines.errors import HeadwaterError, ModelNotFound
from engines.model import ModelCard, ModelDescription
from engines.request import JSON
from engines.store.blobs import blob_path
from engines.store.cards import InstalledModel
from engines.store.docker import parse_reference
from engines.store.gguf import merge_parts, read_header
from engines.store.providers import OllamaStore, Provider

_Cards = list[ModelCard]  # inside Catalog, `list` is a method
_Place = Provider[Any]  # each has keys of its own


class Catalog:
    """The models below `root`, the directory that Ollama calls OLLAMA_MODELS, and in further places.

    `go_templates` says which of two templates of a model is used; None leaves it to them.
    """

    def __init__(self, root: Path, *further: _Place, go_templates: bool | None = None) -> None:
        self._root = root
        self._places: tuple[_Place, ...] = (OllamaStore(root, go_templates=go_templates), *further)
        self._remembered: dict[tuple[_Place, Hashable], InstalledModel] = {}

    def list(self) -> _Cards:
        """Every installed model, last modified first. Never raises for what is on disk."""
        cards: dict[str, ModelCard] = {}
        seen = set()
        for place in self._places:
            known = {name.lower() for name in cards}  # names that differ in case alone may be in one place
            for key in place.walk():
                try:
                    card = self._card(place, key)
                except (HeadwaterError, FileNotFoundError):
                    continue
                seen.add((place, key))
                if card.name.lower() not in known:
                    cards[card.name] = card
        for each in {*self._remembered} - seen:  # a copy, since other threads may add to it
            self._remembered.pop(each, None)
        return sorted(cards.values(), key=lambda card: (-int(card.modified_at), card.name))

    def find(self, name: str) -> ModelCard:
        """The model of that name, upper and lower case ignored.

        Raises:
            InvalidModelName: it is no name.
            ModelNotFound: there is no such model, or one of its files is missing.
            ManifestDamaged, StoreUnreadable: its files are there but make no model.
        """
        for _, card in self._found(name):
            return card
        raise ModelNotFound(name)

    def describe(self, name: str) -> ModelDescription:
        """The model with its whole GGUF header, read afresh. Raises as `find` does, and GGUFParseError."""
        card = self.find(name)
        if card.is_remote:
            return ModelDescription(card, _remote_metadata(card), (), 0)
        header = merge_parts([read_header(path) for path in card.weight_parts or (card.weights,)])
        projector = read_header(card.projectors[0]).metadata if card.projectors else None
        return ModelDescription(card, header.metadata, header.tensors, header.num_parameters, projector)

    def weights(self, digest: str) -> Path:
        """The file of weights that a card named; when it is gone, where Ollama's directory would have it."""
        found = (place.weights(digest) for place in self._places)
        return next((path for path in found if path is not None), blob_path(self._root, digest))

    def owner_of(self, name: str) -> str | None:
        """What the place is called that a model is in, when it may not be changed there. Raises as `find` does."""
        for place, _ in self._found(name):
            return None if place.is_writable else place.title
        return None

    def _found(self, name: str) -> Iterator[tuple[_Place, ModelCard]]:
        for written in _spellings(name):
            for place in self._places:
                key = place.locate(written)
                try:
                    if key is not None:
                        yield place, self._card(place, key)
                except FileNotFoundError:
                    continue

    def _card(self, place: _Place, key: Hashable) -> ModelCard:
        # Without a lock: to set one key is atomic, and two threads that both build a card only lose some time.
        remembered = self._remembered.get((place, key))
        if remembered is None or not remembered.is_current:
            remembered = self._remembered[place, key] = place.read(key)
        return remembered.card


def _spellings(name: str) -> list[str]:
    """The name, and what Docker's users mean by it: models of `ai/` are called so without saying whose registry's."""
    return [name, parse_reference(name)] if name.count("/") <= 1 else [name]


def _remote_metadata(card: ModelCard) -> dict[str, JSON]:
    """What Ollama says in place of a header (server/routes.go, GetModelInfo)."""
    if not card.family:
        return {}
    facts: dict[str, JSON] = {
        "general.architecture": card.family,
        "general.basename": card.base_name,
        f"{card.family}.context_length": card.context_length,
        f"{card.family}.embedding_length": card.embedding_length,
    }
    return {key: value for key, value in facts.items() if value}
