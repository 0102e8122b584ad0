"""Compiles the kernels (engines/llamacpp/kernels) while the package is built or installed.

They are an extra: where there is no compiler for them, or another kind of processor, Headwater does without.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("engines/llamacpp/kernels")
LIBRARY = KERNELS / "libheadwater_kernels.so"
FLAGS = [
    *("-std=c++20", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-w"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"),
]


class KernelsHook(BuildHookInterface):
    """Adds the library to the package, wherever it can be made."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a wheel with the library is for this platform only."""
        library = Path(self.root) / LIBRARY
        if self.target_name == "wheel" and self._compile(library):
            build_data["artifacts"].append(f"/{LIBRARY}")
            build_data["pure_python"] = False
            build_data["infer_tag"] = True

    def _compile(self, library: Path) -> bool:
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return False
        compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("clang++") or "g++"]
        fresh = library.with_suffix(".new")
        command = [*compiler, *FLAGS, str(Path(self.root) / KERNELS / "matmul.cpp"), "-o", str(fresh)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603  # the user's own compiler
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            self.app.display_warning(f"the kernels are not compiled, llama.cpp's own are used: {reason}")
            library.unlink(missing_ok=True)
            return False
        fresh.replace(library)  # a worker that has the old one mapped keeps it
        return True
