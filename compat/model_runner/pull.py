"""`POST /models/create`: what to pull, and how it goes, in Docker's words (`spec/model-runner.md` section 11.2). Pure.

A line tells of one layer and of the image as a whole, whose `total` is the sum of the layers that were told of so far.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from engines.errors import BadRequest, HeadwaterError, InvalidModelName, NotInRegistry, RegistryDenied
from engines.library import Progress
from engines.store.docker import parse_reference
from engines.store.names import parse_name

_HUGGING_FACE = ("hf.co/", "huggingface.co/")
_GO_ESCAPES = str.maketrans({"&": "&amp;", "'": "&#39;", "<": "&lt;", ">": "&gt;", '"': "&#34;"})
"""Go's html.EscapeString."""


class CreateBody(Struct):
    """What is to be pulled, and a token for its registry."""

    base: str = msgspec.field(default="", name="from")
    token: str = msgspec.field(default="", name="bearer-token")


class Layer(Struct):
    """How far one layer is, in bytes."""

    id: str
    size: int
    current: int


class Line(Struct):
    """One line of the reply. `type` is `progress`, `success` or `error`."""

    type: str
    message: str
    total: int
    layer: Layer
    mode: str = "pull"


def decode_create(data: bytes) -> CreateBody:
    """The body. Raises BadRequest."""
    try:
        return msgspec.json.decode(data, type=CreateBody)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise BadRequest("invalid request body") from None


def reference(text: str) -> str:
    """The whole name of what Docker's users call `smollm2`, `ai/smollm2` or `hf.co/user/repository`.

    Hugging Face's keep their case, which their registry goes by. Raises InvalidModelName.
    """
    name = text.strip()
    if not name or name.lower().startswith((*_HUGGING_FACE, "localhost:")):
        return parse_name(name).full
    return parse_name(parse_reference(name)).full


def speaks_http(name: str) -> bool:
    """Whether a model's registry may be one without https: on this machine, or in a network of one's own."""
    host = parse_name(name).host.partition(":")[0].lower()
    return host in ("localhost", "127.0.0.1") or host.endswith(".local")


def explain(error: Exception) -> tuple[int, str]:
    """The status and the text of an error; what is not ours shows nothing of its text."""
    match error:
        case InvalidModelName():
            return 400, "Invalid model reference"
        case RegistryDenied():
            return 401, "Unauthorized"
        case NotInRegistry():
            return 404, "Model not found"
        case HeadwaterError():
            return error.status, error.message
    return 500, "internal server error"


class Report:
    """The lines of one pull.

    Args:
        was_here: the model was installed before; if nothing has to be fetched then, a single line says so.
        escapes: every line is escaped as HTML, for those who did not ask for JSON.
    """

    def __init__(self, *, was_here: bool, escapes: bool) -> None:
        self._was_here = was_here
        self._escapes = escapes
        self._sizes: dict[str, int] = {}
        self._arrived: dict[str, int] = {}
        self._has_fetched = False

    def line(self, progress: Progress) -> bytes | None:
        """The line for a step; None for steps that Docker has no word for, and for layers that were here."""
        if progress.status == "success":
            return self._end()
        if not progress.digest:
            return None
        self._sizes[progress.digest] = progress.total_bytes
        self._arrived[progress.digest] = progress.completed_bytes
        self._has_fetched |= progress.completed_bytes < progress.total_bytes
        if not self._has_fetched:
            return None
        layer = Layer(progress.digest, progress.total_bytes, progress.completed_bytes)
        return self._write("progress", f"Downloaded: {_size(sum(self._arrived.values()))}", layer)

    def _end(self) -> bytes:
        if self._was_here and not self._has_fetched:
            return self._write("success", f"Using cached model: {_size(self._total)}")
        return self._write("success", "Model pulled successfully")

    def failure(self, error: Exception) -> bytes:
        """The last words of a pull that failed when lines had been sent: one more, and the text behind it."""
        _, text = explain(error)
        return self._write("error", text) + f"{text}\n".encode()

    @property
    def _total(self) -> int:
        return sum(self._sizes.values())

    def _write(self, kind: str, message: str, layer: Layer | None = None) -> bytes:
        line = msgspec.json.encode(Line(kind, message, self._total, layer or Layer("", 0, 0)))
        return (line.decode().translate(_GO_ESCAPES).encode() if self._escapes else line) + b"\n"


def _size(num_bytes: int) -> str:
    """Docker's `1.23MB`: decimal, two digits behind the point."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.2f}{units[0]}"
