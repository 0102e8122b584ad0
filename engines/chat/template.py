"""What every chat template can do, whichever language it is written in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engines.chat.parser import ReplyFormat
from engines.request import JSON, Message, Tool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt's text; `in_thinking` when it leaves a reasoning block open, so that the reply begins inside."""

    text: str
    in_thinking: bool = False


class Template(Protocol):
    """A compiled template. Rendering raises TemplateError for whatever goes wrong."""

    def reply_format(self, think: bool | str | None) -> ReplyFormat:
        """How a reply to its prompts is to be read."""

    @property
    def infills(self) -> bool:
        """Whether it knows what to do with a text that goes on after the answer."""

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        think: bool | str | None = None,
        variables: Mapping[str, JSON] | None = None,
    ) -> Rendered:
        """The prompt of a chat, up to where the answer begins or, when its last message is one, goes on.

        `variables` are the client's own, which only templates in Jinja know.
        """

    def opens_thinking(self, text: str, think: bool | str | None) -> bool:
        """Whether a prompt that is no chat leaves reasoning open."""

    def render_infill(self, prompt: str, suffix: str, *, think: bool | str | None = None) -> str:
        """The prompt for what goes between two texts; only where `infills`."""
