"""Everything that can go wrong, as one tree.

    HeadwaterError                     500 internal_error
    ├── BadRequest                     400 invalid_request
    │   ├── PromptTooLong              400 context_length_exceeded
    │   ├── UnsupportedCapability      400 unsupported_capability
    │   ├── UnsupportedFeature         400 unsupported_feature
    │   ├── InvalidModelName           400 invalid_model_name
    │   └── TemplateError              400 template_error
    │       └── GoTemplateError        500 go_template_error
    ├── BodyTooLarge                   413 body_too_large
    ├── ModelNotFound                  404 model_not_found
    ├── AccessDenied                   403 access_denied
    │   └── RemoteModel                403 remote_model
    ├── WrongModel                     421 wrong_model
    ├── ServerBusy                     503 server_busy
    ├── GGUFParseError                 500 gguf_parse_error
    ├── ModelLoadFailed                500 model_load_failed
    │   └── OutOfMemory                500 out_of_memory
    ├── WorkerCrashed                  500 worker_crashed
    │   └── WorkerKilled               500 worker_crashed
    ├── ModelNotLoaded                 409 model_not_loaded
    ├── RegistryError                  500 registry_error
    │   ├── NotInRegistry              500 not_in_registry
    │   └── RegistryDenied             500 registry_denied
    └── Cancelled                      499 cancelled

Each class knows its HTTP status and a stable code that goes into the ledger; how a client reads it is decided in its
dialect's `render`.
"""

from __future__ import annotations


class HeadwaterError(Exception):
    """Base of all errors that we raise ourselves; the message is written for the person who reads it."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class BadRequest(HeadwaterError):
    """The request cannot be served as it is. `param` is the dotted path of the field at fault, when there is one."""

    status = 400
    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, reason: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.reason = reason
        """A finer code for dialects that have one, such as OpenAI's `invalid_type` (`spec/openai.md` section 2.1)."""


class PromptTooLong(BadRequest):
    """The prompt does not fit the context window and may not be cut."""

    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, num_ctx: int) -> None:
        super().__init__(
            f"This model's maximum context length is {num_ctx} tokens. "
            f"However, your messages resulted in {prompt_tokens} tokens."
        )
        self.prompt_tokens = prompt_tokens
        self.num_ctx = num_ctx


class UnsupportedCapability(BadRequest):
    """The model cannot do what was asked: `capabilities` are the missing ones, such as `tools` or `thinking`."""

    code = "unsupported_capability"

    def __init__(self, model: str, *capabilities: str) -> None:
        super().__init__(f'model "{model}" does not support {", ".join(capabilities)}')
        self.model = model
        self.capabilities = capabilities


class UnsupportedFeature(BadRequest):
    """A field is understood but cannot be honoured; refusing is better than silently ignoring it."""

    code = "unsupported_feature"


class InvalidModelName(BadRequest):
    """The name is no model name (`spec/ollama.md` section 6)."""

    code = "invalid_model_name"

    def __init__(self, name: str) -> None:
        super().__init__(f"invalid model name: {name!r}", param="model")
        self.name = name


class TemplateError(BadRequest):
    """The chat template refused the messages, broke, or exceeded its limits."""

    code = "template_error"


class GoTemplateError(TemplateError):
    """A Go template that is none, or does not go with its data; the message is Go's. Ollama answers 500 here."""

    status = 500
    code = "go_template_error"


class BodyTooLarge(HeadwaterError):
    """The request body exceeds the limit."""

    status = 413
    code = "body_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"request body is larger than {limit_bytes} bytes")
        self.limit_bytes = limit_bytes


class ModelNotFound(HeadwaterError):
    """No such model in any store. `name` is as the client typed it."""

    status = 404
    code = "model_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"model '{name}' not found")
        self.name = name


class AccessDenied(HeadwaterError):
    """This caller may not do this."""

    status = 403
    code = "access_denied"


class RemoteModel(AccessDenied):
    """The model runs on another server, of which we know no more than its name; clients know the text."""

    code = "remote_model"

    def __init__(self, refused: str = "remote model is unavailable") -> None:
        super().__init__(f"ollama cloud is disabled: {refused}")


class WrongModel(HeadwaterError):
    """A worker was asked for a model other than its own (`spec/model-runner.md` section 2.2)."""

    status = 421
    code = "wrong_model"

    def __init__(self, asked: str, loaded: str) -> None:
        super().__init__(f"this worker serves {loaded!r}, not {asked!r}")


class ServerBusy(HeadwaterError):
    """The queue is full, or the server is shutting down; try again after `retry_after_s` seconds."""

    status = 503
    code = "server_busy"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GGUFParseError(HeadwaterError):
    """The file is no GGUF, a damaged one, or one that says what no model can mean.

    `offset` is the byte where reading failed, if one did.
    """

    code = "gguf_parse_error"

    def __init__(self, message: str, offset: int | None = None) -> None:
        super().__init__(f"failed to parse GGUF: {message}{f' (at byte {offset})' if offset is not None else ''}")
        self.offset = offset


class ModelLoadFailed(HeadwaterError):
    """The worker could not load the model; the message carries the end of what it said."""

    code = "model_load_failed"


class OutOfMemory(ModelLoadFailed):
    """The model needs more memory than there is."""

    code = "out_of_memory"


class WorkerCrashed(HeadwaterError):
    """The worker ended in the middle of a request; the message carries the end of what it said."""

    code = "worker_crashed"


class WorkerKilled(WorkerCrashed):
    """Something outside killed the worker, most likely the system because memory ran out."""


class ModelNotLoaded(HeadwaterError):
    """An InferenceBackend was asked to work before `load`."""

    status = 409
    code = "model_not_loaded"

    def __init__(self) -> None:
        super().__init__("No model loaded")


class RegistryError(HeadwaterError):
    """A registry cannot be reached, refuses, or says what makes no sense. 500 is what Ollama answers.

    `transient` says that the same request may succeed a moment later.
    """

    code = "registry_error"

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class NotInRegistry(RegistryError):
    """The registry has no such model or blob; clients know the text."""

    code = "not_in_registry"

    def __init__(self, message: str = "file does not exist") -> None:
        super().__init__(message)


class RegistryDenied(RegistryError):
    """The registry wants credentials that we do not have, or other ones; clients know the text."""

    code = "registry_denied"

    def __init__(self, message: str = "unauthorized: access denied") -> None:
        super().__init__(message)


class Cancelled(HeadwaterError):
    """The caller left before the answer was complete."""

    status = 499
    code = "cancelled"

    def __init__(self) -> None:
        super().__init__("request canceled")
