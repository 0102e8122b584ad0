"""The process that rewrites weights: `python -m engines.llamacpp.quantize SOURCE TARGET TYPE`.

A process of its own, because llama.cpp ends the process on some damaged files, cannot be interrupted, and takes every
core. It prints a line `<tensor> <tensors>` for each tensor, and ends when its standard input closes, so that it never
outlives whoever started it.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from engines.llamacpp.bindings import quantize

_NICENESS = 10  # those who are being answered come first


def main(source: str, target: str, kind: str) -> int:
    """The exit status."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(_NICENESS)
    return 0 if quantize(Path(source), Path(target), kind, _tell) else 1


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock the interpreter wants when it ends
        pass
    os._exit(1)


def _tell(number: int, total: int) -> None:
    sys.stdout.write(f"{number} {total}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
