"""Prompt in: from a request to the token ids that the engine prefills.

Owns which text is rendered, where BOS goes, what a trailing assistant message means, and how a chat is shortened to fit
its window. It leaves templates to `jinja` and token ids to the engine's tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engines.chat.jinja import ChatTemplate
from engines.chat.meter import MAX_OUTPUT_CHARS
from engines.chat.parser import THINK, ReplyFormat
from engines.errors import BadRequest, PromptTooLong, TemplateError
from engines.request import JSON, GenerateRequest, Message

Tokenize = Callable[[str, bool], list[int]]
"""Text and whether to add the vocabulary's own BOS and EOS, to token ids; markers in the text become control tokens."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready for prefill. `truncated_tokens` were left out; `in_thinking` when it ends in open reasoning."""

    tokens: list[int]
    truncated_tokens: int = 0
    in_thinking: bool = False


class PromptBuilder:
    """Builds the prompts of one model.

    Args:
        template: the chat template. tokenize: see `Tokenize`. bos: text of the BOS token.
    """

    def __init__(self, template: ChatTemplate, tokenize: Tokenize, *, bos: str) -> None:
        self.reply_format = ReplyFormat.of(template.source)
        self._template = template
        self._tokenize = tokenize
        self._bos = bos

    def build(self, request: GenerateRequest, *, num_ctx: int) -> Prompt:
        """The prompt of a request, leaving room for at least one token in a window of `num_ctx`.

        A prompt that may be shortened and shifted later loses its middle, as the window itself would lose it.

        Raises:
            PromptTooLong: it does not fit, and may not be shortened.
            TemplateError: the template refused the messages. BadRequest: there is nothing to prefill.
        """
        if request.messages is None:
            _limit_chars(len(request.prompt or ""), num_ctx)
            tokens = list(request.prompt_tokens or ()) or self._encode(request, request.prompt or "")
            prompt = Prompt([*request.context_tokens, *tokens])
        else:
            prompt = self._fit(request, request.messages, num_ctx)
        if not prompt.tokens:
            raise BadRequest("the prompt is empty", param="prompt")
        if len(prompt.tokens) < num_ctx:
            return prompt
        if not (request.truncate and request.shift):
            raise PromptTooLong(len(prompt.tokens), num_ctx)
        return self._without_middle(prompt, request.num_keep, num_ctx)

    def _without_middle(self, prompt: Prompt, num_keep: int, num_ctx: int) -> Prompt:
        """Ollama's last resort (`spec/ollama.md` section 8.4): the beginning to keep, and an end that leaves room.

        About half of what is not kept stays free, so that the answer does not fill the window at once.
        """
        keep = min(num_keep + (self._bos != ""), num_ctx // 2) if num_keep >= 0 else num_ctx // 2
        end = max((num_ctx - keep) // 2, 1)
        tokens = [*prompt.tokens[:keep], *prompt.tokens[-end:]]
        lost = prompt.truncated_tokens + len(prompt.tokens) - len(tokens)
        return Prompt(tokens, lost, prompt.in_thinking)

    def _fit(self, request: GenerateRequest, messages: Sequence[Message], num_ctx: int) -> Prompt:
        """The chat as it is or, when it may be shortened, without its oldest messages.

        Ollama's rule (`spec/ollama.md` section 8.4): the fewest messages go that make the rest fit, system messages and
        the last message stay. Fewer messages never make a longer prompt, so the cut is found by bisection.
        """
        if not request.truncate:
            _limit_chars(sum(len(message.content) for message in messages), num_ctx)
        whole = self._chat(request, messages)
        if not request.truncate or len(whole.tokens) < num_ctx:
            return whole
        low, high = 1, len(messages) - 1
        while low < high:
            middle = (low + high) // 2
            if self._fits(request, _without_oldest(messages, middle), num_ctx):
                high = middle
            else:
                low = middle + 1
        kept = self._chat(request, _without_oldest(messages, max(high, 0)))
        return Prompt(kept.tokens, len(whole.tokens) - len(kept.tokens), kept.in_thinking)

    def _chat(self, request: GenerateRequest, messages: Sequence[Message]) -> Prompt:
        """A trailing assistant message is a prefill: the reply continues it (`spec/chat-formats.md` section 1.4)."""
        prefill = messages[-1] if messages and messages[-1].role == "assistant" else None
        turns = messages[:-1] if prefill else messages
        text = self._template.render(turns, tools=request.tools, variables=_variables(request))
        in_thinking = self._opens_thinking(request, turns, text)
        if prefill is not None:
            if prefill.tool_calls:
                raise BadRequest("the last message must not be an assistant's tool call", param="messages")
            continuation = self._continue(text, prefill, in_thinking=in_thinking)
            text += continuation
            in_thinking = self.reply_format.starts_in_thinking(THINK[0] * in_thinking + continuation)
        return Prompt([*request.context_tokens, *self._encode(request, text)], in_thinking=in_thinking)

    def _opens_thinking(self, request: GenerateRequest, turns: Sequence[Message], text: str) -> bool:
        """Whether the generation prompt leaves a reasoning block open; what the turns themselves say does not count."""
        if not self.reply_format.starts_in_thinking(text):
            return False
        without = self._template.render(
            turns, tools=request.tools, variables=_variables(request), add_generation_prompt=False
        )
        shared = os.path.commonprefix([text, without])  # noqa: RUF071  # character by character is what is meant
        return self.reply_format.starts_in_thinking(text[len(shared) :])

    def _fits(self, request: GenerateRequest, messages: Sequence[Message], num_ctx: int) -> bool:
        """Whether a shortened chat fits. One that the template refuses, as when turns must alternate, does not."""
        try:
            return len(self._chat(request, messages).tokens) < num_ctx
        except TemplateError:
            return False

    def _continue(self, prompt: str, prefill: Message, *, in_thinking: bool) -> str:
        """What to write after the generation prompt, which may already have opened or closed the reasoning."""
        if not prefill.thinking or not self.reply_format.thinks or prompt.rstrip().endswith(THINK[1]):
            return prefill.content
        opening = "" if in_thinking else f"{THINK[0]}\n"
        closing = f"\n{THINK[1]}\n\n{prefill.content}" if prefill.content else ""
        return f"{opening}{prefill.thinking}{closing}"

    def _encode(self, request: GenerateRequest, text: str) -> list[int]:
        """A template that writes BOS itself must not get a second one, nor text that goes on from earlier tokens."""
        has_bos = bool(request.context_tokens) or (self._bos != "" and text.startswith(self._bos))
        return self._tokenize(text, not has_bos)


def _limit_chars(num_chars: int, num_ctx: int) -> None:
    """Refuse a text that no window holds before spending seconds on it; its tokens are then an estimate."""
    if num_chars > MAX_OUTPUT_CHARS:
        raise PromptTooLong(max(num_chars // 4, num_ctx + 1), num_ctx)


def _without_oldest(messages: Sequence[Message], count: int) -> list[Message]:
    """System messages among the first `count`, and everything after them."""
    return [*(message for message in messages[:count] if message.role == "system"), *messages[count:]]


def _variables(request: GenerateRequest) -> dict[str, JSON]:
    """What the template is told beside the messages; thinking stays undefined unless somebody said something."""
    variables: dict[str, JSON] = {}
    if request.think is not None:
        variables |= {"enable_thinking": bool(request.think), "thinking": bool(request.think)}
    if isinstance(request.think, str):
        variables["reasoning_effort"] = request.think
    return variables | dict(request.template_kwargs)
