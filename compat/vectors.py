"""Vectors as the wire shows them: JSON numbers, or base64 (`spec/openai.md` section 6, `spec/ollama.md` section 5.4).

Numbers have as many digits as single precision needs, as Ollama prints them: half as long as double precision's. Its
surprise: NumPy does that, and is imported by the first who asks for numbers, so that a server without embeddings never
holds it.
"""

from __future__ import annotations

import sys
from base64 import b64encode
from collections.abc import Iterable

import msgspec

from engines.events import Vector

FEW = 16
"""Vectors that are written in less time than it takes to hand them to another thread."""

_encode = msgspec.json.Encoder().encode


def render_base64(vector: Vector[float]) -> str:
    """Little-endian single precision."""
    if sys.byteorder == "big":
        vector = vector[:]
        vector.byteswap()
    return b64encode(vector.tobytes()).decode("ascii")


def render_numbers(vectors: Iterable[Vector[float]]) -> list[msgspec.Raw]:
    """A JSON array for each. A thousand vectors take some 50 ms, so this belongs into a thread."""
    return [msgspec.Raw(_encode(shortest(vector))) for vector in vectors]


def shortest(vector: Vector[float]) -> list[float]:
    """The numbers as doubles whose decimal form is the shortest that is still the same in single precision.

    A decimal of up to 9 digits is an integer divided by a power of ten, and where both are exact, so is the nearest
    double, whose own shortest form is that decimal again.
    """
    import numpy as np  # noqa: PLC0415  # see above

    single = np.asarray(vector, np.float32)
    double = single.astype(np.float64)
    found = double.copy()
    left = (np.abs(double) > 1e-12) & (np.abs(double) < 1e6)  # beyond, a power of ten is not exact; all digits it is
    exponents = np.floor(np.log10(np.abs(double), out=np.zeros_like(double), where=left))
    for digits in (7, 8, 9):  # 9 are always enough for single precision
        scales = 10.0 ** (digits - 1 - exponents)
        rounded = np.rint(double * scales) / scales
        fits = left & (rounded.astype(np.float32) == single)
        found[fits] = rounded[fits]
        left &= ~fits
    numbers: list[float] = found.tolist()
    return numbers
