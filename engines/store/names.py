"""Model names: `[scheme://][host/][namespace/]model[:tag]` (`spec/ollama.md` section 6).

A `ModelName` cannot be made from parts that the grammar forbids, and the grammar allows no part that starts with a dot
or holds a slash. So a path built from a name never leaves the store. Whether a model of that name exists is the
catalog's business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engines.errors import InvalidModelName

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_MODEL_OR_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_LOCAL = ":local"


@dataclass(frozen=True, slots=True)
class ModelName:
    """A whole model name, spelled as it was given or as it is on disk.

    Raises:
        InvalidModelName: a part breaks the grammar.
    """

    host: str
    namespace: str
    model: str
    tag: str

    def __post_init__(self) -> None:
        valid = (
            _HOST.fullmatch(self.host)
            and _NAMESPACE.fullmatch(self.namespace)
            and _MODEL_OR_TAG.fullmatch(self.model)
            and _MODEL_OR_TAG.fullmatch(self.tag)
        )
        if not valid:
            raise InvalidModelName(self.full)

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Host, namespace, model and tag: the manifest's path below `manifests/`."""
        return self.host, self.namespace, self.model, self.tag

    @property
    def full(self) -> str:
        """The name with nothing left out: `registry.ollama.ai/library/llama3:latest`."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def display(self) -> str:
        """The shortest name that still means this model, always with its tag: `llama3:latest`."""
        short = f"{self.model}:{self.tag}"
        if self.host != DEFAULT_HOST:
            return self.full
        return short if self.namespace == DEFAULT_NAMESPACE else f"{self.namespace}/{short}"


def parse_name(text: str) -> ModelName:
    """Read a name as a client typed it, spaces around it ignored and missing parts filled in.

    Raises:
        InvalidModelName: the text is no model name; the error quotes it as typed.
    """
    rest, tag = text.strip(), DEFAULT_TAG
    if rest.rfind(":") > rest.rfind("/"):  # otherwise the colon belongs to a port or a scheme
        rest, _, tag = rest.rpartition(":")
    rest, namespace_said, model = rest.rpartition("/")
    host, host_said, namespace = rest.rpartition("/")
    scheme, scheme_said, bare_host = host.partition("://")
    if scheme_said and scheme:
        host = bare_host
    try:
        return ModelName(
            host if host_said else DEFAULT_HOST,
            namespace if namespace_said else DEFAULT_NAMESPACE,
            model,
            tag,
        )
    except InvalidModelName:
        raise InvalidModelName(text) from None


def without_local(text: str) -> str:
    """The name without a trailing `:local`, by which clients insist on a model of this machine."""
    trimmed = text.strip()
    return trimmed[: -len(_LOCAL)] if trimmed.lower().endswith(_LOCAL) else trimmed
