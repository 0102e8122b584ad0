"""Constrained output: each token is chosen among those that keep the answer inside its grammar.

The grammar engine is llguidance, which never aborts the process as llama.cpp's own can (`spec/chat-formats.md` section
4.2). Reasoning is free: the constraint begins where the answer does. Its one surprise: when no token is allowed any
more, the answer ends instead of running on unconstrained.
"""

from __future__ import annotations

import json
import logging
import threading
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from engines.chat.parser import THINK
from engines.errors import BadRequest
from engines.llamacpp.bindings import Context, Model, guidance_tokenizer
from engines.llamacpp.sequence import TokenChooser
from engines.request import JSON, OutputFormat

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # exists for type checkers only

log = logging.getLogger(__name__)

_OPTIONS: JsonCompileOptions = {
    # One space and no line breaks, as models write JSON; free white space is a loop that some never leave.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # Keywords that a grammar cannot express (uniqueItems, not, some formats) are left out of it instead of refused.
    "lenient": True,
    "coerce_one_of": True,
}

_LITERAL = frozenset({"const", "enum", "default", "examples"})  # values, not schemas
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})  # schemas by names of the author's
_ANY_OBJECT = {"type": "object"}


class Grammars:
    """Compiles the output formats of one model's requests. Safe to use from several threads."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def compile(self, output: OutputFormat) -> LLMatcher:
        """A matcher at the start of the format.

        The first call takes about a second for a large vocabulary.

        Raises:
            BadRequest: the schema cannot be turned into a grammar.
        """
        schema = _ANY_OBJECT if output.schema is None else output.schema
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(closed(schema)), overrides=_OPTIONS)
        except (ValueError, RecursionError) as error:
            raise _invalid(str(error)) from error
        matcher = LLMatcher(self._guidance_tokenizer(), grammar, log_level=0)
        if matcher.is_error():
            raise _invalid(matcher.get_error())
        for warning in matcher.get_grammar_warnings():
            log.info("output format: %s", warning)
        return matcher

    def _guidance_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = guidance_tokenizer(self._model)
            return self._tokenizer


def closed(schema: JSON) -> JSON:
    """The schema with objects that name their properties allowing no others, unless they say so.

    That is what clients mean and what llama.cpp's own converter does; JSON Schema alone would let a model invent keys.
    Branches of `allOf` stay open, since each names a part of the whole.
    """
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: _closed_part(key, value) for key, value in schema.items()}
    if "allOf" in schema:
        copy["allOf"] = schema["allOf"]
    elif "properties" in schema and not {"additionalProperties", "patternProperties"} & schema.keys():
        copy["additionalProperties"] = False
    return copy


def _closed_part(key: str, value: JSON) -> JSON:
    if key in _LITERAL:
        return value
    if key in _NAMED and isinstance(value, dict):
        return {name: closed(part) for name, part in value.items()}
    return closed(value)


def _invalid(reason: str) -> BadRequest:
    return BadRequest(f"invalid JSON schema: {reason[:500]}", param="format", reason="invalid_json_schema")


class ConstrainedChooser:
    """Hides from another chooser every token that the grammar forbids.

    Args:
        inner: chooses among what is left. in_thinking: the prompt ends inside an open reasoning block.
        may_think: the model may open one itself.
    """

    def __init__(
        self,
        model: Model,
        context: Context,
        inner: TokenChooser,
        matcher: LLMatcher,
        *,
        in_thinking: bool,
        may_think: bool,
    ) -> None:
        self._model = model
        self._context = context
        self._inner = inner
        self._matcher = matcher
        self._opening = model.single_token(THINK[0]) if may_think and not in_thinking else None
        self._is_free = in_thinking
        self._tail = b""

    def sample(self, index: int) -> int:
        """The inner chooser's token, among those allowed here; an end token when there are none."""
        if self._is_free:
            return self._think(self._inner.sample(index))
        allowed = self._allowed()
        if self._opening is not None:
            allowed[self._opening] = True
        if not allowed.any():
            log.warning("no token satisfies the output format: %s", self._matcher.get_error() or "end")
            return self._model.end_token
        self._context.logits(index)[~allowed] = -np.inf
        token = self._inner.sample(index)
        if token == self._opening:
            self._is_free = True
        elif not self._model.is_end(token):
            self._matcher.consume_token(token)
        self._opening = None
        return token

    def _think(self, token: int) -> int:
        """Reasoning is unconstrained until its closing marker."""
        self._tail = (self._tail + self._model.piece(token, special=True))[-64:]
        if THINK[1].encode() in self._tail:
            self._is_free = False
        return token

    def _allowed(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Shape (n_vocab,)."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[: self._model.num_tokens]
        allowed = np.zeros(self._model.num_tokens, dtype=np.bool_)
        allowed[: len(bits)] = bits
        return allowed

    def close(self) -> None:
        """Free the inner chooser."""
        self._inner.close()
