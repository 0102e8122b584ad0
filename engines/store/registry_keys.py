"""The key by which Ollama's registry knows a machine, `~/.ollama/id_ed25519`, and what is signed with it.

The file is Ollama's own, in OpenSSH's form with `.pub` beside it, so whoever signed in with Ollama is signed in here.
Any key is good for public models, so one is made when there is none. The cryptography package is imported when a
registry first asks for a signature: it takes longer to load than most pulls of a manifest.
"""

from __future__ import annotations

import base64
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import RegistryError
from engines.store.blobs import StoreUnreadable, read_bounded

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_MAX_BYTES = 64 << 10


def sign(key_file: Path, text: str) -> str:
    """`<public key>:<signature>`, both in base64 (Ollama auth/auth.go, Sign). Blocks on the disk.

    Raises:
        RegistryError: the key cannot be read, used, or made.
    """
    key = _load(key_file)
    signature = base64.b64encode(key.sign(text.encode())).decode()
    return f"{_public_line(key).split()[1]}:{signature}"


def _load(key_file: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415  see the module's docstring
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key  # noqa: PLC0415

    try:
        if not key_file.exists():
            _create(key_file)
        key = load_ssh_private_key(read_bounded(key_file, _MAX_BYTES), password=None)
    except (OSError, StoreUnreadable, ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: a passphrase
        raise RegistryError(f"the key {key_file} cannot be used: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise RegistryError(f"the key {key_file} cannot be used: it is not an Ed25519 key")
    return key


def _create(key_file: Path) -> None:
    """Make a key; of two processes that do so at once, the first wins and both use its key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    key_file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    temporary = key_file.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        try:
            os.link(temporary, key_file)
        except FileExistsError:
            return
    finally:
        temporary.unlink(missing_ok=True)
    key_file.with_name(f"{key_file.name}.pub").write_text(f"{_public_line(key)}\n")


def _public_line(key: Ed25519PrivateKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: PLC0415

    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
