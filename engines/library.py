"""What can be asked of the models on disk, and how it goes; part of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engines.request import JSON, Message


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long piece of work on the store is.

    Attributes:
        status: what is being done, in Ollama's words. digest: of the blob that it is being done to, if it is one.
        total_bytes, completed_bytes: of that blob; 0 when there is nothing to count.
    """

    status: str
    digest: str = ""
    total_bytes: int = 0
    completed_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRequest:
    """A model to be made (`spec/ollama.md` section 7.7). What is empty is taken from the base, where there is one.

    Attributes:
        name: of the model to make or replace. base: a model to start from; `files` counts only without it.
        files, adapters, draft_files: blob digests by the path that the file had; the blobs are there already.
        licenses: added to the base's. parameters: laid over the base's. messages: in place of the base's.
        quantize, draft_quantize: the type that the weights are to have, such as `q4_K_M`; empty leaves them.
        info: facts for the config that no file says.
    """

    name: str
    base: str = ""
    files: Mapping[str, str] | None = None
    adapters: Mapping[str, str] | None = None
    draft_files: Mapping[str, str] | None = None
    template: str = ""
    system: str = ""
    licenses: tuple[str, ...] = ()
    parameters: Mapping[str, JSON] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    quantize: str = ""
    draft_quantize: str = ""
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    info: Mapping[str, JSON] | None = None
