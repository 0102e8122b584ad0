"""What a model card does for a chat."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engines.model import ModelCard
from engines.request import Message

CARD = ModelCard(
    name="m:latest",
    full_name="registry.ollama.ai/library/m:latest",
    digest="0" * 64,
    weights=Path("m.gguf"),
    weights_digest="sha256:" + "0" * 64,
    size_bytes=1,
    modified_at=0.0,
    system="Be brief.",
    messages=(Message("user", "Who are you?"), Message("assistant", "M.")),
)
QUESTION = Message("user", "Why?")


def test_a_chat_opens_with_the_models_system_text_and_turns() -> None:
    """Both come before what the client said."""
    assert CARD.introduce((QUESTION,)) == (Message("system", "Be brief."), *CARD.messages, QUESTION)


def test_a_chat_with_a_system_message_of_its_own_keeps_that_one_alone() -> None:
    """The client's instructions replace the model's."""
    own = Message("system", "Be long.")
    assert CARD.introduce((own, QUESTION)) == (*CARD.messages, own, QUESTION)


def test_a_model_without_either_leaves_the_chat_alone() -> None:
    """Most models say nothing of their own."""
    assert replace(CARD, system="", messages=()).introduce((QUESTION,)) == (QUESTION,)
