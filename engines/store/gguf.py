"""Headers of GGUF files: metadata and the list of tensors, never the weights themselves.

Files come from strangers, so nothing in one is believed: every length is compared with what the file still holds
before a byte is read, and a header may take `MAX_HEADER_BYTES` at most, which bounds time and memory. Whatever the
bytes, the one error is GGUFParseError. Its surprise: reading is by plain reads, not mmap, because a mapped file that
another process cuts short kills the reader.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

from engines.errors import GGUFParseError
from engines.model import TensorInfo
from engines.request import JSON
from engines.store.blobs import StoreUnreadable
from engines.store.gguf_types import FILE_TYPES, TENSOR_TYPES, UNKNOWN_TENSOR_TYPE

MAX_HEADER_BYTES = 64 << 20
"""Far above any real header: a model with 262 000 tokens and their merges needs some 15 MB."""

RANKING_HEAD = ("cls.weight", "cls.output.weight")
"""Tensors of a classification head (llama-arch.cpp, LLM_TENSOR_CLS and LLM_TENSOR_CLS_OUT)."""

_MAX_NAME_BYTES = 65535  # of a key (GGUF specification); tensor names are far shorter
_MAX_DIMS = 4  # ggml.h GGML_MAX_DIMS
_MAX_PARAMETERS = 1 << 63  # ggml counts in int64
_DEFAULT_ALIGNMENT = 32
_SHORT_ARRAY = 1024
"""Numbers of an array that is read in any case: one for each layer, which is part of a model's shape."""

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]


class Pooling(IntEnum):
    """How the tokens of an input become one vector (llama.h, llama_pooling_type)."""

    UNSAID = -1
    NONE = 0
    MEAN = 1
    CLS = 2
    LAST = 3
    RANK = 4  # one score, from a classification head


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a GGUF says about itself.

    Attributes:
        metadata: every key in file order; strings that are no UTF-8 have U+FFFD in place of the bad bytes.
        tensors: in file order, each shape innermost dimension first.
        header_bytes, data_bytes: what comes before the weights, and the weights themselves.
    """

    version: int
    metadata: Mapping[str, JSON]
    tensors: tuple[TensorInfo, ...]
    num_parameters: int
    header_bytes: int = 0
    data_bytes: int = 0

    @property
    def architecture(self) -> str:
        """Such as `llama`; `unknown` where the file does not say."""
        architecture = self.metadata.get("general.architecture")
        return architecture if isinstance(architecture, str) else "unknown"

    @property
    def file_type(self) -> str:
        """The name of the quantization mix, such as `Q4_K_M`, or `unknown`."""
        number = self.metadata.get("general.file_type")
        return FILE_TYPES.get(number, "unknown") if isinstance(number, int) else "unknown"

    @property
    def parameter_size(self) -> str:
        """The number of parameters for people: `3.2B`, `567.75M`, `12K` (`spec/ollama.md` section 7.7)."""
        for unit, size, digits in (("B", 10**9, 1), ("M", 10**6, 2), ("K", 10**3, 0)):
            if self.num_parameters >= size:
                number = self.num_parameters / size
                return f"{number:.{0 if number.is_integer() else digits}f}{unit}"
        return str(self.num_parameters)

    @property
    def pooling(self) -> Pooling:
        """How the model pools. Many rerankers do not say what they are, but their head does; llama-server is told."""
        said = self.metadata.get(f"{self.architecture}.pooling_type", Pooling.UNSAID)
        if said == Pooling.UNSAID and any(tensor.name in RANKING_HEAD for tensor in self.tensors):
            return Pooling.RANK
        return next((pooling for pooling in Pooling if pooling == said), Pooling.UNSAID)

    def count(self, name: str) -> int:
        """The architecture's own number of that name, such as `context_length`; 0 where there is none."""
        value = self.metadata.get(f"{self.architecture}.{name}")
        return int(value) if isinstance(value, int) and value > 0 else 0


def merge_parts(headers: Sequence[GGUFHeader]) -> GGUFHeader:
    """The header of a model that is split into several files: the first part's metadata, and all tensors."""
    return replace(
        headers[0],
        tensors=tuple(tensor for header in headers for tensor in header.tensors),
        num_parameters=sum(header.num_parameters for header in headers),
        data_bytes=sum(header.data_bytes for header in headers),
    )


def read_header(path: Path, *, arrays: bool = True) -> GGUFHeader:
    """Read a file's header. Blocks for a few hundred milliseconds at most.

    Without `arrays` every long array in the metadata is None, which is several times quicker for a large vocabulary.

    Raises:
        GGUFParseError: the file is no GGUF, or is damaged or cut short anywhere.
        StoreUnreadable: it cannot be opened or read at all.
    """
    try:
        with path.open("rb") as file:
            return _parse(_Reader(file, os.fstat(file.fileno()).st_size, arrays))
    except OSError as error:
        raise StoreUnreadable(f"cannot read {path}: {error.strerror}") from error


class _Reader:
    """Reads forward through a header and knows where it is. `size` is the whole file's, in bytes."""

    def __init__(self, file: BinaryIO, size: int, keep_arrays: bool) -> None:
        self.offset = 0
        self.size = size
        self.keep_arrays = keep_arrays
        self._read = file.read
        self._limit = min(size, MAX_HEADER_BYTES)

    def fail(self, message: str) -> GGUFParseError:
        return GGUFParseError(message[:300], self.offset)  # it may quote a name as long as the file likes

    def require(self, num_bytes: int, what: str) -> None:
        left = self._limit - self.offset
        if num_bytes > left:
            raise self.fail(f"{what} needs {num_bytes} bytes, but {left} are left of the header")

    def take(self, num_bytes: int, what: str) -> bytes:
        self.require(num_bytes, what)
        data = self._read(num_bytes)
        if len(data) != num_bytes:
            raise self.fail("the file became shorter while it was read")
        self.offset += num_bytes
        return data

    def scalar(self, form: struct.Struct, what: str) -> JSON:
        return form.unpack(self.take(form.size, what))[0]

    def u32(self, what: str) -> int:
        return int(self.scalar(_U32, what))

    def u64(self, what: str) -> int:
        return int(self.scalar(_U64, what))

    def count(self, what: str, min_item_bytes: int) -> int:
        """A number of items that follow, each of which takes some bytes."""
        number = self.u64(f"the number of {what}")
        self.require(number * min_item_bytes, f"a list of {number} {what}")
        return number

    def name(self, what: str) -> str:
        length = self.u64(what)
        if length > _MAX_NAME_BYTES:
            raise self.fail(f"{what} of {length} bytes is too long")
        data = self.take(length, what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} {data!r} is not UTF-8") from None

    def value(self, key: str) -> JSON:
        kind = self.u32(f"the type of {key!r}")
        if kind == _ARRAY:
            return self.array(key)
        if kind == _STRING:
            return self.take(self.u64(key), f"the text of {key!r}").decode(errors="replace")
        number = self.scalar(self.form(kind, key), key)
        return _shortest(number) if kind == _FLOAT32 else number

    def form(self, kind: int, key: str) -> struct.Struct:
        form = _SCALARS.get(kind)
        if form is None:
            raise self.fail(f"{key!r} has the unknown value type {kind}")
        return form

    def array(self, key: str) -> list[JSON] | None:
        kind = self.u32(f"the element type of {key!r}")
        if kind == _ARRAY:
            raise self.fail(f"{key!r} is an array of arrays, which no model uses")
        if kind == _STRING:
            return self.strings(self.count(f"strings in {key!r}", _U64.size), key)
        form = self.form(kind, key)
        number = self.count(f"values in {key!r}", form.size)
        data = self.take(number * form.size, key)
        is_kept = self.keep_arrays or number <= _SHORT_ARRAY
        return list(struct.unpack(f"<{number}{form.format[1:]}", data)) if is_kept else None

    def strings(self, number: int, key: str) -> list[JSON] | None:
        """A vocabulary, mostly: the one hot loop, hence the local names and the bounds check in line."""
        read, unpack, limit, offset, texts = self._read, _U64.unpack, self._limit, self.offset, list[bytes]()
        for _ in range(number):
            prefix = read(8)
            if len(prefix) < 8:
                self.offset = offset
                raise self.fail(f"the file ends within {key!r}")
            (length,) = unpack(prefix)
            offset += 8 + length
            if offset > limit:
                self.offset = offset - length
                raise self.fail(f"a string of {length} bytes in {key!r} runs past the end of the header")
            text = read(length)
            if self.keep_arrays:
                texts.append(text)
        self.offset = offset
        return [text.decode(errors="replace") for text in texts] if self.keep_arrays else None


def _parse(reader: _Reader) -> GGUFHeader:
    magic = reader.take(4, "the magic number")
    if magic != b"GGUF":
        raise GGUFParseError(f"not a GGUF file, it starts with {magic!r}", 0)
    version = reader.u32("the version")
    if version & 0xFFFF == 0:
        raise GGUFParseError("big-endian files are not supported", 4)
    if version not in (2, 3):
        raise GGUFParseError(f"version {version} is not supported, only 2 and 3", 4)
    num_tensors = reader.count("tensors", 8 + 4 + 4 + 8)
    num_keys = reader.count("metadata keys", 8 + 4 + 1)
    metadata: dict[str, JSON] = {}
    for _ in range(num_keys):
        key = reader.name("a metadata key")
        if key in metadata:
            raise reader.fail(f"the metadata key {key!r} appears twice")
        metadata[key] = reader.value(key)
    tensors, num_parameters, data_bytes = _parse_tensors(reader, num_tensors, metadata)
    return GGUFHeader(version, metadata, tensors, num_parameters, reader.offset, data_bytes)


def _parse_tensors(
    reader: _Reader, number: int, metadata: Mapping[str, JSON]
) -> tuple[tuple[TensorInfo, ...], int, int]:
    """The tensors, their parameters in all, and their bytes. The weights must be there in full."""
    tensors: dict[str, TensorInfo] = {}
    num_parameters = data_bytes = 0
    for _ in range(number):
        name = reader.name("a tensor name")
        if name in tensors:
            raise reader.fail(f"the tensor {name!r} appears twice")
        num_dims = reader.u32("the number of dimensions")
        if num_dims > _MAX_DIMS:
            raise reader.fail(f"the tensor {name!r} has {num_dims} dimensions")
        shape = struct.unpack(f"<{num_dims}Q", reader.take(8 * num_dims, "a shape"))
        kind, block, block_bytes = TENSOR_TYPES.get(reader.u32("a tensor type"), UNKNOWN_TENSOR_TYPE)
        num_elements = _product(shape)
        num_parameters += num_elements
        if num_parameters >= _MAX_PARAMETERS:
            raise reader.fail(f"the tensor {name!r} is impossibly large")
        data_bytes = max(data_bytes, reader.u64("a tensor offset") + -(-num_elements // block) * block_bytes)
        tensors[name] = TensorInfo(name, kind, shape)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise reader.fail("general.alignment is not a positive number")
    end = -(-reader.offset // alignment) * alignment + data_bytes
    if tensors and end > reader.size:
        raise GGUFParseError(f"the file is cut short: its tensors end at byte {end}", reader.size)
    return tuple(tensors.values()), num_parameters, data_bytes


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _shortest(number: float) -> float:
    """The float with the fewest digits that is the same 32-bit float, so that 1e-05 is not 9.999999747378752e-06."""
    exact = struct.pack("<f", number)
    shorter = (float(f"{number:.{digits}g}") for digits in range(6, 9))
    return next((short for short in shorter if struct.pack("<f", short) == exact), number)
