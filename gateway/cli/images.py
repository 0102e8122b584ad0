"""Pictures that a prompt names by their paths, taken out of it and sent along, as Ollama's command line does.

A path begins with `/`, `./`, `../`, `~/` or a drive, may hold spaces after a backslash, and ends like a picture's name.
Only files that are there count: everything else stays text.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

from gateway.cli.client import CommandFailed

MAX_BYTES = 100 << 20
_PATH = re.compile(r"(?:[A-Za-z]:[/\\]|~/|\.{0,2}/)(?:\\.|[^\s\\])*?\.(?:jpe?g|png|webp)\b", re.IGNORECASE)
_ESCAPED = re.compile(r"\\([^\w\\])")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")


def find_images(text: str) -> dict[str, Path]:
    """The files that a text names, by how it writes them."""
    named = {found: Path(_ESCAPED.sub(r"\1", found)).expanduser() for found in _PATH.findall(text)}
    return {written: path for written, path in named.items() if path.is_file()}


def without_images(text: str, images: dict[str, Path]) -> str:
    """The text without the paths, and without quotes that are left of them."""
    for written in sorted(images, key=len, reverse=True):
        for form in (f"'{written}'", f'"{written}"', written):
            text = text.replace(form, "")
    return text.strip()


def read_image(path: Path) -> str:
    """A picture in the form that the API takes: base64.

    Raises:
        CommandFailed: it cannot be read, is too large, or is no picture.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CommandFailed(f"{path} is larger than {MAX_BYTES >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise CommandFailed(f"cannot read {path}: {error.strerror}") from None
    if not data.startswith(_MAGIC):
        raise CommandFailed(f"{path} is no JPEG, PNG or WebP picture")
    return base64.b64encode(data).decode("ascii")
