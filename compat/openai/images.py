"""Images inside messages: base64, bare or in a data URL, to file bytes (`spec/openai.md` section 4.2).

Checks that the bytes begin like an image file; decoding pixels is the engine's. Nothing is ever fetched.
"""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from compat.openai.refusals import invalid, unsupported_value
from engines.errors import BadRequest

_DATA_URL = re.compile(r"data:(?P<mime>[^;,]*)(?P<parameters>(?:;[^;,]*)*),(?P<data>.*)", re.DOTALL | re.IGNORECASE)
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
_MIMES = {"", "image/png", "image/jpeg", "image/jpg", "image/webp", "image/gif", "image/bmp"}
_URL_SAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")


def decode_image(url: str, path: str) -> bytes:
    """The file bytes of an `image_url`, found at `path` of the body.

    Raises:
        UnsupportedFeature: it is a link and not the image itself.
        BadRequest: it is no image; the reason is `invalid_image`.
    """
    text = url.strip()
    if link := _SCHEME.match(text):
        why = f"{link['scheme'].lower()}:// images are not fetched, send a base64 data URL"
        raise unsupported_value(path, why)
    if match := _DATA_URL.fullmatch(text):
        if match["mime"].lower() not in _MIMES or not match["parameters"].lower().endswith(";base64"):
            raise _bad_image(path, "expected data:image/...;base64,...")
        text = match["data"]
    image = _decode_base64(text, path)
    if not _looks_like_an_image(image):
        raise _bad_image(path, "not a PNG, JPEG, GIF, WebP or BMP file")
    return image


def _decode_base64(text: str, path: str) -> bytes:
    data = b"".join(unquote_to_bytes(text).split()).translate(_URL_SAFE_TO_STANDARD).rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error:
        raise _bad_image(path, "not valid base64") from None


def _looks_like_an_image(data: bytes) -> bool:
    if data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM")):
        return True
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP"


def _bad_image(path: str, why: str) -> BadRequest:
    return invalid(path, why, "invalid_image")
