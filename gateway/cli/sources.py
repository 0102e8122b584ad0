"""What a Modelfile means on the machine where it lies: which files it speaks of, and the request that it makes.

The server never sees paths, only digests and the files' names. The rules are those of Ollama's own command line
(parser/parser.go, CreateRequest and filesForModel).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engines.request import JSON
from engines.store.modelfile import DEPRECATED, Instruction, parse_parameters, parse_requires
from gateway.cli.client import CommandFailed

_HASH_BYTES = 4 << 20
_WEIGHTS = (
    ("model*.safetensors", "*/model*.safetensors"),
    ("consolidated*.safetensors",),
    ("pytorch_model*.bin",),
    ("consolidated*.pth",),
    ("*.gguf",),
    ("*.bin",),
)
"""The first set of which there is a file counts."""

_BESIDE = ("*.json", "*/*.json", "chat_template.jinja", "tokenizer.model", "*/tokenizer.model")
_FIELDS = {"template": "template", "system": "system", "renderer": "renderer", "parser": "parser"}


@dataclass
class Sources:
    """The body of a request for a model, still without digests, and the files that it needs by their names."""

    body: dict[str, JSON] = field(default_factory=dict)
    files: dict[str, dict[str, Path]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def paths(self) -> list[Path]:
        """Every file once."""
        return list({path: None for named in self.files.values() for path in named.values()})

    def request(self, digests: dict[Path, str]) -> dict[str, JSON]:
        """The body with the files' digests."""
        named = {field: {name: digests[path] for name, path in files.items()} for field, files in self.files.items()}
        return {**self.body, **named}


def gather(instructions: Iterable[Instruction], folder: Path) -> Sources:
    """What the instructions of a Modelfile in `folder` need.

    Raises:
        CommandFailed: a file that must be there is not. ModelfileError: a parameter or a version is none.
    """
    sources, parameters = Sources(), list[tuple[str, str]]()
    for instruction in instructions:
        match instruction.command:
            case "from":
                _add_base(sources, instruction.argument, folder)
            case "adapter" | "draft" as command:
                path = _expand(instruction.argument, folder)
                if not path.exists():
                    raise CommandFailed(f"{command.upper()} {instruction.argument}: there is no such file")
                sources.files["adapters" if command == "adapter" else "draft_files"] = _named(path)
            case "license":
                sources.body.setdefault("license", []).append(instruction.argument)
            case "message":
                message = {"role": instruction.key, "content": instruction.argument}
                sources.body.setdefault("messages", []).append(message)
            case "requires":
                sources.body["requires"] = parse_requires(instruction.argument)
            case "parameter":
                parameters.append((instruction.key, instruction.argument))
            case command:
                sources.body[_FIELDS[command]] = instruction.argument
    sources.warnings += [f"warning: parameter {name} is deprecated" for name, _ in parameters if name in DEPRECATED]
    if options := parse_parameters(parameters):
        sources.body["parameters"] = options
    return sources


def digest_of(path: Path) -> str:
    """A file's digest. Raises CommandFailed when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while data := file.read(_HASH_BYTES):
                digest.update(data)
    except OSError as error:
        raise CommandFailed(f"cannot read {path}: {error.strerror}") from None
    return f"sha256:{digest.hexdigest()}"


def _add_base(sources: Sources, argument: str, folder: Path) -> None:
    """A path that exists is a file or a folder of them; everything else is a model's name."""
    path = _expand(argument, folder)
    if not path.exists():
        sources.body["from"] = argument
        return
    sources.files.setdefault("files", {}).update(_named(path))


def _expand(argument: str, folder: Path) -> Path:
    try:
        return folder / Path(argument).expanduser()
    except RuntimeError:  # nobody of that name
        return folder / argument


def _named(path: Path) -> dict[str, Path]:
    paths = _files_in(path) if path.is_dir() else [path]
    return {each.name: each for each in paths}


def _files_in(folder: Path) -> Sequence[Path]:
    for patterns in _WEIGHTS:
        weights = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        if weights:
            beside = [path for pattern in _BESIDE for path in sorted(folder.glob(pattern))]
            return [_inside(folder, path) for path in (weights if patterns == ("*.gguf",) else [*weights, *beside])]
    raise CommandFailed("no Modelfile or safetensors files found")


def _inside(folder: Path, path: Path) -> Path:
    """A file that does not lead out of its folder through a link."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CommandFailed(f"insecure path: {path} leads out of {folder}")
    return path
