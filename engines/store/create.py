"""Models made from other models and from uploaded files (`spec/ollama.md` section 7.7).

The order of the layers, what is inherited and every byte that is written are Ollama's (server/create.go), so that the
same Modelfile gives the same digests. Nothing is visible before the manifest is written, which is the last thing done.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from engines.errors import BadRequest, ModelNotFound, TemplateError
from engines.library import CreateRequest, Progress
from engines.request import JSON
from engines.store.blobs import DIGEST_PATTERN, StoreNotWritable, blob_path, read_bounded
from engines.store.describe import default_stop, with_info, with_weights
from engines.store.gguf import GGUFHeader
from engines.store.gojson import encode_json
from engines.store.importing import import_files
from engines.store.manifests import (
    BLANK_CONFIG,
    CONFIG_TYPE,
    MAX_JSON_BYTES,
    Manifest,
    ModelConfig,
    decode_json,
    locate,
    read_config,
    read_manifest,
)
from engines.store.messages import encode_messages
from engines.store.names import parse_name, without_local
from engines.store.workbench import Piece, Report, Rewrite, Workbench
from engines.store.writer import StoreWriter

_GGUF_KINDS = ("model", "projector", "adapter", "draft")
_PLAIN_TYPES = ("F16", "BF16", "F32")
_QUANTIZED_TYPES = {
    *("F32", "F16", "BF16", "Q4_K_S", "Q4_K_M", "Q4_K", "Q8_0"),
    *("Q3_K_M", "Q4_0", "Q5_K_S", "Q5_K_M", "Q6_K"),
}
"""More than Ollama makes."""


class QuantizeRefused(BadRequest):
    """The weights cannot become what was asked for. Ollama answers 500 here, and clients see that status."""

    status = 500
    code = "quantize_refused"


class Creator:
    """Makes models in one store.

    Args:
        rewrite: what quantizes weights and merges the parts of a split model.
        check_template: raises TemplateError for a Go template that cannot be parsed.
    """

    def __init__(self, writer: StoreWriter, *, rewrite: Rewrite, check_template: Callable[[str], None]) -> None:
        self._writer = writer
        self._rewrite = rewrite
        self._check_template = check_template

    def has_base(self, request: CreateRequest) -> bool:
        """Whether the model that the request starts from is there. Raises InvalidModelName."""
        return locate(self._writer.models, parse_name(without_local(request.base))) is not None

    def run(self, request: CreateRequest, report: Report) -> None:
        """Make the model; `report` is told every step. Blocks for as long as that takes.

        Raises:
            BadRequest, ModelNotFound, GGUFParseError, ManifestDamaged, SplitDamaged: it cannot be made.
            StoreNotWritable: the directory or the disk refuses. Whatever `report` and the rewriting raise.
        """
        made: set[str] = set()
        try:
            with self._writer.holds.holding() as hold:
                self._make(Workbench(self._writer.models, hold, report, self._rewrite, made), request)
        except BaseException:
            with suppress(StoreNotWritable):  # what went wrong first is what counts
                self._writer.discard(made)
            raise
        report(Progress("success"))

    def _make(self, bench: Workbench, request: CreateRequest) -> None:
        pieces, config = self._start(bench, request)
        pieces = [_quantize(bench, piece, request) for piece in pieces]
        stop = default_stop(config, pieces)
        parameters = {"stop": list(stop), **request.parameters} if stop else request.parameters
        config = with_weights(config, pieces)
        pieces = self._dress(bench, pieces, dataclasses.replace(request, parameters=parameters))
        for piece in pieces:
            bench.report(Progress(piece.status))
        config_layer = bench.new("", encode_json(config), CONFIG_TYPE).layer
        bench.report(Progress("writing manifest"))
        manifest = Manifest(config=config_layer, layers=tuple(piece.layer for piece in pieces))
        self._writer.commit(parse_name(request.name), encode_json(manifest))

    def _start(self, bench: Workbench, request: CreateRequest) -> tuple[list[Piece], ModelConfig]:
        """The pieces of the base or the files, with what is added to them, and the config as far as it is known."""
        config = msgspec.structs.replace(
            BLANK_CONFIG,
            renderer=request.renderer,
            parser=request.parser,
            requires=request.requires,
            architecture="amd64",  # what Ollama writes everywhere
            os="linux",
        )
        if request.base:
            pieces, config = self._from_base(bench, request.base, config)
        elif request.files is not None:
            pieces = import_files(bench, request.files)
        else:
            raise BadRequest("neither 'from' or 'files' was specified")
        drafts = import_files(bench, request.draft_files, "draft") if request.draft_files else []
        adapters = import_files(bench, request.adapters, "adapter") if request.adapters else []
        return [*pieces, *adapters, *drafts], with_info(config, request.info or {})

    def _from_base(self, bench: Workbench, base: str, config: ModelConfig) -> tuple[list[Piece], ModelConfig]:
        models = self._writer.models
        name = locate(models, parse_name(without_local(base)))
        if name is None:
            raise ModelNotFound(base)
        try:
            manifest, _ = read_manifest(models, name)
            inherited = read_config(models, manifest)
        except FileNotFoundError:
            raise ModelNotFound(base) from None
        try:
            pieces = [bench.reuse(each.digest, each.media_type, name.display, each.name) for each in manifest.layers]
        except BadRequest:  # a blob is missing, or the model is just being deleted
            raise ModelNotFound(base) from None
        pieces = [bench.open(piece) if piece.layer.kind in _GGUF_KINDS else piece for piece in pieces]
        return pieces, msgspec.structs.replace(
            inherited if inherited.remote_host else config,  # of what runs elsewhere nothing else is known
            model_format=inherited.model_format,
            renderer=config.renderer or inherited.renderer,
            parser=config.parser or inherited.parser,
            requires=config.requires or inherited.requires,
            capabilities=inherited.capabilities,
        )

    def _dress(self, bench: Workbench, pieces: Sequence[Piece], request: CreateRequest) -> list[Piece]:
        """The pieces with the texts that the request replaces or adds, in Ollama's order."""
        pieces = list(pieces)
        if request.template:
            try:
                self._check_template(request.template)
            except TemplateError as error:
                raise BadRequest(f"template error: {error.message}") from None
            pieces = [*_without(pieces, "template"), bench.new("template", _text(request.template))]
        if request.system:
            pieces = [*_without(pieces, "system"), bench.new("system", _text(request.system))]
        pieces += [bench.new("license", _text(text)) for text in request.licenses if text]
        parameters = {**self._parameters_of(pieces), **request.parameters}
        if parameters:
            pieces = [*_without(pieces, "params"), bench.new("params", _json(parameters))]
        if request.messages:
            pieces = [*_without(pieces, "messages"), bench.new("messages", encode_messages(request.messages))]
        return pieces

    def _parameters_of(self, pieces: Sequence[Piece]) -> dict[str, JSON]:
        parameters: dict[str, JSON] = {}
        for piece in pieces:
            if piece.layer.kind == "params":
                data = read_bounded(blob_path(self._writer.models, piece.layer.digest), MAX_JSON_BYTES)
                parameters = {**decode_json(data, dict[str, Any], "the params layer"), **parameters}
        return parameters


def check_request(request: CreateRequest) -> None:
    """What can be told before anything is done (server/create.go, CreateHandler).

    Raises:
        InvalidModelName, BadRequest.
    """
    for files in (request.files, request.draft_files):
        for path, digest in (files or {}).items():
            if not _is_local(path):
                raise BadRequest("file path must be relative")
            _require_digest(digest)
    if request.draft_quantize and not request.draft_files:
        raise BadRequest("--draft-quantize requires a DRAFT model")
    for digest in (request.adapters or {}).values():
        _require_digest(digest)
    parse_name(request.name)
    if request.base:
        parse_name(without_local(request.base))
    elif request.files is None:
        raise BadRequest("neither 'from' or 'files' was specified")


def _is_local(path: str) -> bool:
    """Go's fs.ValidPath: no empty element, and none that leads elsewhere."""
    return path == "." or all(part not in ("", ".", "..") for part in path.split("/"))


def _require_digest(digest: str) -> None:
    if not re.match(DIGEST_PATTERN, digest.replace("-", ":", 1).lower()):
        raise BadRequest("invalid digest format")


def _quantize(bench: Workbench, piece: Piece, request: CreateRequest) -> Piece:
    kind = piece.layer.kind
    wanted = {"model": request.quantize, "draft": request.draft_quantize}.get(kind, "").upper()
    if not wanted or piece.header is None:
        return piece
    if wanted not in _QUANTIZED_TYPES:
        supported = "F32, F16, Q4_K_S, Q4_K_M, Q8_0"
        raise QuantizeRefused(f"unsupported quantization type {wanted} - supported types are {supported}")
    wanted = "Q4_K_M" if wanted == "Q4_K" else wanted
    is_now = _plain_type(piece.header)
    if not is_now and kind == "draft":
        raise QuantizeRefused(f"draft quantization requires an unquantized draft model, got {piece.header.file_type}")
    if not is_now:
        raise QuantizeRefused("quantization is only supported for F16, BF16 and F32 models")
    return piece if is_now == wanted else bench.rewrite(piece, wanted, f"quantizing {is_now} model to {wanted}")


def _plain_type(header: GGUFHeader) -> str:
    """F16, BF16 or F32 for weights that are not quantized, else nothing. Many F32 files do not say what they are."""
    if header.file_type in _PLAIN_TYPES:
        return header.file_type
    kinds = {tensor.type for tensor in header.tensors}
    return "F32" if header.file_type == "unknown" and kinds == {"F32"} else ""


def _without(pieces: Iterable[Piece], kind: str) -> list[Piece]:
    return [piece for piece in pieces if piece.layer.kind != kind]


def _text(text: str) -> bytes:
    return text.encode(errors="replace")


def _json(value: JSON) -> bytes:
    try:
        return encode_json(value)
    except ValueError as error:
        raise BadRequest(str(error)) from None
