"""Errors in OpenAI's words (`spec/openai.md` section 2.1). Pure.

Several messages hold phrases that clients match on; those live here or in `engines.errors` and must not be reworded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from compat.openai.render import encode
from compat.openai.schema import ErrorBody, ErrorDetail
from engines.errors import (
    AccessDenied,
    BadRequest,
    BodyTooLarge,
    Cancelled,
    GGUFParseError,
    HeadwaterError,
    InvalidModelName,
    ModelLoadFailed,
    ModelNotFound,
    PromptTooLong,
    ServerBusy,
    TemplateError,
    UnsupportedCapability,
)


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error as a whole reply; `body` is also the last frame of a stream that breaks."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def render_error(error: Exception, prompt_param: str = "messages") -> ErrorReply:
    """Any exception in OpenAI's words (section 2.1); `prompt_param` is the field that holds the prompt.

    Errors that are not ours become a plain 500 without their text, which may tell more than a client should know.
    """
    match error:
        case PromptTooLong():
            detail = _invalid(error, prompt_param, error.code)
            detail.n_prompt_tokens, detail.n_ctx = error.prompt_tokens, error.num_ctx
            return _error(400, detail)
        case UnsupportedCapability():
            return _error(400, _invalid(error, "model", "unsupported_model"))
        case InvalidModelName():
            return _error(400, _invalid(error, "model", "invalid_value"))
        case TemplateError():
            return _error(400, _invalid(error, error.param or prompt_param, "invalid_value"))
        case BadRequest():
            return _error(400, _invalid(error, error.param, error.reason))
        case BodyTooLarge():
            return _error(413, _invalid(error, None, "request_too_large"))
        case ModelNotFound():
            message = f"The model `{error.name}` does not exist or you do not have access to it."
            return _error(404, ErrorDetail(message, "not_found_error", "model", error.code))
        case AccessDenied():
            return _error(403, ErrorDetail(error.message, "permission_error", None, "insufficient_permissions"))
        case Cancelled():
            return _error(error.status, _invalid(error, None, error.code))
        case _:
            return _server_error(error)


def _server_error(error: Exception) -> ErrorReply:
    match error:
        case ServerBusy():
            # Python's client gives up above 120 s, Node's ignores values above 60 s (section 2.2).
            retry_after_s = min(max(error.retry_after_s, 1), 60)
            detail = ErrorDetail(error.message, "server_error", None, "server_overloaded")
            return _error(503, detail, {"Retry-After": str(retry_after_s)})
        case ModelLoadFailed() | GGUFParseError():
            # The next load would fail in the same way, so clients must not retry it.
            detail = ErrorDetail(error.message, "server_error", "model", "model_load_failed")
            return _error(500, detail, {"x-should-retry": "false"})
        case HeadwaterError():
            return _error(500, ErrorDetail(error.message, "server_error", None, "internal_error"))
        case _:
            message = "The server had an error while processing your request."
            return _error(500, ErrorDetail(message, "server_error", None, "internal_error"))


def render_unknown_url(method: str, path: str) -> ErrorReply:
    """There is nothing at this path."""
    detail = ErrorDetail(f"Invalid URL ({method} {path})", "invalid_request_error", None, "unknown_url")
    return _error(404, detail)


def render_wrong_method(method: str, path: str, allow: str) -> ErrorReply:
    """There is something at this path, but not for this method; `allow` lists those that there are."""
    message = f"Method {method} is not allowed for {path}; use {allow}."
    detail = ErrorDetail(message, "invalid_request_error", None, "method_not_supported")
    return _error(405, detail, {"Allow": allow})


def _invalid(error: HeadwaterError, param: str | None, code: str | None) -> ErrorDetail:
    return ErrorDetail(error.message, "invalid_request_error", param, code)


def _error(status: int, detail: ErrorDetail, headers: dict[str, str] | None = None) -> ErrorReply:
    return ErrorReply(status, encode(ErrorBody(detail)), headers or {})
