"""Installed and loaded models as `/api/tags` and `/api/ps` list them (`spec/ollama.md` sections 4.1 and 4.2). Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, tzinfo

from msgspec import UNSET

from compat.ollama.gojson import encode
from compat.ollama.schema import Details, Processes, ProcessModel, Tags, TagsModel
from engines.model import ModelCard, RunnerStatus

_FOREVER_S = 2**63 / 1e9
"""Go's longest duration, some 292 years, which is what "for ever" looks like here."""


def render_tags(cards: Iterable[ModelCard]) -> bytes:
    """The installed models, in the given order."""
    return encode(Tags([_tags_model(card) for card in cards]))


def render_processes(runners: Iterable[RunnerStatus], now_s: float) -> bytes:
    """The loaded models, the one that stays longest first."""
    ordered = sorted(runners, key=lambda runner: -runner.expires_at)
    return encode(Processes([_process_model(runner, now_s) for runner in ordered]))


def render_details(card: ModelCard) -> Details:
    """`details` without the lengths."""
    return Details(card.parent, card.format, card.family, card.families, card.parameter_size, card.quantization)


def render_local_time(seconds: float, zone: tzinfo | None = None) -> str:
    """RFC 3339 with the server's offset, `zone` or the system's; UTC is `Z`, as Go writes it."""
    moment = datetime.fromtimestamp(seconds, UTC).astimezone(zone)
    whole, _, rest = moment.isoformat(timespec="microseconds").partition(".")
    fraction, offset = rest[:6].rstrip("0"), rest[6:]
    return whole + (f".{fraction}" if fraction else "") + ("Z" if offset == "+00:00" else offset)


def _tags_model(card: ModelCard) -> TagsModel:
    details = render_details(card)
    details.context_length = card.context_length or UNSET
    details.embedding_length = card.embedding_length or UNSET
    return TagsModel(
        name=card.name,
        model=card.name,
        remote_model=card.remote_model or UNSET,
        remote_host=card.remote_host or UNSET,
        modified_at=render_local_time(card.modified_at),
        size=card.size_bytes,
        digest=card.digest,
        details=details,
        capabilities=card.capabilities or UNSET,
    )


def _process_model(runner: RunnerStatus, now_s: float) -> ProcessModel:
    details = render_details(runner.model)
    details.parent_model = ""
    return ProcessModel(
        name=runner.model.name,
        model=runner.model.name,
        size=runner.size_bytes,
        digest=runner.model.digest,
        details=details,
        expires_at=render_local_time(min(runner.expires_at, now_s + _FOREVER_S)),
        size_vram=runner.size_vram_bytes,
        context_length=runner.num_ctx,
        load_progress=round(runner.load_progress, 2) if runner.state == "starting" else UNSET,
    )
