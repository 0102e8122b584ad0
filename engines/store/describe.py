"""The config of a model that is being made: what its files, its base and the request say about it.

The rules are Ollama's (server/create.go, createModel), so that equal models have equal configs to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from engines.errors import BadRequest
from engines.request import JSON
from engines.store.manifests import DraftConfig, ModelConfig
from engines.store.workbench import Piece

_ARCHITECTURES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "gemma4": ("gemma4", ("<turn|>",)),
    "laguna": ("laguna", ()),
    "nemotron_h": ("nemotron-3-nano", ()),
    "nemotron_h_moe": ("nemotron-3-nano", ()),
    "nemotron_h_omni": ("nemotron-3-nano", ()),
}
"""Renderer and parser, and stop strings, of models whose files do not say them."""

_TEXTS = {
    "model_family": "model_family",
    "base_name": "base_name",
    "quantization_level": "file_type",
    "parameter_size": "model_type",
}
_COUNTS = ("context_length", "embedding_length")
_MAX_COUNT = 1 << 48


def with_info(config: ModelConfig, info: Mapping[str, JSON]) -> ModelConfig:
    """The config with what the request says itself.

    Raises:
        BadRequest: a field has the wrong type.
    """
    facts: dict[str, JSON] = {field: _text(info, name) for name, field in _TEXTS.items() if name in info}
    facts |= {name: _count(info, name) for name in _COUNTS if name in info}
    if facts.get("model_family"):
        facts["model_families"] = (facts["model_family"],)
    if isinstance(info.get("capabilities"), list):
        said = (each if isinstance(each, str) else "" for each in info["capabilities"])
        facts["capabilities"] = (*config.capabilities, *said)
    return msgspec.structs.replace(config, **facts)


def with_weights(config: ModelConfig, pieces: Sequence[Piece]) -> ModelConfig:
    """The config with what the headers say; the first model counts, but every one adds its family."""
    for piece in pieces:
        header = piece.header
        if header is None:
            continue
        if piece.layer.kind == "draft":
            config = msgspec.structs.replace(config, draft=DraftConfig("gguf", header.architecture))
        elif piece.layer.kind == "model":
            renderer = _ARCHITECTURES.get(header.architecture, ("", ()))[0]
            config = msgspec.structs.replace(
                config,
                model_format=config.model_format or "gguf",
                model_family=config.model_family or header.architecture,
                model_families=(*(config.model_families or ()), header.architecture),
                model_type=config.model_type or header.parameter_size,
                file_type=config.file_type or header.file_type,
                renderer=config.renderer or renderer,
                parser=config.parser or renderer,
            )
    return config


def default_stop(config: ModelConfig, pieces: Sequence[Piece]) -> tuple[str, ...]:
    """The stop strings of models whose renderer is chosen by their architecture; `config` is as it was before that."""
    if config.renderer and config.parser:
        return ()
    headers = (piece.header for piece in pieces if piece.header and piece.layer.kind == "model")
    return next((_ARCHITECTURES[h.architecture][1] for h in headers if h.architecture in _ARCHITECTURES), ())


def _text(info: Mapping[str, JSON], name: str) -> str:
    value = info[name]
    if not isinstance(value, str):
        raise BadRequest(f'info field "{name}" must be a string', param="info")
    return value


def _count(info: Mapping[str, JSON], name: str) -> int:
    value = info[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRequest(f'info field "{name}" must be a number', param="info")
    if value != value or not 0 <= value <= _MAX_COUNT or int(value) != value:
        raise BadRequest(f'info field "{name}" must be a non-negative integer', param="info")
    return int(value)
