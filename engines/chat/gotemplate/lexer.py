"""A template's text to tokens, as Go's text/template/parse cuts it.

Trim markers are gone afterwards: the white space that they take away is no part of any token. The surprise: text that
makes no token ends the list with an `error`, because a mistake of the parser's that comes before it is told first.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import NamedTuple

from engines.chat.gotemplate.quoting import quote

SPACE = " \t\r\n"
_KEYWORDS = frozenset(
    {"block", "break", "continue", "define", "else", "end", "if", "nil", "range", "template", "with"},
)
_RIGHT = re.compile(r"([ \t\r\n]-)?\}\}")
_SPACES = re.compile(r"[ \t\r\n]+")
_WORD = re.compile(r"\w+")
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\[^\n])*"')
_RAW = re.compile(r"`[^`]*`")
_CHARACTER = re.compile(r"'(?:[^'\\\n]|\\[^\n])*'")
_NUMBER = r"""[+-]?(?:0[xX][0-9a-fA-F_]*(?:\.[0-9a-fA-F_]*)?(?:[pP][+-]?[0-9_]*)?|0[oO][0-7_]*(?:\.[0-7_]*)?
    |0[bB][01_]*(?:\.[01_]*)?|[0-9_]*(?:\.[0-9_]*)?(?:[eE][+-]?[0-9_]*)?)i?"""
_SIMPLE_NUMBER = re.compile(_NUMBER, re.VERBOSE)
_TERMINATORS = frozenset(SPACE + ".,|:)(")


class Token(NamedTuple):
    """One token.

    Attributes:
        kind: `text`, `space`, `word`, `field`, `variable`, `dot`, `number`, `character`, `complex`, `string`, `raw`,
            `bool`, `declare`, `char`, `EOF` or `error`; delimiters, keywords and signs are kinds of their own.
        position: in characters from the start of the template. line: counted from 1.
    """

    kind: str
    position: int
    value: str
    line: int

    def __str__(self) -> str:
        if self.kind == "EOF":
            return "EOF"
        if self.kind == "error":
            return self.value
        if self.kind in _KEYWORDS or self.kind == "dot":
            return f"<{self.value}>"
        if len(self.value.encode("utf-8", "surrogatepass")) > 10:
            return f"{quote(self.value[:10])}..."
        return quote(self.value)


def tokenize(source: str) -> list[Token]:
    """The tokens of a template."""
    return _Lexer(source).run()


class _Unreadable(Exception):
    """Ends the list of tokens with an error."""


class _Lexer:
    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._tokens: list[Token] = []
        self._newlines = [match.start() for match in re.finditer("\n", source)]

    def run(self) -> list[Token]:
        try:
            while self._at < len(self._source):
                self._text()
        except _Unreadable as error:
            self._emit("error", self._at, str(error))
        else:
            self._emit("EOF", self._at, "EOF")
        return self._tokens

    def _emit(self, kind: str, start: int, value: str) -> None:
        self._tokens.append(Token(kind, start, value, bisect_right(self._newlines, start - 1) + 1))

    def _text(self) -> None:
        """Text up to the next action or comment, and that."""
        start = self._at
        end = self._source.find("{{", start)
        if end < 0:
            self._emit("text", start, self._source[start:])
            self._at = len(self._source)
            return
        inner = end + 2
        trims = self._source[inner : inner + 1] == "-" and self._source[inner + 1 : inner + 2] in tuple(SPACE)
        text = self._source[start:end]
        text = text.rstrip(SPACE) if trims else text
        if text:
            self._emit("text", start, text)
        inner += 2 * trims
        if self._source.startswith("/*", inner):
            self._comment(inner)
        else:
            self._emit("{{", end, "{{")
            self._at = inner
            self._action()

    def _comment(self, start: int) -> None:
        self._at = start
        end = self._source.find("*/", start + 2)
        if end < 0:
            raise _Unreadable("unclosed comment")
        right = _RIGHT.match(self._source, end + 2)
        if right is None:
            raise _Unreadable("comment ends before closing delimiter")
        self._close(right)

    def _close(self, right: re.Match[str]) -> None:
        """Go on behind the closing delimiter, and behind the white space that it trims."""
        self._at = right.end()
        if right[1] and (space := _SPACES.match(self._source, self._at)):
            self._at = space.end()

    def _action(self) -> None:
        depth = 0
        while (right := _RIGHT.match(self._source, self._at)) is None:
            depth += self._token(depth)
        if depth:
            raise _Unreadable("unclosed left paren")
        self._emit("}}", right.end() - 2, "}}")
        self._close(right)

    def _token(self, depth: int) -> int:
        """One token of an action; how much deeper in parentheses it leads."""
        start = self._at
        character = self._source[start : start + 1]
        following = self._source[start + 1 : start + 2]
        if not character:
            raise _Unreadable("unclosed action")
        if character in SPACE:
            self._space(start)
        elif character in "\"`'":
            self._quoted(character)
        elif character == "$" or (character == "." and not ("0" <= following <= "9")):
            self._name("variable" if character == "$" else "field")
        elif character in ".+-" or "0" <= character <= "9":
            self._number()
        elif character == "_" or character.isalnum():
            self._word()
        else:
            return self._sign(character, following, depth)
        return 0

    def _sign(self, character: str, following: str, depth: int) -> int:
        """A sign that stands for itself; how much deeper it leads."""
        start = self._at
        if character == ":":
            if following != "=":
                raise _Unreadable("expected :=")
            self._take("declare", start + 2)
            return 0
        if character == ")" and not depth:
            raise _Unreadable("unexpected right paren")
        if not " " <= character <= "~":
            raise _Unreadable(f"unrecognized character in action: {_unicode(character)}")
        self._take(character if character in "=|()" else "char", start + 1)
        return {"(": 1, ")": -1}.get(character, 0)

    def _take(self, kind: str, end: int) -> None:
        self._emit(kind, self._at, self._source[self._at : end])
        self._at = end

    def _space(self, start: int) -> None:
        """A run of white space, of which the last may belong to a trimming delimiter."""
        match = _SPACES.match(self._source, start)
        assert match is not None, "there is at least one"
        end = match.end()
        if _RIGHT.match(self._source, end - 1):
            end -= 1
        if end > start:
            self._take("space", end)

    def _quoted(self, mark: str) -> None:
        pattern, kind, what = {
            '"': (_QUOTED, "string", "quoted string"),
            "`": (_RAW, "raw", "raw quoted string"),
            "'": (_CHARACTER, "character", "character constant"),
        }[mark]
        match = pattern.match(self._source, self._at)
        if match is None:
            raise _Unreadable(f"unterminated {what}")
        self._take(kind, match.end())

    def _name(self, kind: str) -> None:
        """A field or a variable, or the sign alone."""
        end = self._at + 1
        if word := _WORD.match(self._source, end):
            end = word.end()
        elif kind == "field":
            kind = "dot"
        self._expect_terminator(end)
        self._take(kind, end)

    def _word(self) -> None:
        match = _WORD.match(self._source, self._at)
        assert match is not None, "it begins with one"
        self._expect_terminator(match.end())
        word = match[0]
        self._take(word if word in _KEYWORDS else "bool" if word in ("true", "false") else "word", match.end())

    def _expect_terminator(self, end: int) -> None:
        character = self._source[end : end + 1]
        if character and character not in _TERMINATORS and not self._source.startswith("}}", end):
            raise _Unreadable(f"bad character {_unicode(character)}")

    def _number(self) -> None:
        end = self._scan_number(self._at)
        if self._source[end : end + 1] in ("+", "-"):
            end = self._scan_number(end)
            if self._source[end - 1] != "i":
                raise _Unreadable(f"bad number syntax: {quote(self._source[self._at : end])}")
            self._take("complex", end)
        else:
            self._take("number", end)

    def _scan_number(self, start: int) -> int:
        match = _SIMPLE_NUMBER.match(self._source, start)
        assert match is not None, "every part of the pattern is optional"
        end = match.end()
        if _WORD.match(self._source, end):
            raise _Unreadable(f"bad number syntax: {quote(self._source[self._at : end + 1])}")
        return end


def _unicode(character: str) -> str:
    """The character as Go's `%#U` shows it."""
    shown = f" '{character}'" if character.isprintable() else ""
    return f"U+{ord(character):04X}{shown}"
