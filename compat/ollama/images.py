"""Images inside bodies: standard padded base64 to file bytes (`spec/ollama.md` section 2).

The error is that of Go's decoder. Whether the bytes are an image is the engine's business.
"""

from __future__ import annotations

import base64
import binascii
import re

from engines.errors import BadRequest

_BASE64 = re.compile(r"[A-Za-z0-9+/\r\n]*")


def decode_image(text: str) -> bytes:
    """The file bytes; line breaks in the base64 are skipped. Raises BadRequest, so for a `data:` URL."""
    end = _digits_end(text)
    if text[end:].strip("\r\n=") == "":
        try:
            return base64.b64decode(text.replace("\r", "").replace("\n", ""), validate=True)
        except binascii.Error:
            pass
    raise BadRequest(f"illegal base64 data at input byte {end}")


def _digits_end(text: str) -> int:
    match = _BASE64.match(text)
    assert match is not None, "the pattern matches the empty text"
    return match.end()
