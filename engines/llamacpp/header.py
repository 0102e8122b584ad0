"""What is read of a model's files before llama.cpp sees them."""

from __future__ import annotations

from pathlib import Path

from engines.errors import ModelNotFound
from engines.llamacpp.hparams import read_hyperparameters
from engines.store.gguf import GGUFHeader, merge_parts, read_header

_OURS = frozenset({"Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"})
_ONE_WAY_ONLY = frozenset({"F32", "F16", "BF16", "Q4_1", "Q5_0", "Q5_1"})  # ggml-cpu: neither repacked nor tiled


def read_whole_header(path: Path, parts: tuple[str, ...]) -> GGUFHeader:
    """The header of all files, without its arrays. Refuses what llama.cpp's own checks would abort the process for.

    Raises:
        ModelNotFound: a file is missing. GGUFParseError: one is no GGUF, or says what no model can mean.
    """
    files = [Path(part) for part in parts] or [path]
    for file in files:
        if not file.is_file():
            raise ModelNotFound(file.name)
    headers = {file: read_header(file, arrays=False) for file in files}
    read_hyperparameters(headers[path])
    return merge_parts(list(headers.values()))


def suits_kernels(header: GGUFHeader) -> bool:
    """Whether our kernels compute a model, or what llama.cpp has for its types and for experts is better left on.

    Of experts llama.cpp chooses the rows itself, and asks nobody for products.
    """
    has_experts = read_hyperparameters(header).has_experts
    return not has_experts and {tensor.type for tensor in header.tensors} <= _OURS | _ONE_WAY_ONLY
