"""Uploaded files as pieces of a model: which kind of file each is, and which of them are parts of one.

Its surprise: Ollama writes every GGUF that it is given anew; here one that is whole is kept as it is, and only a model
that comes in parts is written, as one file, because Ollama can only go on with that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import msgspec

from engines.errors import BadRequest, HeadwaterError, UnsupportedFeature
from engines.library import Progress
from engines.store.gguf import GGUFHeader, merge_parts
from engines.store.manifests import LAYER_TYPE
from engines.store.workbench import COPY, Piece, Workbench

_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class SplitDamaged(HeadwaterError):
    """The files are not the parts of one model, or not all of them."""

    code = "split_damaged"


def import_files(bench: Workbench, files: Mapping[str, str], kind: str = "") -> list[Piece]:
    """The pieces that uploaded files make; `kind` is what they are for, where that is not for the files to say.

    Raises:
        BadRequest: they are nothing that a model can be made of. GGUFParseError, SplitDamaged: they are damaged.
    """
    match _file_type(bench, files):
        case "safetensors":
            raise UnsupportedFeature(
                "safetensors cannot be converted here: convert the model to GGUF with llama.cpp's "
                "convert_hf_to_gguf.py, then create it from the GGUF file"
            )
        case "gguf":
            if kind == "adapter" and len(files) > 1:
                raise BadRequest("only one adapter is currently supported")
            pieces = [_open(bench, path, files[path], "" if kind == "adapter" else kind) for path in sorted(files)]
            return _merge_splits(bench, pieces)
        case _:
            raise BadRequest("unknown type")


def _file_type(bench: Workbench, files: Mapping[str, str]) -> str:
    """What the files are by their names, or else by how they begin (server/create.go, detectModelTypeFromFiles)."""
    for path, digest in files.items():
        if path.endswith(".safetensors"):
            return "safetensors"
        if path.endswith(".gguf") or bench.magic(digest) == b"GGUF":
            return "gguf"
    return ""


def _open(bench: Workbench, path: str, digest: str, kind: str) -> Piece:
    bench.report(Progress("parsing GGUF"))
    piece = bench.reuse(digest, LAYER_TYPE, path)
    if bench.magic(digest) != b"GGUF":
        raise BadRequest("supplied file was not in GGUF format")
    piece = bench.open(piece)
    assert piece.header is not None
    media_type = f"{LAYER_TYPE}{kind or kind_of(piece.header)}"
    return dataclasses.replace(piece, layer=msgspec.structs.replace(piece.layer, media_type=media_type))


def kind_of(header: GGUFHeader) -> str:
    """What a GGUF is for (server/create.go, isProjectorGGUF): `adapter`, `projector` or `model`."""
    said = header.metadata.get("general.type")
    if said == "adapter":
        return "adapter"
    if said in ("projector", "mmproj"):
        return "projector"
    if header.count("block_count"):
        return "model"
    encodes = any(header.metadata.get(f"clip.has_{what}_encoder") for what in ("vision", "audio"))
    is_clip = header.architecture == "clip" and encodes
    return "projector" if header.count("vision.block_count") or is_clip else "model"


def _merge_splits(bench: Workbench, pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces, those of a split model as one behind all others."""
    whole: list[Piece] = []
    splits: dict[tuple[str, str, int], list[Piece]] = {}
    for piece in pieces:
        group = _split_of(piece)
        if group is None:
            whole.append(piece)
        else:
            splits.setdefault(group, []).append(piece)
    return whole + [_merge(bench, parts) for parts in splits.values()]


def _split_of(piece: Piece) -> tuple[str, str, int] | None:
    """Which split model a file is a part of; what its name says and what it says itself must agree."""
    count, path = _split_number(piece, "count"), piece.layer.source
    if count is None or count <= 1:
        return None
    named = _SPLIT_NAME.fullmatch(PurePosixPath(path).name)
    if named is None or not int(named[2]) or not int(named[3]):
        raise SplitDamaged(f'split GGUF "{path}" must use llama.cpp split filename pattern')
    if int(named[3]) != count:
        said = int(named[3])
        raise SplitDamaged(f'split GGUF "{path}" filename count {said} does not match metadata count {count}')
    number = _split_number(piece, "no")
    if number is None:
        raise SplitDamaged(f'split GGUF "{path}" is missing split.no metadata')
    if number != int(named[2]) - 1:
        said = int(named[2]) - 1
        raise SplitDamaged(f'split GGUF "{path}" filename index {said} does not match metadata index {number}')
    return piece.layer.media_type, named[1], count


def _merge(bench: Workbench, pieces: Sequence[Piece]) -> Piece:
    count = _split_number(pieces[0], "count")
    if count != len(pieces):
        raise SplitDamaged(f'split GGUF "{pieces[0].layer.source}" has {len(pieces)} shards, expected {count}')
    parts = {_split_number(piece, "no"): piece for piece in pieces}
    if sorted(parts, key=str) != sorted(range(count), key=str):
        raise SplitDamaged("split GGUF has duplicate shard index")
    ordered = [parts[number] for number in range(count)]
    split = dataclasses.replace(
        ordered[0],
        header=merge_parts([piece.header for piece in ordered if piece.header is not None]),
        parts=tuple(piece.layer for piece in ordered),
    )
    return bench.rewrite(split, COPY, "validating GGUF model")


def _split_number(piece: Piece, name: str) -> int | None:
    assert piece.header is not None
    number = piece.header.metadata.get(f"split.{name}")
    return number if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 16 else None
