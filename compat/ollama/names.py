"""What a model name says about where the model runs (`spec/ollama.md` sections 4 and 6).

`:local` insists on this machine and is dropped by the store; a cloud suffix asks for Ollama's cloud, which is never
offered here.
"""

from __future__ import annotations

from compat.ollama.gojson import quote
from engines.errors import BadRequest, ModelNotFound, RemoteModel
from engines.model import ModelCard
from engines.store.names import parse_name, without_local


def refuse_cloud(name: str, refused: str = "remote model is unavailable") -> None:
    """Raise for a name that asks for the cloud; `refused` says what is not to be had.

    Raises:
        BadRequest: it asks for two places at once. RemoteModel: it asks for the cloud.
    """
    rest, where = _split_source(name.strip())
    if where and _split_source(rest)[1]:
        raise BadRequest(f"use either :local or :cloud, not both: {quote(name.strip())}", param="model")
    if where == "cloud":
        raise RemoteModel(refused)


def refuse_remote(name: str, card: ModelCard, refused: str = "remote model is unavailable") -> None:
    """Raise for a model that runs somewhere else.

    Raises:
        ModelNotFound: `:local` insists on one of this machine. RemoteModel: nobody insists.
    """
    if card.is_remote:
        insist_on_local(name, card)
        raise RemoteModel(refused)


def insist_on_local(name: str, card: ModelCard) -> None:
    """Raise ModelNotFound for a model that runs somewhere else under a name that asks for one of this machine."""
    if card.is_remote and _split_source(name.strip())[1] == "local":
        raise ModelNotFound(name)


def _split_source(name: str) -> tuple[str, str]:
    """The name without its suffix, and `cloud`, `local` or nothing."""
    rest, colon, tag = name.rpartition(":")
    where = tag.strip().lower()
    if colon and where in ("cloud", "local"):
        return rest, where
    if colon and "/" not in where and where.endswith("-cloud"):
        return f"{rest}:{tag[: -len('-cloud')]}", "cloud"
    return name, ""


def short_name(name: str) -> str:
    """The shortest name that means the same, always with its tag. Raises InvalidModelName."""
    return parse_name(without_local(name)).display
