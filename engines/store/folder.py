"""A plain folder of GGUF files, only ever read, as a place where models come from.

A file `Qwen2.5-0.5B-Q4_K_M.gguf` is the model `Qwen2.5-0.5B-Q4_K_M:latest`; in a folder below it has that folder's name
before its own: `publisher/...`. The parts of a split model are one, and a projector (`mmproj`) goes with the models
beside it that share its name, or with the only one. Its surprise: nobody hashes files of many gigabytes to show a list,
so the digests are of where a file is and which, not of what is in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.errors import InvalidModelName
from engines.model import ModelCard
from engines.store.cards import FileState, InstalledModel, header_of, with_facts
from engines.store.gguf import merge_parts
from engines.store.manifests import BLANK_CONFIG
from engines.store.names import DEFAULT_HOST, DEFAULT_NAMESPACE, DEFAULT_TAG, ModelName, parse_name, without_local

MAX_DEPTH = 4
MAX_FILES = 10_000
"""Of one folder; what lies deeper, or comes later, is not looked at."""

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
_QUANTIZATION = re.compile(r"[-._](?:(?:i?q|tq)\d\w*|b?f16|f32|mxfp4\w*)$", re.IGNORECASE)
_FORBIDDEN = re.compile(r"-*[^A-Za-z0-9_.-]+-*")


@dataclass(frozen=True, slots=True)
class FolderModel:
    """One model of a folder: its name, its weights in order, and its projectors."""

    name: ModelName
    weights: tuple[Path, ...]
    projectors: tuple[Path, ...]


class Folder:
    """See the module."""

    is_writable = False

    def __init__(self, root: Path) -> None:
        self.title = f"the folder {root}"
        self._root = root
        self._paths: dict[str, Path] = {}

    def walk(self) -> Iterator[FolderModel]:
        """See `providers.Provider`. Of two files that make the same name, the one whose path sorts first counts."""
        found: dict[str, FolderModel] = {}
        for directory, files in _directories(self._root):
            for model in _models_in(self._root, directory, files):
                found.setdefault(model.name.full.lower(), model)
        return iter(found.values())

    def locate(self, name: str) -> FolderModel | None:
        """Upper and lower case are ignored."""
        wanted = parse_name(without_local(name)).full.lower()
        return next((model for model in self.walk() if model.name.full.lower() == wanted), None)

    def read(self, key: FolderModel) -> InstalledModel:
        """See `providers.Provider`."""
        weights = [FileState.of(path) for path in key.weights]
        projectors = [FileState.of(path) for path in key.projectors]
        identity = _identity(weights)
        card = ModelCard(
            name=key.name.display,
            full_name=key.name.full,
            namespace=key.name.namespace,
            digest=_identity([*weights, *projectors]),
            weights=key.weights[0],
            weights_digest=f"sha256:{identity}",
            size_bytes=sum(file.size_bytes for file in (*weights, *projectors)),
            modified_at=max(file.mtime_ns for file in weights) / 1e9,
            weight_parts=key.weights if len(key.weights) > 1 else (),
            projectors=key.projectors,
        )
        self._paths[card.weights_digest] = key.weights[0]
        headers = [header for file in weights if (header := header_of(file)) is not None]
        header = merge_parts(headers) if len(headers) == len(weights) else None
        return InstalledModel(with_facts(card, BLANK_CONFIG, header), (*weights, *projectors))

    def weights(self, digest: str) -> Path | None:
        """See `providers.Provider`."""
        return self._paths.get(digest)


def _directories(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Directories with the GGUF files in them, in order of their paths."""
    left = MAX_FILES
    for directory, below, files in os.walk(root):
        path = Path(directory)
        depth = len(path.relative_to(root).parts)
        below[:] = sorted(each for each in below if not each.startswith(".")) if depth < MAX_DEPTH else []
        names = sorted(name for name in files if name.lower().endswith(".gguf") and not name.startswith("."))[:left]
        left -= len(names)
        if names:
            yield path, names


def _models_in(root: Path, directory: Path, files: Sequence[str]) -> Iterator[FolderModel]:
    stems = {name[: -len(".gguf")]: directory / name for name in files}
    projectors = [stem for stem in stems if "mmproj" in stem.lower()]
    groups: dict[str, list[str]] = defaultdict(list)
    for stem in stems:
        if stem not in projectors:
            split = _SPLIT.fullmatch(stem)
            groups[f"{split[1]}/{split[3]}" if split else stem].append(stem)
    for group, members in groups.items():
        base, _, count = group.partition("/")
        if count and [_SPLIT.fullmatch(stem)[2] for stem in members] != [f"{n:05}" for n in range(1, int(count) + 1)]:  # type: ignore[index]
            continue  # parts are missing
        namespace = _clean(directory.name).replace(".", "-") if directory != root else DEFAULT_NAMESPACE
        try:
            name = ModelName(DEFAULT_HOST, namespace, _clean(base), DEFAULT_TAG)
        except InvalidModelName:
            continue
        mine = [stem for stem in projectors if len(groups) == 1 or _belongs(stem, base)]
        yield FolderModel(name, tuple(stems[stem] for stem in members), tuple(stems[stem] for stem in mine))


def _belongs(projector: str, model: str) -> bool:
    """Whether a projector's name, without what says that it is one, is what a model's name begins with."""
    base = re.sub(r"[-._]?mmproj[-._]?", "", projector, flags=re.IGNORECASE)
    base = _QUANTIZATION.sub("", base)
    return bool(base) and model.lower().startswith(base.lower())


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("-", text).strip(".-")[:80]


def _identity(files: Sequence[FileState]) -> str:
    """64 hex digits that stay the same as long as the files are the same."""
    return hashlib.sha256(repr([dataclasses.astuple(file) for file in files]).encode()).hexdigest()
