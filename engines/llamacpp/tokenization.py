"""Texts to token ids and back, on a model's vocabulary."""

from __future__ import annotations

from engines.errors import BadRequest
from engines.events import Tokenization
from engines.llamacpp.model import Model
from engines.request import TokenizeRequest


def tokenization(model: Model, request: TokenizeRequest) -> Tokenization:
    """The token ids of a text, or the text of token ids, control tokens as their markers. Raises BadRequest."""
    if request.text is None:
        return detokenize(model, request.tokens or ())
    tokens = model.tokenize(request.text, add_special=request.add_special, parse_special=request.parse_special)
    return Tokenization(request.text, tuple(tokens))


def detokenize(model: Model, tokens: tuple[int, ...]) -> Tokenization:
    """The text that token ids stand for; what is half a character at either end becomes U+FFFD. Raises BadRequest."""
    for token in tokens:
        if not 0 <= token < model.num_tokens:
            message = f"token {token} is not in this model's vocabulary of {model.num_tokens}"
            raise BadRequest(message, param="tokens")
    text = b"".join(model.piece(token, special=True) for token in tokens)
    return Tokenization(text.decode("utf-8", "replace"), tokens)
