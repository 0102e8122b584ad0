"""What a model is, as everyone above the store may know it; part of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engines.options import parse_load_options, parse_sampling
from engines.request import JSON, LoadOptions, Message, Mode, Sampling


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One installed model: everything a request needs to know about it, cheap to hold and safe to share.

    Attributes:
        name: shortest display name, always with its tag: `llama3.2:latest`.
        full_name: `registry.ollama.ai/library/llama3.2:latest`.
        digest: 64 hex digits, the SHA-256 of the manifest file's bytes.
        weights, weights_digest: the GGUF and its blob digest (`sha256:` and 64 hex digits), which is what residency is
            keyed by. weight_parts: all files in order when the model is split into several, of which `weights` is the
            first. projectors and adapters: further GGUF files to load with it.
        size_bytes: all layers and the config. modified_at: seconds since the epoch.
        parameters: the params layer as it is on disk, Ollama option names.
        template: the TEMPLATE layer's text, empty without one. chat_template: the GGUF's Jinja template.
        go_template: the first of these when it is what prompts are rendered with, else empty.
        context_length, embedding_length: what the model was trained with; 0 when unknown.
        capabilities: a subset of completion, tools, insert, vision, embedding, rerank and thinking (`spec/ollama.md`
            section 9).
        namespace: the registry namespace, `library` for official models.
        remote_host, remote_model: where a model runs that is only a name here, and what it is called there; it has no
            weights. base_name: what its author calls the model that it is, where its config says so.
        renderer, parser: what Ollama has built in for the model's prompts and replies, where its config names it.
    """

    name: str
    full_name: str
    digest: str
    weights: Path
    weights_digest: str
    size_bytes: int
    modified_at: float
    namespace: str = "library"
    format: str = "gguf"
    family: str = ""
    families: tuple[str, ...] | None = None
    parameter_size: str = ""
    quantization: str = ""
    context_length: int = 0
    embedding_length: int = 0
    parent: str = ""
    template: str = ""
    chat_template: str = ""
    go_template: str = ""
    system: str = ""
    parameters: Mapping[str, JSON] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    licenses: tuple[str, ...] = ()
    weight_parts: tuple[Path, ...] = ()
    adapters: tuple[Path, ...] = ()
    projectors: tuple[Path, ...] = ()
    capabilities: tuple[str, ...] = ()
    requires: str = ""
    renderer: str = ""
    parser: str = ""
    remote_host: str = ""
    remote_model: str = ""
    base_name: str = ""

    @property
    def is_remote(self) -> bool:
        """Whether it runs somewhere else."""
        return bool(self.remote_host and self.remote_model)

    @property
    def residency(self) -> str:
        """What models with the same are one in memory: the weights, and the adapters that were applied to them."""
        return "+".join([self.weights_digest, *(adapter.name for adapter in self.adapters)])

    @property
    def sampling(self) -> Sampling:
        """The model's own sampling defaults, from its params layer."""
        return parse_sampling(self.parameters)

    @property
    def load(self) -> LoadOptions:
        """The model's own load options, from its params layer."""
        return parse_load_options(self.parameters)

    def introduce(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """A chat opened as the model's author wants it: with its own turns, and before them its system text.

        A chat that begins with a system message keeps that one alone (`spec/ollama.md` section 5.2).
        """
        if self.system and not (messages and messages[0].role == "system"):
            return Message("system", self.system), *self.messages, *messages
        return *self.messages, *messages


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a GGUF: its name, type name such as `Q8_0`, and shape in llama.cpp's order."""

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model card with the whole GGUF header, for those who ask to see it.

    `metadata` holds every key and value of the header, arrays in full; `num_parameters` is counted from tensor shapes.
    """

    card: ModelCard
    metadata: Mapping[str, JSON]
    tensors: tuple[TensorInfo, ...]
    num_parameters: int
    projector_metadata: Mapping[str, JSON] | None = None


@dataclass(frozen=True, slots=True)
class RunnerStatus:
    """One loaded model as `ps` shows it.

    Attributes:
        state: `starting`, `ready` or `stopping`. num_active: requests it is serving.
        size_bytes, size_vram_bytes: memory in all, and on accelerators. num_ctx: window of one request in tokens.
        expires_at: seconds since the epoch when it will be unloaded if nobody asks; infinity for never.
        load_progress: how much of the model is loaded, from 0 to 1.
    """

    model: ModelCard
    backend: str
    mode: Mode
    state: str
    num_active: int
    size_bytes: int
    size_vram_bytes: int
    num_ctx: int
    expires_at: float
    load_progress: float = 1.0
