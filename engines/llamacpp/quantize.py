"""The process that rewrites weights: `python -m engines.llamacpp.quantize SOURCE TARGET TYPE`.

A process of its own, because llama.cpp ends the process on some damaged files, cannot be interrupted, and takes every
core. It prints a line `<tensor> <tensors>` for each tensor, and ends when its standard input closes, so that it never
outlives whoever started it.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from engines.llamacpp.capi import lib, say_on_stderr

_NICENESS = 10  # those who are being answered come first


def main(source: str, target: str, kind: str) -> int:
    """The exit status."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(_NICENESS)
    return 0 if quantize(Path(source), Path(target), kind, _tell) else 1


def quantize(source: Path, target: Path, kind: str, on_tensor: Callable[[int, int], None]) -> bool:
    """Write a model's weights anew as another type, such as `Q4_K_M`, or as they are with `COPY`; whether that worked.

    A model that is split becomes one file; `source` is its first part then, under the name that llama.cpp gives parts.
    `on_tensor` is told each tensor's number, from 1, and how many there are. llama.cpp's own words are on stderr.
    """
    lib.llama_backend_init()
    params = lib.llama_model_quantize_default_params()
    params.only_copy = kind == "COPY"
    if not params.only_copy:
        params.ftype = getattr(lib, "LLAMA_FTYPE_ALL_F32" if kind == "F32" else f"LLAMA_FTYPE_MOSTLY_{kind}")

    @lib.llama_log_callback  # type: ignore[untyped-decorator]  # the binding has no types
    def listen(level: int, text: bytes, user_data: object) -> None:
        if tensor := re.match(rb"\[ *(\d+)/ *(\d+)\]", text):
            on_tensor(int(tensor[1]), int(tensor[2]))
        say_on_stderr(level, text, user_data)

    lib.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        return int(lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))) == 0
    finally:
        lib.llama_log_set(say_on_stderr, ctypes.c_void_p(0))


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock the interpreter wants when it ends
        pass
    os._exit(1)


def _tell(number: int, total: int) -> None:
    sys.stdout.write(f"{number} {total}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
