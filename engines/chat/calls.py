"""Tool calls in the replies of models whose template alone says how they look (`spec/ollama.md` section 8.6).

After the tag that the template writes before a call, the first name of a tool that was offered and the first JSON
object make a call, in whatever else there is around them. Text is looked at once, however it is cut. The surprise: a
tag that is a mere brace means that a reply either is a call from its first character or has none.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import msgspec

from engines.request import JSON

_SIGNS = re.compile(r'[][{}"\\]')
_MAX_DEPTH = 64
Call = tuple[str, dict[str, JSON]]
"""A tool's name and its arguments."""


class CallFinder:
    """One reply. `decode(text)` returns the text that is certain to be none of a call, and calls.

    Args:
        tag: what comes before a call. names: of the tools that were offered.
    """

    def __init__(self, tag: str, names: Collection[str]) -> None:
        self._tag = tag
        self._is_bare = tag in ("{", "[")
        self._longest = max(map(len, names))
        self._beginnings = {name[:end] for name in names for end in range(1, len(name))}
        self._name = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        self._state = "text"
        self._num_calls = 0
        self._buffer = ""
        self._begin()

    def _begin(self) -> None:
        """Look for the next call from the beginning of the buffer."""
        self._at = 0
        self._depth = 0
        self._num_brackets = 0
        self._start = -1
        self._in_string = False
        self._objects: list[tuple[int, dict[str, JSON]]] = []
        self._is_whole = False
        self._named: re.Match[str] | None = None
        self._looked = 0

    @property
    def is_calling(self) -> bool:
        """Whether the tag has come and no end of it."""
        return self._state == "call"

    def decode(self, text: str) -> list[str | Call]:
        """Take in the next piece."""
        if self._state == "none":
            return [text]
        self._buffer += text
        found: list[str | Call] = []
        if self._state == "text":
            found += self._text()
        if self._state == "call":
            found += self._calls(is_over=False)
        return [piece for piece in found if piece]

    def flush(self) -> list[str | Call]:
        """What is left when the reply is over: what was no call is text after all."""
        found: list[str | Call] = []
        if self._state == "call":
            found += self._calls(is_over=True)
        rest, self._buffer = self._buffer, ""
        if rest and not (self._num_calls and self._state == "call"):
            found.append(rest)
        return found

    def _text(self) -> list[str | Call]:
        at = self._buffer.find(self._tag)
        end = at if at >= 0 else len(self._buffer) - overlap(self._buffer, self._tag)
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        if self._is_bare and text.strip():
            self._state = "none"
            text, self._buffer = text + self._buffer, ""
        elif at >= 0:
            self._state = "call"
        return [text]

    def _calls(self, *, is_over: bool) -> list[str | Call]:
        calls: list[str | Call] = []
        while (call := self._call(is_over=is_over)) is not None:
            calls.append(call)
            self._num_calls += 1
        waits = self._objects and not is_over and self._may_grow()  # for the rest of a name
        if self._is_bare and self._is_whole and not self._num_calls and not waits:
            self._state = "none"
            calls.append(self._buffer)
            self._buffer = ""
        return calls

    def _call(self, *, is_over: bool) -> Call | None:
        """The next call, cut from the buffer with what is before it."""
        self._scan()
        if not self._objects:
            return None
        self._look()
        if self._named is None:
            return None
        if not is_over and self._may_grow():
            self._looked, self._named = self._named.start() + self._longest, None
            return None
        end, value = self._objects[0]
        name = self._named[0]
        arguments = _arguments(value, name)
        self._buffer = self._buffer[max(end, self._named.end()) :]
        self._begin()
        return name, value if arguments is None else arguments

    def _scan(self) -> None:
        """Note the objects that are whole; what is not valid JSON is none."""
        while match := _SIGNS.search(self._buffer, self._at):
            sign, self._at = match[0], match.end()
            if sign == "\\":
                if self._at == len(self._buffer):  # what it escapes has not come yet
                    self._at -= 1
                    return
                self._at += 1
            elif sign == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                continue
            elif sign in "{}":
                self._brace(sign)
            else:
                self._bracket(sign)
        self._at = len(self._buffer)

    def _brace(self, sign: str) -> None:
        if sign == "{":
            if not self._depth:
                self._start = self._at - 1
            self._depth += 1
            return
        self._depth = max(self._depth - 1, 0)
        if self._depth or self._start < 0:
            return
        self._is_whole = self._is_whole or self._tag == "{"
        try:
            value = msgspec.json.decode(self._buffer[self._start : self._at])
        except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
            value = None
        if isinstance(value, dict):
            self._objects.append((self._at, value))
        self._start = -1

    def _bracket(self, sign: str) -> None:
        self._num_brackets += 1 if sign == "[" else -1
        self._is_whole = self._is_whole or (self._tag == "[" and not self._num_brackets)

    def _look(self) -> None:
        """Find the first tool's name, the longest where several begin; what was looked through is not again."""
        if self._named is None:
            self._named = self._name.search(self._buffer, max(self._looked - self._longest, 0))
            self._looked = len(self._buffer)

    def _may_grow(self) -> bool:
        """Whether the buffer ends in the beginning of a name, so that what was found may be part of a longer one."""
        ends = (self._buffer[-size:] for size in range(1, self._longest))
        return any(end in self._beginnings for end in ends)


def _arguments(value: dict[str, JSON], name: str, depth: int = 0) -> dict[str, JSON] | None:
    """A call's arguments inside an object, which need not be on top; None where there is no word of any."""
    if "name" in value:
        return _object(value.get("arguments")) or _object(value.get("parameters")) or {}
    if (found := _object(value.get(name))) is not None:
        return found
    if depth == _MAX_DEPTH:
        return None
    for item in value.values():
        for child in item if isinstance(item, list) else [item]:
            if isinstance(child, dict) and (found := _arguments(child, name, depth + 1)) is not None:
                return found
    return None


def _object(value: JSON) -> dict[str, JSON] | None:
    """An object, which may be written as a string."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
            return None
    return value if isinstance(value, dict) else None


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    return next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)
