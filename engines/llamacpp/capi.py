"""llama.cpp's C API, without the rest of the package that ships it.

`import llama_cpp` also loads an inference server's worth of Python on top of the API (chat formats, disk caches,
NumPy's type stubs), which takes as long as loading a small model. The package's place is taken by its own C API
instead, which has every name that its `__init__` would have re-exported from there.

Our kernels are loaded before it, so that it calls them.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from engines.llamacpp.kernels import library as kernels


def _load() -> Any:
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None:
            raise ModuleNotFoundError("llama_cpp is not installed")
        sys.modules["llama_cpp"] = package = importlib.util.module_from_spec(spec)  # with its path, but not executed
        package.__dict__.update(vars(importlib.import_module("llama_cpp.llama_cpp")) | vars(package))
    return sys.modules["llama_cpp.llama_cpp"]


_kernels = None if "llama_cpp" in sys.modules else kernels.load()
lib = _load()
has_kernels = _kernels is not None and kernels.bind(_kernels, Path(lib.__file__).parent / "lib")
"""Whether llama.cpp calls our kernels."""

_WARN = 3  # ggml.h ggml_log_level: 1 debug, 2 info, 3 warn, 4 error, 5 continues the line before


@lib.llama_log_callback  # type: ignore[untyped-decorator]  # the binding has no types
def say_on_stderr(level: int, text: bytes, _user_data: object) -> None:
    """llama.cpp's warnings and errors on stderr, where the parent keeps the end of them; its chatter nowhere."""
    if _WARN <= level <= _WARN + 1 and b"n_ctx_train" not in text:  # our pool of cells is meant to exceed one window
        sys.stderr.write(text.decode("utf-8", "replace"))
        sys.stderr.flush()


lib.llama_log_set(say_on_stderr, ctypes.c_void_p(0))
