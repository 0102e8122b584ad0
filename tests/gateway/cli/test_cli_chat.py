from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from gateway.cli.chat import _Message, _Screen


class InterruptedConsole(Console):
    """A console whose reader presses Ctrl-C while it prints."""

    def out(self, *objects: Any, **options: Any) -> None:
        """Print, and be interrupted at once."""
        super().out(*objects, **options)
        raise KeyboardInterrupt


def test_words_shown_when_the_reader_interrupts_are_remembered() -> None:
    """An interrupt that strikes between printing and going on loses nothing that was seen."""
    screen = _Screen(InterruptedConsole())
    with pytest.raises(KeyboardInterrupt):
        screen.show(_Message("Once upon"))
    assert screen.said == ["Once upon"]
