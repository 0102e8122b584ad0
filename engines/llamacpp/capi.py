"""llama.cpp's C API, without the rest of the package that ships it.

`import llama_cpp` also loads an inference server's worth of Python on top of the API (chat formats, disk caches,
NumPy's type stubs), which takes as long as loading a small model. The package's place is taken by its own C API
instead, which has every name that its `__init__` would have re-exported from there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any


def _load() -> Any:
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None:
            raise ModuleNotFoundError("llama_cpp is not installed")
        sys.modules["llama_cpp"] = package = importlib.util.module_from_spec(spec)  # with its path, but not executed
        package.__dict__.update(vars(importlib.import_module("llama_cpp.llama_cpp")) | vars(package))
    return sys.modules["llama_cpp.llama_cpp"]


lib = _load()
