"""A query and a document as one input for a reranker, as llama-server writes it.

That is the model's own `rerank` template, or BOS query EOS SEP document EOS, each of the special tokens where the
vocabulary wants it (server-common.cpp, format_prompt_rerank). Pure, but for the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engines.errors import PromptTooLong

QUERY, DOCUMENT = "{query}", "{document}"


class Vocabulary(Protocol):
    """What is needed of a model."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The token ids of a text."""

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One input, and how many of its document's tokens were left out of it."""

    tokens: list[int]
    truncated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PairBuilder:
    """Makes inputs of pairs.

    Attributes:
        joints: the special tokens before, between and after, used where the model has no `rerank` template.
    """

    vocabulary: Vocabulary
    joints: tuple[list[int], list[int], list[int]]
    template: str | None = None

    def build(self, query: str, document: str, *, num_ctx: int, truncate: bool, max_document: int | None) -> Pair:
        """The input for one pair.

        `max_document` tokens of the document are used at most.

        Raises:
            PromptTooLong: it does not fit, even without the document where that may be cut.
        """
        join = self._template_join(query) if self.template is not None else self._token_join(query)
        tokens = self._tokenize(document)
        kept = tokens if max_document is None else tokens[:max_document]
        whole = join(kept, document if len(kept) == len(tokens) else None)
        while truncate and len(whole) > num_ctx and kept:
            kept = kept[: max(len(kept) - (len(whole) - num_ctx), 0)]
            whole = join(kept, None)
        if len(whole) > num_ctx:
            raise PromptTooLong(len(whole), num_ctx)
        return Pair(whole, len(tokens) - len(kept))

    def _tokenize(self, text: str) -> list[int]:
        return self.vocabulary.tokenize(text, add_special=False, parse_special=False)

    def _token_join(self, query: str) -> Callable[[list[int], str | None], list[int]]:
        before, between, after = self.joints
        head = [*before, *self._tokenize(query), *between]
        return lambda kept, _text: [*head, *kept, *after]

    def _template_join(self, query: str) -> Callable[[list[int], str | None], list[int]]:
        """Joins as text, because tokens may reach over the seams; a document that was cut is made text again."""
        template = self.template or ""

        def join(kept: list[int], text: str | None) -> list[int]:
            if text is None:
                text = b"".join(map(self.vocabulary.piece, kept)).decode("utf-8", "ignore")
            filled = text.join(part.replace(QUERY, query) for part in template.split(DOCUMENT))
            return self.vocabulary.tokenize(filled, add_special=False, parse_special=True)

        return join
