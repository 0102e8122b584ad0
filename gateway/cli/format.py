"""Numbers and times as people read them; pure, and the only place that decides how they look.

Sizes, relative times and the processor split follow Ollama's command line (spec/ollama.md sections 4.2 and 12). The
surprise is theirs: sizes are decimal, and from 10 up they are cut to an integer instead of rounded.
"""

from __future__ import annotations

import math
import unicodedata
from datetime import datetime, timedelta

_YEAR = timedelta(days=365)


def size(num_bytes: int) -> str:
    """`42 GB`, `4.7 GB`, `2 GB` for exactly two, `512 B`."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "KB")):
        value = num_bytes / 1000**power
        if value >= 1:
            return f"{value:.1f} {unit}" if value < 10 and value != int(value) else f"{int(value)} {unit}"
    return f"{num_bytes} B"


def count(number: int) -> str:
    """Exact below ten thousand, then three digits: `9999`, `12.3K`, `456K`, `7.89M`."""
    if number < 10_000:
        return str(number)
    for power, unit in ((1, "K"), (2, "M"), (3, "B")):
        value = number / 1000**power
        if value < 999.5 or unit == "B":
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f}{unit}"
    raise AssertionError("the last unit takes every number")


def parameters(number: int) -> str:
    """A model's parameter count as Ollama writes it: `3.2B`, `7B`, `567.75M`, `12K` (spec/ollama.md section 7.7)."""
    if number >= 10**9:
        return f"{number / 10**9:.1f}".removesuffix(".0") + "B"
    if number >= 10**6:
        return f"{number / 10**6:.2f}".removesuffix(".00") + "M"
    return f"{number // 1000}K" if number >= 1000 else str(number)


def relative_time(when: datetime, now: datetime) -> str:
    """`2 weeks ago`, `4 minutes from now`, `Forever` from twenty-one years ahead, `Never` for year one (Go's zero)."""
    if when.year == 1:
        return "Never"
    passed = now - when
    if passed <= -21 * _YEAR:
        return "Forever"
    if passed < timedelta(0):
        return f"{_about(-passed)} from now"
    return f"{_about(passed)} ago"


def until(expires_at: datetime, now: datetime) -> str:
    """When a loaded model will leave: as `relative_time`, but `Stopping...` once the moment has passed."""
    return "Stopping..." if expires_at < now else relative_time(expires_at, now)


def _about(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    if seconds < 60:
        return {0: "Less than a second", 1: "1 second"}.get(seconds, f"{seconds} seconds")
    minutes = seconds // 60
    if minutes < 60:
        return "About a minute" if minutes == 1 else f"{minutes} minutes"
    hours = math.floor(span.total_seconds() / 3600 + 0.5)
    for limit, unit_hours, unit in ((48, 1, "hours"), (336, 24, "days"), (1440, 168, "weeks"), (17520, 720, "months")):
        if hours < limit:
            return "About an hour" if hours == 1 else f"{hours // unit_hours} {unit}"
    return f"{hours // 8760} years"


def duration(seconds: float) -> str:
    """`85.2ms`, `4.31s`, `2m5.0s`."""
    if seconds < 0.99995:
        return f"{seconds * 1000:.1f}ms"
    if seconds < 59.995:
        return f"{seconds:.2f}s"
    minutes, tenths = divmod(round(seconds * 10), 600)
    return f"{minutes}m{tenths / 10:.1f}s"


def processor(size_bytes: int, size_vram_bytes: int) -> str:
    """Where a loaded model lies: `100% CPU`, `100% GPU`, `40%/60% CPU/GPU`, or `Unknown`."""
    if size_vram_bytes == 0:
        return "100% CPU"
    if size_vram_bytes == size_bytes:
        return "100% GPU"
    if size_bytes == 0 or size_vram_bytes > size_bytes:
        return "Unknown"
    cpu = math.floor((size_bytes - size_vram_bytes) / size_bytes * 100 + 0.5)
    return f"{cpu}%/{100 - cpu}% CPU/GPU"


def printable(text: str) -> str:
    """Text without control characters other than newline and tab, which could take over the reader's terminal."""
    return "".join(_safe(character) for character in text)


def _safe(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs"):
        return character
    return "" if character == "\r" else "\N{REPLACEMENT CHARACTER}"
