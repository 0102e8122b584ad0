"""Texts to token ids and back on the loaded model's vocabulary, in the thread in which prompts are prepared.

The engines do not know of it; it knows of them that they hold a model and that thread.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from engines.errors import BadRequest, ModelNotLoaded
from engines.events import Tokenization
from engines.inference import InferenceBackend
from engines.llamacpp.embedding import EmbeddingEngine
from engines.llamacpp.engine import LlamaCppEngine
from engines.llamacpp.model import Model
from engines.request import TokenizeRequest


class Tokenizing(InferenceBackend):
    """An engine on llama.cpp that shows its tokens."""

    _model: Model | None
    _prompts: ThreadPoolExecutor

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """The token ids of a text, or the text of token ids, control tokens as their markers."""
        self._require_loaded()
        return await asyncio.get_running_loop().run_in_executor(self._prompts, self._tokenize, request)

    def _tokenize(self, request: TokenizeRequest) -> Tokenization:
        if self._model is None:
            raise ModelNotLoaded
        if request.text is not None:
            tokens = self._model.tokenize(
                request.text, add_special=request.add_special, parse_special=request.parse_special
            )
            return Tokenization(request.text, tuple(tokens))
        return detokenize(self._model, request.tokens or ())


class TokenizingCompletionEngine(Tokenizing, LlamaCppEngine):
    """A model that answers."""


class TokenizingEmbeddingEngine(Tokenizing, EmbeddingEngine):
    """A model that makes vectors, or scores."""


def detokenize(model: Model, tokens: tuple[int, ...]) -> Tokenization:
    """The text that token ids stand for; what is half a character at either end becomes U+FFFD. Raises BadRequest."""
    for token in tokens:
        if not 0 <= token < model.num_tokens:
            message = f"token {token} is not in this model's vocabulary of {model.num_tokens}"
            raise BadRequest(message, param="tokens")
    text = b"".join(model.piece(token, special=True) for token in tokens)
    return Tokenization(text.decode("utf-8", "replace"), tokens)
