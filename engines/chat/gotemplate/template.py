"""A model's TEMPLATE: which data it is given, and how a chat goes through it (`spec/ollama.md` section 8.2).

A template that mentions `.Messages` is rendered once and ends its prompt itself. An older one knows one turn only: it
is rendered turn by turn, and the last time without what follows `.Response`, where the answer begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from engines.chat.gotemplate.analysis import cut_after_response, identifiers, thinking_tags, tool_tag
from engines.chat.gotemplate.data import collate, message_values, tag_images, tool_values
from engines.chat.gotemplate.executor import execute
from engines.chat.gotemplate.functions import NAMES
from engines.chat.gotemplate.nodes import Action, Command, Field, List, Pipe
from engines.chat.gotemplate.parser import parse
from engines.chat.gotemplate.values import Value
from engines.chat.meter import MAX_SOURCE_CHARS
from engines.chat.parser import ReplyFormat
from engines.chat.template import Rendered
from engines.errors import GoTemplateError, TemplateError
from engines.request import JSON, Message, Tool

DEFAULT = "{{ .Prompt }}"
"""For `/api/generate` with a model that brings no template at all."""


class GoTemplate:
    """One template, parsed once.

    Args:
        source: its text. now: the clock behind `currentDate` and `yesterdayDate`.

    Attributes:
        identifiers: the names of the fields and variables that it mentions, in lower case.
        thinking: the markers around reasoning, as far as it shows them.

    Raises:
        GoTemplateError: it is too large or no template.
    """

    def __init__(self, source: str, *, now: Callable[[], datetime] = datetime.now) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise GoTemplateError(f"template: : longer than {MAX_SOURCE_CHARS} characters")
        self.source = source
        self._now = now
        self._trees = parse(source, NAMES)
        root = self._trees[""]
        self.identifiers = identifiers(self._trees.values())
        self.thinking = thinking_tags(root)
        self._tool_tag = tool_tag(root)
        if not self.identifiers & {"messages", "response"}:
            response = Command(len(source), [Field(len(source), ("Response",))])
            root.nodes.append(Action(len(source), Pipe(len(source), [response])))
        self._tail = cut_after_response(root)

    @property
    def infills(self) -> bool:
        """Whether it places a suffix."""
        return "suffix" in self.identifiers

    def reply_format(self, think: bool | str | None) -> ReplyFormat:
        """Reasoning is only looked for where it may be; calls are found by the names of the tools."""
        thinking = None if think is False else self.thinking
        return ReplyFormat(thinking, tool_tag=self._tool_tag)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        think: bool | str | None = None,
        variables: Mapping[str, JSON] | None = None,
    ) -> Rendered:
        """The prompt of a chat. `variables` are Jinja's and mean nothing here.

        Raises:
            GoTemplateError: the template does not go with its data. TemplateError: it exceeded its limits.
        """
        try:
            system, turns = collate(tag_images(messages))
            if "messages" in self.identifiers:
                data = {"System": system, "Messages": message_values(turns), "Tools": tool_values(tools)}
                text = self._execute({**data, "Response": ""}, think)
            else:
                text = self._turn_by_turn(turns, think)
        except (RecursionError, MemoryError) as error:
            raise TemplateError("the chat template exceeded its limits") from error
        return Rendered(text, self.opens_thinking(text, think))

    def render_infill(self, prompt: str, suffix: str, *, think: bool | str | None = None) -> str:
        """The prompt for what goes between two texts. Raises as `render_chat` does."""
        return self._execute({"Prompt": prompt, "Suffix": suffix, "Response": ""}, think)

    def opens_thinking(self, text: str, think: bool | str | None) -> bool:
        """Whether a prompt ends in the marker that opens reasoning."""
        thinking = self.reply_format(think).thinking
        return thinking is not None and text.rstrip().endswith(thinking[0])

    def _turn_by_turn(self, messages: Sequence[Message], think: bool | str | None) -> str:
        texts: list[str] = []
        turn = {"System": "", "Prompt": "", "Response": ""}
        slots = {"system": "System", "user": "Prompt", "assistant": "Response"}
        ended_by = {"system": ("Prompt", "Response"), "user": ("Response",)}
        for message in messages:
            if message.role not in slots:
                continue
            if any(turn[slot] for slot in ended_by.get(message.role, ())):
                texts.append(self._execute(turn, think))
                turn = dict.fromkeys(turn, "")
            turn[slots[message.role]] = message.content
        return "".join([*texts, self._execute(turn, think, self._tail)])

    def _execute(self, data: Mapping[str, Value], think: bool | str | None, root: List | None = None) -> str:
        if think is None and self.thinking is not None:
            think = True  # as Ollama has it for every model that can
        level = think if isinstance(think, str) else "medium" if think else ""
        told = {"Think": bool(think), "ThinkLevel": level, "IsThinkSet": think is not None}
        return execute(self._trees, {**data, **told}, source=self.source, now=self._now, root=root)
