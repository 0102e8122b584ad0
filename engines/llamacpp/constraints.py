"""Constrained output: each token is chosen among those that keep the answer inside its grammar.

The grammar engine is llguidance, which never aborts the process as llama.cpp's own can (`spec/chat-formats.md` section
4.2). Reasoning is free: the constraint begins where the answer does, or behind a trigger in it. The tokens allowed next
are worked out in a thread while llama.cpp decodes. Its one surprise: when no token is allowed any more, the answer ends
instead of running on unconstrained.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from engines.chat.parser import THINK
from engines.errors import BadRequest
from engines.llamacpp.context import Context
from engines.llamacpp.model import Model, guidance_tokenizer
from engines.llamacpp.sequence import TokenChooser
from engines.request import JSON, OutputFormat, Syntax

if TYPE_CHECKING:
    import numpy.typing as npt
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

MAX_GRAMMAR_CHARS = 256 * 1024
MAX_TRIGGERS = 64
_TAIL_CHARS = 256
"""How much of the answer's end is searched for triggers."""

Forbidden: TypeAlias = "npt.NDArray[np.bool_]"
"""Tokens that may not come next, shape (n_vocab,)."""

_LITERAL = frozenset({"const", "enum", "default", "examples"})  # values, not schemas
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})  # schemas by names of the author's
_ANY_OBJECT = {"type": "object"}


class Grammars:
    """Compiles the output formats of one model's requests. Safe to use from several threads."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def close(self) -> None:
        """End the thread that works masks out."""
        self._masks.shutdown(wait=False, cancel_futures=True)

    def forbidden(self, matcher: LLMatcher) -> Future[tuple[Forbidden, bool]]:
        """Begin to work out what may not come next, and whether anything may. The matcher is busy until it is done."""
        return self._masks.submit(_forbidden, matcher, self._model.num_tokens)

    def compile(self, output: OutputFormat) -> LLMatcher:
        """A matcher at the start of the format.

        The first call takes about a second for a large vocabulary.

        Raises:
            BadRequest: the format cannot be turned into a grammar, or would grow without bound.
        """
        matcher = LLMatcher(self.tokenizer(), _grammar(output), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some limits are felt only by the first token
        if matcher.is_error():
            raise _invalid(output.syntax, matcher.get_error())
        for warning in matcher.get_grammar_warnings():
            log.info("output format: %s", warning)
        return matcher

    def tokenizer(self) -> LLTokenizer:
        """The model's vocabulary as llguidance has it."""
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


def _grammar(output: OutputFormat) -> str:
    """The format in llguidance's own notation."""
    if len(output.grammar) > MAX_GRAMMAR_CHARS or len(output.triggers) > MAX_TRIGGERS:
        raise BadRequest(
            f"a grammar may have {MAX_GRAMMAR_CHARS} characters and {MAX_TRIGGERS} triggers", param="grammar"
        )
    try:
        match output.syntax:
            case Syntax.JSON_SCHEMA:
                schema = _ANY_OBJECT if output.schema is None else output.schema
                return LLMatcher.grammar_from_json_schema(json.dumps(closed(schema)), overrides=_OPTIONS)
            case Syntax.REGEX:
                return LLMatcher.grammar_from_regex(output.grammar)
            case Syntax.LARK:
                return LLMatcher.grammar_from_lark(output.grammar)
            case Syntax.GBNF:
                return LLMatcher.grammar_from_lark(_lark(output.grammar))
    except (ValueError, RecursionError) as error:
        raise _invalid(output.syntax, str(error)) from error


def _lark(gbnf: str) -> str:
    try:
        return str(gbnf_to_lark(gbnf))
    except Exception as error:  # the converter raises nothing finer for a rule that is missing
        raise ValueError(str(error)) from error


def _invalid(syntax: Syntax, reason: str) -> BadRequest:
    if syntax is Syntax.JSON_SCHEMA:
        return BadRequest(f"invalid JSON schema: {reason[:500]}", param="format", reason="invalid_json_schema")
    return BadRequest(f"invalid {syntax.value} grammar: {reason[:500]}", param="grammar", reason="invalid_grammar")


def _forbidden(matcher: LLMatcher, num_tokens: int) -> tuple[Forbidden, bool]:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:num_tokens]
    forbidden = np.ones(num_tokens, np.bool_)
    forbidden[: len(bits)] = bits == 0
    return forbidden, not forbidden.all()


class ConstrainedChooser:
    """Hides from another chooser every token that the grammar forbids.

    Args:
        inner: chooses among what is left. matcher: the grammar at its start.
        triggers: strings after any of which the constraint begins, and begins anew once it is fulfilled; without any
            it holds from the start.
        markers: what opens and closes reasoning. in_thinking: the prompt ends inside an open block of it.
        may_think: the model may open one itself.
    """

    def __init__(
        self,
        model: Model,
        context: Context,
        inner: TokenChooser,
        grammars: Grammars,
        matcher: LLMatcher,
        *,
        triggers: Sequence[str] = (),
        markers: tuple[str, str] = THINK,
        in_thinking: bool,
        may_think: bool,
    ) -> None:
        self._model = model
        self._context = context
        self._inner = inner
        self._grammars = grammars
        self._start = matcher
        self._matcher = matcher.deep_copy()
        self._triggers = tuple(trigger.encode() for trigger in triggers if trigger)
        self._opening = model.single_token(markers[0]) if may_think and not in_thinking else None
        self._closing = markers[1].encode()
        self._awaited = (self._closing,) if in_thinking else self._triggers
        self._tail = b""
        self._next = None if self._awaited else grammars.forbidden(self._matcher)

    def sample(self, index: int) -> int:
        """The inner chooser's token, among those allowed here; an end token when there are none."""
        if self._next is None:
            return self._watch(self._inner.sample(index))
        forbidden, is_possible = self._next.result()
        if self._opening is not None:
            forbidden[self._opening], is_possible = False, True
        if not is_possible:
            log.warning("no token satisfies the output format: %s", self._matcher.get_error() or "end")
            return self._model.end_token
        np.copyto(self._context.logits(index), -np.inf, where=forbidden)
        token = self._inner.sample(index)
        if token == self._opening:
            self._awaited, self._next = (self._closing,), None
        elif not self._model.is_end(token):
            self._matcher.consume_token(token)
            self._advance()
        self._opening = None
        return token

    def _advance(self) -> None:
        """Work out what may come next; a fulfilled grammar with triggers waits for the next of them."""
        if self._triggers and self._matcher.is_stopped():
            self._awaited, self._next, self._tail = self._triggers, None, b""
        else:
            self._next = self._grammars.forbidden(self._matcher)

    def _watch(self, token: int) -> int:
        """Free text, until what is awaited has been said; the rest of that token is the constraint's first."""
        self._tail = (self._tail + self._model.piece(token, special=True))[-_TAIL_CHARS:]
        ends = [at + len(text) for text in self._awaited if (at := self._tail.find(text)) >= 0]
        if not ends:
            return token
        rest, self._tail = self._tail[min(ends) :], b""
        if self._awaited is not self._triggers and self._triggers:  # the reasoning is over
            self._awaited, self._tail = self._triggers, rest
        else:
            self._begin(rest)
        return token

    def _begin(self, rest: bytes) -> None:
        matcher = self._start.deep_copy()
        tokens = self._grammars.tokenizer().tokenize_bytes(rest) if rest.strip() else []
        if matcher.try_consume_tokens(tokens) == len(tokens):
            self._matcher = matcher
            self._advance()
        else:
            log.info("what follows a marker in the same token does not fit the output format")

    def close(self) -> None:
        """Free the inner chooser."""
        self._inner.close()
