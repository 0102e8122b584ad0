"""The models that are installed, as cards.

The directory is looked at on every call, so what `ollama pull` or `rm` does beside us shows at once; only what files
say is remembered, for as long as they are the same files. A model counts as installed when its manifest can be read
and every file that it needs is there; others are left out of the list, and so are models without a GGUF of their own
(cloud stubs, safetensors). Weights that are damaged stay listed, so that loading them can say what is wrong.
All methods block on the disk and may be called from any thread.
"""

from __future__ import annotations

from pathlib import Path

from engines.errors import HeadwaterError, ModelNotFound
from engines.model import ModelCard, ModelDescription
from engines.store.cards import InstalledModel, read_model
from engines.store.gguf import merge_parts, read_header
from engines.store.manifests import locate, walk
from engines.store.names import ModelName, parse_name, without_local

_Cards = list[ModelCard]  # inside Catalog, `list` is a method


class Catalog:
    """The models below `root`, the directory that Ollama calls OLLAMA_MODELS. It need not exist."""

    def __init__(self, root: Path) -> None:
        self._models = root
        self._remembered: dict[ModelName, InstalledModel] = {}

    def list(self) -> _Cards:
        """Every installed model, last modified first. Never raises for what is on disk."""
        cards = {}
        for name in walk(self._models):
            try:
                cards[name] = self._card(name)
            except (HeadwaterError, FileNotFoundError):
                continue
        for name in [*self._remembered]:  # a copy, since other threads may add to it
            if name not in cards:
                self._remembered.pop(name, None)
        return sorted(cards.values(), key=lambda card: (-int(card.modified_at), card.name))

    def find(self, name: str) -> ModelCard:
        """The model of that name, upper and lower case ignored.

        Raises:
            InvalidModelName: it is no name.
            ModelNotFound: there is no such model, or one of its files is missing.
            ManifestDamaged, StoreUnreadable: its files are there but make no model.
        """
        located = locate(self._models, parse_name(without_local(name)))
        try:
            if located is not None:
                return self._card(located)
        except FileNotFoundError:
            pass
        raise ModelNotFound(name)

    def describe(self, name: str) -> ModelDescription:
        """The model with its whole GGUF header, read afresh. Raises as `find` does, and GGUFParseError."""
        card = self.find(name)
        header = merge_parts([read_header(path) for path in card.weight_parts or (card.weights,)])
        projector = read_header(card.projectors[0]).metadata if card.projectors else None
        return ModelDescription(card, header.metadata, header.tensors, header.num_parameters, projector)

    def _card(self, name: ModelName) -> ModelCard:
        # Without a lock: to set one key is atomic, and two threads that both build a card only lose some time.
        remembered = self._remembered.get(name)
        if remembered is None or not remembered.is_current:
            remembered = self._remembered[name] = read_model(self._models, name)
        return remembered.card
