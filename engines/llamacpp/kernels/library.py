"""The compiled kernels: whether they are for this machine, and how llama.cpp comes to call them.

They have the name of one of llama.cpp's functions, `llamafile_sgemm`. The dynamic linker of Linux binds a name to the
first library that has it, so ours is loaded before llama.cpp, for all to see.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
import platform
import sys
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("libheadwater_kernels.so")

TRIED = "0.3.36"
"""The llama-cpp-python whose llama.cpp calls the function as we expect it (llamafile/sgemm.h)."""

FEATURES = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma", "f16c"})
"""What the processor must have, in the words of /proc/cpuinfo. `hatch_build.py` compiles for the same."""


def why_not() -> str:
    """Why the kernels cannot be used here; empty when they can."""
    if os.environ.get("HEADWATER_KERNELS", "").lower() in {"0", "false", "f"}:
        return "HEADWATER_KERNELS turns them off"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "they are for Linux on x86-64"
    if missing := FEATURES - _features():
        return f"the processor lacks {', '.join(sorted(missing))}"
    if "amx_int8" in _features():
        return "the processor has AMX, for which llama.cpp has kernels of its own"
    if not LIBRARY.is_file():
        return "they were not compiled at the installation: is there a C++20 compiler?"
    if (version := importlib.metadata.version("llama-cpp-python")) != TRIED:
        return f"llama-cpp-python is {version}, and they are known to fit {TRIED}"
    if os.environ.get("LLAMA_CPP_LIB_PATH"):
        return "LLAMA_CPP_LIB_PATH names another llama.cpp than the one they are known to fit"
    return ""


@cache
def load() -> ctypes.CDLL | None:
    """Load them, before llama.cpp is loaded; None where they cannot be used."""
    if why_not():
        return None
    try:
        return ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:  # compiled elsewhere, or damaged
        log.warning("the kernels cannot be loaded, llama.cpp's own are used: %s", error)
        return None


def bind(kernels: ctypes.CDLL, llama_cpp: Path) -> bool:
    """Name the kernels llama.cpp's functions: its own product, for types that they do not know, and its work counter.

    Args:
        kernels: what `load` gave.
        llama_cpp: the folder of its libraries, which are loaded by now. Asked by its handle, a library gives its own.

    Returns:
        Whether it has them. A llama.cpp that was built without asks for no products, or calls llama.cpp's slowest way
        for other types, but computes as it should.
    """
    try:
        ggml = ctypes.CDLL(str(llama_cpp / "libggml-cpu.so"))
        functions = (ggml.llamafile_sgemm, ggml.ggml_threadpool_chunk_add)
    except (OSError, AttributeError) as error:
        log.warning("llama.cpp was built in another way than the kernels expect: %s", error)
        return False
    kernels.headwater_kernels_bind(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
    return True


def _features() -> frozenset[str]:
    with Path("/proc/cpuinfo").open() as lines:
        flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())
