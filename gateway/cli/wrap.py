"""Long lines broken between words while they stream in, as Ollama's command line does.

Every character is shown at once. When a word does not fit any more it is taken back and begins the next line, so what
is written holds terminal sequences and is for terminals alone.
"""

from __future__ import annotations

from rich.cells import cell_len

MIN_WIDTH = 10
"""A narrower terminal breaks lines by itself."""


class WordWrap:
    """Follows the cursor through one answer.

    Args:
        width: columns of the terminal; 0 leaves the text as it is.
    """

    def __init__(self, width: int) -> None:
        self._width = width if width >= MIN_WIDTH else 0
        self._column = 0
        self._word = ""

    def wrap(self, text: str) -> str:
        """What to write so that `text` shows in whole words."""
        return "".join(map(self._put, text)) if self._width else text

    def _put(self, character: str) -> str:
        if character == "\n":
            self._column, self._word = 0, ""
            return character
        cells = cell_len(character)
        if self._column + cells > self._width:
            return self._break(character, cells)
        self._column += cells
        self._word = "" if character.isspace() or cells > 1 else self._word + character  # wide ones are words each
        return character

    def _break(self, character: str, cells: int) -> str:
        """Go on in the next line, with the word that is not complete if it began in this one behind another."""
        if character.isspace():
            self._column, self._word = 0, ""
            return "\n"
        word = self._word if cells == 1 and cell_len(self._word) < self._width else ""
        self._column = cell_len(word) + cells
        self._word = word + character if cells == 1 else ""
        taken_back = f"\x1b[{cell_len(word)}D\x1b[K" if word else ""
        return f"{taken_back}\n{word}{character}"
