"""Models on disk in Ollama's words: body to request, progress to wire (`spec/ollama.md` section 7). Pure."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType, field

from compat.ollama.gojson import encode, quote
from compat.ollama.names import refuse_cloud
from compat.ollama.parse import parse_message
from compat.ollama.schema import MessageBody
from engines.errors import BadRequest, ModelNotFound, RemoteModel
from engines.library import CreateRequest, Progress


class CreateBody(Struct):
    """`POST /api/create`. `quantization` is the old name of `quantize`, `name` that of `model`."""

    model: str = ""
    name: str = ""
    stream: bool = True
    quantize: str = ""
    quantization: str = ""
    draft_quantize: str = ""
    base: str = field(default="", name="from")
    remote_host: str = ""
    files: dict[str, str] | None = None
    draft_files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    template: str = ""
    license: Any = None
    system: str = ""
    parameters: dict[str, Any] = {}
    messages: list[MessageBody] = []
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    info: dict[str, Any] | None = None


class CopyBody(Struct):
    """`POST /api/copy`."""

    source: str = ""
    destination: str = ""


class DeleteBody(Struct):
    """`DELETE /api/delete`."""

    model: str = ""
    name: str = ""


class TransferBody(Struct):
    """`POST /api/pull` and `/api/push`; `username` and `password` are ignored."""

    model: str = ""
    name: str = ""
    insecure: bool = False
    stream: bool = True


class ProgressReply(Struct):
    """One step; numbers that are 0 do not appear."""

    status: str
    digest: str | UnsetType
    total: int | UnsetType
    completed: int | UnsetType


class CopySourceMissing(ModelNotFound):
    """ModelNotFound in the words of `/api/copy`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.message = f"model {quote(name)} not found"


def parse_create(body: CreateBody) -> CreateRequest:
    """The request for a model.

    Raises:
        BadRequest, RemoteModel: it asks for what is not offered here.
    """
    refuse_cloud(body.base)
    if body.remote_host:
        raise RemoteModel
    return CreateRequest(
        name=body.model or body.name,
        base=body.base,
        files=body.files,
        adapters=body.adapters,
        draft_files=body.draft_files,
        template=body.template,
        system=body.system,
        licenses=_licenses(body.license),
        parameters=body.parameters,
        messages=tuple(map(parse_message, body.messages)),
        quantize=body.quantize or body.quantization,
        draft_quantize=body.draft_quantize,
        renderer=body.renderer,
        parser=body.parser,
        requires=body.requires,
        info=body.info,
    )


def parse_delete(body: DeleteBody) -> str:
    """The name of the model; those of the cloud are spelled as they are kept.

    Raises:
        BadRequest: there is none.
    """
    name = body.model or body.name
    if not name.strip():
        raise BadRequest("model is required", param="model")
    rest, _, source = name.strip().rpartition(":")
    return f"{rest}-cloud" if source.lower() == "cloud" and ":" in rest.rpartition("/")[2] else name


def render_progress(progress: Progress) -> bytes:
    """One object of a stream, or the only one."""
    return encode(
        ProgressReply(
            progress.status,
            progress.digest or UNSET,
            progress.total_bytes or UNSET,
            progress.completed_bytes or UNSET,
        )
    )


def _licenses(value: Any) -> tuple[str, ...]:
    """One text or a list of texts."""
    texts = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest("json: cannot unmarshal license into Go value of type []string", param="license")
    return tuple(texts)
