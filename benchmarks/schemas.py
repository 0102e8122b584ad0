"""JSON schemas of every common kind, drawn at random; the same ones for the same seed.

What could go on for ever is bounded, so that a model that only half knows what it writes reaches the end: strings and
lists have a longest length, numbers a range, and a schema that contains itself does so in a short list.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from engines.request import JSON

WORDS = (
    "name",
    "city",
    "age",
    "colour",
    "tags",
    "owner",
    "price",
    "note",
    "kind",
    "address",
    "size",
    "parts",
    "weather",
)
PATTERNS = (
    "^[a-z]{2,8}$",
    "^[A-Z][a-z]{1,6}( [A-Z][a-z]{1,6})?$",
    "^[0-9]{3}-[0-9]{4}$",
    "^(red|green|blue)-[0-9]{1,2}$",
    "^#[0-9a-f]{6}$",
    "^[a-z]+@[a-z]{2,8}\\.(com|org)$",
)
MAX_DEPTH = 3


class SchemaWriter:
    """Draws schemas from one seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._definitions: dict[str, JSON] = {}

    def schema(self) -> dict[str, JSON]:
        """An object, as strict structured outputs want it, with its definitions beside it."""
        self._definitions = {}
        schema = self._object(0)
        if self._random.random() < 0.15:
            self._definitions["node"] = self._node()
            schema["properties"]["tree"] = {"$ref": "#/$defs/node"}
            schema["required"] = [*schema["required"], "tree"]
        return schema | ({"$defs": self._definitions} if self._definitions else {})

    def _any(self, depth: int) -> JSON:
        leaves = (self._string, self._pattern, self._enum, self._integer, self._number, self._boolean, self._const)
        nested: tuple[Callable[[], JSON], ...] = (
            lambda: self._object(depth + 1),
            lambda: self._array(depth + 1),
            lambda: self._tuple(depth + 1),
            lambda: self._any_of(depth + 1),
            lambda: self._reference(depth + 1),
        )
        kinds = leaves if depth >= MAX_DEPTH else leaves + nested
        return self._random.choice(kinds)()

    def _object(self, depth: int) -> dict[str, JSON]:
        names = self._random.sample(WORDS, self._random.randint(1, 4 if depth == 0 else 3))
        required = [name for name in names if self._random.random() < 0.8]
        return {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": required,
            "additionalProperties": False,
        }

    def _array(self, depth: int) -> JSON:
        least = self._random.randint(0, 2)
        items = self._any(depth)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + self._random.randint(0, 2)}

    def _tuple(self, depth: int) -> JSON:
        places = [self._any(depth) for _ in range(self._random.randint(1, 3))]
        return {"type": "array", "prefixItems": places, "items": False, "minItems": len(places)}

    def _any_of(self, depth: int) -> JSON:
        return {"anyOf": [self._any(depth) for _ in range(self._random.randint(2, 3))]}

    def _reference(self, depth: int) -> JSON:
        name = f"part{len(self._definitions)}"
        self._definitions[name] = {}  # taken, in case what it is made of needs a name too
        self._definitions[name] = self._any(depth)
        return {"$ref": f"#/$defs/{name}"}

    def _node(self) -> JSON:
        children = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}
        return {
            "type": "object",
            "properties": {"value": self._integer(), "children": children},
            "required": ["value", "children"],
            "additionalProperties": False,
        }

    def _string(self) -> JSON:
        least = self._random.randint(0, 4)
        return {"type": "string", "minLength": least, "maxLength": least + self._random.randint(4, 24)}

    def _pattern(self) -> JSON:
        return {"type": "string", "pattern": self._random.choice(PATTERNS), "maxLength": 24}

    def _enum(self) -> JSON:
        return {"enum": self._random.sample(["red", "green", "a longer value", 1, 2.5, -7, True, None, ""], 3)}

    def _const(self) -> JSON:
        return {"const": self._random.choice(["fixed", 42, False, None])}

    def _integer(self) -> JSON:
        least = self._random.randint(-1000, 1000)
        return {"type": "integer", "minimum": least, "maximum": least + self._random.choice((0, 5, 100, 10_000))}

    def _number(self) -> JSON:
        least = self._random.randint(-50, 50)
        most = least + self._random.choice((1, 10, 500))
        lower = self._random.choice(("minimum", "exclusiveMinimum"))
        return {"type": "number", lower: least, self._random.choice(("maximum", "exclusiveMaximum")): most}

    def _boolean(self) -> JSON:
        return {"type": self._random.choice(("boolean", ["boolean", "null"]))}
