"""What a Go template computes with, as far as Python has no such thing, and Go's view of what it has.

`bool`, `int`, `float`, `complex` and `str` are Go's own kinds, a `dict` is a map and `bytes` an image. The surprise:
there are two nothings. `None` is an empty `interface{}`, as a missing key has it; `INVALID` is no value at all, which
that becomes at the end of a pipeline, and only it may be asked for a field.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, overload

from engines.chat.gotemplate.quoting import as_bytes

Value = Any
"""One of the above, or one of the classes here."""


class _Invalid:
    def __repr__(self) -> str:
        return "INVALID"


INVALID: Final = _Invalid()


class Uint8(int):
    """A byte of a string."""


@dataclass(frozen=True, slots=True)
class StructType:
    """A struct of Ollama's.

    Attributes:
        name: as Go names it in errors, with a star where templates see a pointer.
        fields: each field, its name in JSON, and whether it is left out there when empty.
        prints_json: printed, it is its JSON.
    """

    name: str
    fields: tuple[tuple[str, str, bool], ...]
    prints_json: bool = False


class Struct:
    """A value of such a type; `values` has every field."""

    __slots__ = ("type", "values")

    def __init__(self, kind: StructType, values: dict[str, Value]) -> None:
        self.type = kind
        self.values = values


class Map(dict[str, Value]):
    """A map of a type of its own, which prints as its JSON.

    Attributes:
        zero: the value of a missing key. keeps_order: in JSON its keys come as they are, not sorted.
    """

    type = "map[string]interface {}"
    zero: Value = None
    keeps_order = False


ANY_SLICE: Final = "[]interface {}"
"""The type of a list out of JSON."""


class Slice(Sequence[Value]):
    """Part of a list, which it shares as a Go slice does: cutting it copies nothing.

    Args:
        kind: its Go type. prints_json: printed, it is its JSON.
    """

    __slots__ = ("_capacity", "_items", "_start", "_stop", "prints_json", "type")

    def __init__(
        self,
        items: list[Value],
        kind: str = ANY_SLICE,
        *,
        prints_json: bool = False,
        bounds: tuple[int, int, int] | None = None,
    ) -> None:
        self._items = items
        self._start, self._stop, self._capacity = bounds or (0, len(items), len(items))
        self.type = kind
        self.prints_json = prints_json

    @property
    def capacity(self) -> int:
        """How far it can be cut again."""
        return self._capacity - self._start

    def cut(self, start: int, stop: int, capacity: int | None = None) -> Slice:
        """`x[start:stop:capacity]`; the bounds have been checked."""
        end = self._capacity if capacity is None else self._start + capacity
        bounds = (self._start + start, self._start + stop, end)
        return Slice(self._items, self.type, prints_json=self.prints_json, bounds=bounds)

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, index: int) -> Value: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Value]: ...

    def __getitem__(self, index: int | slice) -> Value:
        if isinstance(index, slice):
            raise TypeError("a Slice is cut with `cut`")
        return self._items[self._start + index]

    def __iter__(self) -> Iterator[Value]:
        return (self._items[index] for index in range(self._start, self._stop))


class PropertyType(Slice):
    """The type of a tool's parameter: printed, a single one is its name."""

    def __init__(self, names: list[Value]) -> None:
        super().__init__(names, "api.PropertyType")


_TYPE_NAMES: dict[type, str] = {
    type(None): "interface {}",
    bool: "bool",
    Uint8: "uint8",
    int: "int",
    float: "float64",
    complex: "complex128",
    str: "string",
    bytes: "api.ImageData",
    dict: "map[string]interface {}",
}


def type_name(value: Value) -> str:
    """The Go type of a value."""
    if isinstance(value, Struct):
        return value.type.name
    return value.type if isinstance(value, (Slice, Map)) else _TYPE_NAMES.get(type(value), "<nil>")


def truth(value: Value) -> bool:
    """Whether `if` takes it for true: what is empty or zero is not, and a struct always is."""
    if value is INVALID:
        return False
    if isinstance(value, (str, int, float, complex, dict, bytes, Slice)):
        return bool(value)
    return value is not None


def is_nil(value: Value) -> bool:
    """Whether it is nothing; an empty list of Ollama's own is, since there is none where the request says none."""
    if isinstance(value, Slice):
        return not value and value.type != ANY_SLICE
    return value is None or value is INVALID


def length(text: str) -> int:
    """Of a Go string, which is counted in bytes."""
    return len(text) if text.isascii() else len(as_bytes(text))
