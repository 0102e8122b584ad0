"""Errors in Ollama's words (`spec/ollama.md` sections 1 and 5). Pure.

Clients match on several of these texts; they live here or in `engines.errors` and must not be reworded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from compat.ollama.gojson import encode, quote
from compat.ollama.schema import ErrorBody
from engines.errors import (
    HeadwaterError,
    InvalidModelName,
    ModelNotFound,
    PromptTooLong,
    ServerBusy,
    WorkerCrashed,
)

QUEUE_FULL = "server busy, please try again.  maximum pending requests exceeded"
PROMPT_TOO_LONG = (
    "the prompt is longer than the context length currently available to the model; shorten the prompt, adjust the "
    "context length in settings, or use a model with a longer context length"
)
RUNNER_STOPPED = (
    "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error, "
    "check ollama server logs for details"
)


class InvalidFormat(HeadwaterError):
    """`format` is neither `json` nor a schema. Ollama answers 500 here, and clients see that status."""

    code = "invalid_format"

    def __init__(self, quoted: str) -> None:
        super().__init__(f'invalid format: {quoted}; expected "json" or a valid JSON Schema object')


class EmbeddingFailed(HeadwaterError):
    """An engine's refusal with the status and the text that it has on Ollama's routes for embeddings."""

    def __init__(self, message: str, error: HeadwaterError, status: int) -> None:
        super().__init__(message)
        self.code = error.code
        self.status = status


class ModelNotPulled(ModelNotFound):
    """ModelNotFound in the words of the routes for embeddings."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.message = f"model {quote(name)} not found, try pulling it first"


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error as a whole reply; `body` is also the last line of a stream that breaks."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def render_error(error: Exception) -> ErrorReply:
    """Any exception in Ollama's words. What is not ours shows nothing of its text, which may tell too much."""
    match error:
        case InvalidModelName():
            return _error(400, "invalid model name")
        case PromptTooLong():
            return _error(400, PROMPT_TOO_LONG)
        case ServerBusy():
            # Two different things to wait for, and clients know the first by its text.
            message = error.message if "shutting down" in error.message else QUEUE_FULL
            return _error(503, message, {"Retry-After": str(max(error.retry_after_s, 1))})
        case WorkerCrashed():
            return _error(500, f"{RUNNER_STOPPED}: {error.message}" if error.message else RUNNER_STOPPED)
        case HeadwaterError():
            return _error(error.status, error.message)
        case _:
            return _error(500, "internal server error")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> ErrorReply:
    return ErrorReply(status, encode(ErrorBody(message)), headers or {})
