"""Small GGUF files and an Ollama directory, made by hand so that the store's own writers are not trusted."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KINDS = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "u64": 10, "i64": 11, "f64": 12}
FORMS = {"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "?", "u64": "Q"} | {
    "i64": "q",
    "f64": "d",
}

LLAMA: dict[str, tuple[str, Any]] = {
    "general.architecture": ("str", "llama"),
    "general.file_type": ("u32", 15),
    "llama.context_length": ("u32", 2048),
    "llama.embedding_length": ("u32", 64),
}


def text(value: str | bytes) -> bytes:
    """A GGUF string."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def member(key: str | bytes, kind: str, value: Any) -> bytes:
    """One key and its value; a kind in brackets, such as `[u32]`, is an array."""
    if kind == "str":
        return text(key) + struct.pack("<I", 8) + text(value)
    if kind == "[str]":
        return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(item) for item in value)
    if kind.startswith("["):
        kind = kind[1:-1]
        packed = struct.pack(f"<{len(value)}{FORMS[kind]}", *value)
        return text(key) + struct.pack("<IIQ", 9, KINDS[kind], len(value)) + packed
    return text(key) + struct.pack(f"<I{FORMS[kind]}", KINDS[kind], value)


def tensor(name: str, shape: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """One tensor's entry in the header."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(
    members: Mapping[str, tuple[str, Any]], tensors: Sequence[bytes] = (), data: bytes = b"", version: int = 3
) -> bytes:
    """A whole file, its tensor data aligned to 32 bytes."""
    entries = [member(key, kind, value) for key, (kind, value) in members.items()]
    return raw_gguf(entries, tensors, data, version)


def raw_gguf(entries: Sequence[bytes], tensors: Sequence[bytes] = (), data: bytes = b"", version: int = 3) -> bytes:
    """As `gguf`, from entries that may be broken."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join([*entries, *tensors])
    return head + bytes(-len(head) % 32) + data


def small_llama(**more: tuple[str, Any]) -> bytes:
    """A model of 2 x 4 F32 parameters; `more` metadata has `__` for a dot."""
    members = LLAMA | {key.replace("__", "."): value for key, value in more.items()}
    return gguf(members, [tensor("token_embd.weight", (4, 2))], bytes(32))


class OllamaDirectory:
    """Writes models the way Ollama lays them out."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def blob(self, data: bytes) -> str:
        """Store a blob and return its digest."""
        digest = hashlib.sha256(data).hexdigest()
        path = self.root / "blobs" / f"sha256-{digest}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # Ollama never writes into a blob that others may be reading
            path.write_bytes(data)
        return f"sha256:{digest}"

    def path_of(self, digest: str) -> Path:
        """Where a blob is."""
        return self.root / "blobs" / digest.replace(":", "-")

    def layer(self, kind: str, data: bytes, **more: str) -> dict[str, Any]:
        """Store a layer's blob and describe it as a manifest does."""
        media_type = f"application/vnd.ollama.image.{kind}"
        return {"mediaType": media_type, "digest": self.blob(data), "size": len(data), **more}

    def model(self, path: str, layers: Sequence[dict[str, Any]], config: Mapping[str, Any] | None = None) -> Path:
        """Write the manifest at `host/namespace/model/tag`."""
        config_data = json.dumps(config or {}).encode()
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                "digest": self.blob(config_data),
                "size": len(config_data),
            },
            "layers": list(layers),
        }
        return self.raw_manifest(path, json.dumps(manifest).encode())

    def raw_manifest(self, path: str, data: bytes) -> Path:
        """Write anything where a manifest belongs."""
        file = self.root / "manifests" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return file
