"""Chat templates in Jinja, as GGUF files carry them (`spec/chat-formats.md` section 1).

Owns what a template is told: messages, tools and variables as plain data, shaped the way published templates expect.
What a template may do and cost is the sandbox's business. The surprise: `tools` stays undefined without tools, because
both None and an empty list break published templates.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from engines.chat.meter import MAX_SOURCE_CHARS
from engines.chat.parser import THINK, ReplyFormat
from engines.chat.sandbox import make_environment, render
from engines.chat.template import Rendered
from engines.errors import BadRequest, TemplateError
from engines.request import JSON, Message, Tool

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For models that bring no template of their own."""


class ChatTemplate:
    """One model's chat template, compiled once.

    Args:
        source: the template's text. bos, eos: the texts of the model's special tokens, empty when it has none.
        now: the clock behind `strftime_now`.

    Raises:
        TemplateError: the template is too large or does not compile.
    """

    def __init__(
        self, source: str, *, bos: str = "", eos: str = "", now: Callable[[], datetime] = datetime.now
    ) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(f"the chat template is longer than {MAX_SOURCE_CHARS} characters")
        self.source = source
        self._reply_format = ReplyFormat.of(source)
        self._bos = bos
        self._eos = eos
        self._now = now
        try:
            self._template = make_environment(now).from_string(source)
        except Exception as error:  # untrusted code: Python's own compiler may refuse what Jinja made of it
            raise TemplateError(f"the chat template does not compile: {error}") from error

    infills = False

    def reply_format(self, think: bool | str | None) -> ReplyFormat:
        """Reasoning that was switched off and came all the same is still told apart."""
        return self._reply_format

    def opens_thinking(self, text: str, think: bool | str | None) -> bool:
        """A prompt that the template has not made is answered with raw text."""
        return False

    def render_infill(self, prompt: str, suffix: str, *, think: bool | str | None = None) -> str:
        """Chat templates have no words for it."""
        raise TemplateError("the chat template cannot place a suffix")

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        think: bool | str | None = None,
        variables: Mapping[str, JSON] | None = None,
    ) -> Rendered:
        """A trailing assistant message is a prefill: the reply continues it (`spec/chat-formats.md` section 1.4).

        Raises:
            BadRequest: the prefill is a tool call. TemplateError: as `render`.
        """
        known = _switches(think) | dict(variables or {})
        prefill = messages[-1] if messages and messages[-1].role == "assistant" else None
        turns = messages[:-1] if prefill else messages
        text = self.render(turns, tools=tools, variables=known)
        in_thinking = self._reply_format.starts_in_thinking(text) and self._opens_thinking(turns, tools, known, text)
        if prefill is None:
            return Rendered(text, in_thinking)
        if prefill.tool_calls:
            raise BadRequest("the last message must not be an assistant's tool call", param="messages")
        continuation = self._continue(text, prefill, in_thinking=in_thinking)
        in_thinking = self._reply_format.starts_in_thinking(THINK[0] * in_thinking + continuation)
        return Rendered(text + continuation, in_thinking)

    def _opens_thinking(
        self, turns: Sequence[Message], tools: Sequence[Tool], variables: Mapping[str, JSON], text: str
    ) -> bool:
        """Whether the generation prompt leaves a reasoning block open; what the turns themselves say does not count."""
        without = self.render(turns, tools=tools, variables=variables, add_generation_prompt=False)
        shared = os.path.commonprefix([text, without])  # noqa: RUF071  # character by character is what is meant
        return self._reply_format.starts_in_thinking(text[len(shared) :])

    def _continue(self, prompt: str, prefill: Message, *, in_thinking: bool) -> str:
        """What to write after the generation prompt, which may already have opened or closed the reasoning."""
        if not prefill.thinking or not self._reply_format.thinking or prompt.rstrip().endswith(THINK[1]):
            return prefill.content
        opening = "" if in_thinking else f"{THINK[0]}\n"
        closing = f"\n{THINK[1]}\n\n{prefill.content}" if prefill.content else ""
        return f"{opening}{prefill.thinking}{closing}"

    def render(
        self,
        messages: Iterable[Message],
        *,
        tools: Iterable[Tool] = (),
        add_generation_prompt: bool = True,
        variables: Mapping[str, JSON] | None = None,
    ) -> str:
        """The prompt text of a chat.

        Raises:
            TemplateError: the template refused the messages, failed, or exceeded its limits.
        """
        now = self._now()
        values: dict[str, Any] = {
            "bos_token": self._bos,
            "eos_token": self._eos,
            "datetime": now.strftime("%b %d %Y"),
            "date_string": now.strftime("%d %b %Y"),
            **(variables or {}),
            "messages": [_plain_message(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        plain_tools = [_plain_tool(tool) for tool in tools]
        if plain_tools:  # undefined without tools: None and [] both break published templates
            values |= {"tools": plain_tools, "functions": json.dumps(plain_tools, ensure_ascii=False)}
        try:
            return render(self._template, copy.deepcopy(values))  # templates may change what they are given
        except TemplateError:
            raise
        except (RecursionError, MemoryError) as error:
            raise TemplateError("the chat template exceeded its limits") from error
        except Exception as error:  # untrusted code: it can raise anything
            raise TemplateError(f"the chat template failed: {error}") from error


def _switches(think: bool | str | None) -> dict[str, JSON]:
    """The variables that say whether to think; they stay undefined unless somebody said something."""
    if think is None:
        return {}
    effort = {"reasoning_effort": think} if isinstance(think, str) else {}
    return {"enable_thinking": bool(think), "thinking": bool(think)} | effort


def _plain_message(message: Message) -> dict[str, JSON]:
    """A message as templates know it: nothing missing, nothing None (`spec/chat-formats.md` section 1.3)."""
    plain: dict[str, JSON] = {"role": message.role, "content": message.content}
    if message.thinking:
        plain |= {"reasoning_content": message.thinking, "thinking": message.thinking}
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _plain_arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_name:
        plain |= {"name": message.tool_name, "tool_name": message.tool_name}
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _plain_arguments(arguments: dict[str, JSON] | str) -> dict[str, JSON]:
    return arguments if isinstance(arguments, dict) else {"input": arguments}


def _plain_tool(tool: Tool) -> dict[str, JSON]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}
