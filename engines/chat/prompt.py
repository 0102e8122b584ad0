"""Prompt in: from a request to the token ids that the engine prefills.

Owns which template is rendered, where BOS goes, how a gap is filled in, and how a chat is shortened to fit its window.
It leaves templates to `jinja` and `gotemplate`, and token ids to the engine's tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from engines.chat.meter import MAX_OUTPUT_CHARS
from engines.chat.parser import ReplyFormat
from engines.chat.template import Template
from engines.errors import BadRequest, PromptTooLong, TemplateError, UnsupportedCapability
from engines.request import GenerateRequest, Message

Tokenize = Callable[[str, bool], list[int]]
"""Text and whether to add the vocabulary's own BOS and EOS, to token ids; markers in the text become control tokens."""


Infill = tuple[str, str, str]
"""The texts of a vocabulary's tokens for filling in: before the prompt, before the suffix, and before the answer."""

_MAX_TEMPLATES = 32


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready for prefill.

    Attributes:
        truncated_tokens: how many were left out. in_thinking: whether it ends in open reasoning.
        text: as it was rendered, whatever was left out of its middle afterwards; empty for token ids.
    """

    tokens: list[int]
    truncated_tokens: int = 0
    in_thinking: bool = False
    text: str = ""


class PromptBuilder:
    """Builds the prompts of one model.

    Args:
        template: the model's own chat template. tokenize: see `Tokenize`. bos: text of the BOS token.
        infill: see `Infill`; None where the vocabulary has no such tokens.
    """

    def __init__(self, template: Template, tokenize: Tokenize, *, bos: str, infill: Infill | None = None) -> None:
        self._template = template
        self._tokenize = tokenize
        self._bos = bos
        self._infill = infill
        self._parse = lru_cache(_MAX_TEMPLATES)(_parse)  # of those that come with requests

    def reply_format(self, request: GenerateRequest) -> ReplyFormat:
        """How the reply to a request is to be read. Raises TemplateError."""
        return self._template_of(request).reply_format(request.think)

    def _template_of(self, request: GenerateRequest) -> Template:
        return self._template if request.template is None else self._parse(request.template)

    def build(self, request: GenerateRequest, *, num_ctx: int) -> Prompt:
        """The prompt of a request, leaving room for at least one token in a window of `num_ctx`.

        A prompt that may be shortened and shifted later loses its middle, as the window itself would lose it.

        Raises:
            PromptTooLong: it does not fit, and may not be shortened.
            TemplateError: the template refused the messages. BadRequest: there is nothing to prefill.
        """
        if request.messages is None:
            _limit_chars(len(request.prompt or "") + len(request.suffix), num_ctx)
            text = self._raw(request)
            tokens = list(request.prompt_tokens or ()) or self._encode(request, text)
            in_thinking = bool(request.think) and self._template_of(request).opens_thinking(text, request.think)
            prompt = Prompt([*request.context_tokens, *tokens], in_thinking=in_thinking, text=text)
        else:
            prompt = self._fit(request, request.messages, num_ctx)
        if not prompt.tokens:
            raise BadRequest("the prompt is empty", param="prompt")
        if len(prompt.tokens) < num_ctx:
            return prompt
        if not (request.truncate and request.shift):
            raise PromptTooLong(len(prompt.tokens), num_ctx)
        return self._without_middle(prompt, request.num_keep, num_ctx)

    def _raw(self, request: GenerateRequest) -> str:
        """The text of a prompt that is no chat: as it is or, where a suffix follows the answer, arranged around it."""
        prompt = request.prompt or ""
        if not request.suffix:
            return prompt
        template = self._template_of(request)
        if template.infills:
            return template.render_infill(prompt, request.suffix, think=request.think)
        if self._infill is None:
            raise UnsupportedCapability(request.model, "insert")
        before, after, middle = self._infill
        return f"{before}{prompt}{after}{request.suffix}{middle}"

    def _without_middle(self, prompt: Prompt, num_keep: int, num_ctx: int) -> Prompt:
        """Ollama's last resort (`spec/ollama.md` section 8.4): the beginning to keep, and an end that leaves room.

        About half of what is not kept stays free, so that the answer does not fill the window at once.
        """
        keep = min(num_keep + (self._bos != ""), num_ctx // 2) if num_keep >= 0 else num_ctx // 2
        end = max((num_ctx - keep) // 2, 1)
        tokens = [*prompt.tokens[:keep], *prompt.tokens[-end:]]
        lost = prompt.truncated_tokens + len(prompt.tokens) - len(tokens)
        return Prompt(tokens, lost, prompt.in_thinking, prompt.text)

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
        return Prompt(kept.tokens, len(whole.tokens) - len(kept.tokens), kept.in_thinking, kept.text)

    def _chat(self, request: GenerateRequest, messages: Sequence[Message]) -> Prompt:
        rendered = self._template_of(request).render_chat(
            messages, tools=request.tools, think=request.think, variables=request.template_kwargs
        )
        tokens = [*request.context_tokens, *self._encode(request, rendered.text)]
        return Prompt(tokens, in_thinking=rendered.in_thinking, text=rendered.text)

    def _fits(self, request: GenerateRequest, messages: Sequence[Message], num_ctx: int) -> bool:
        """Whether a shortened chat fits. One that the template refuses, as when turns must alternate, does not."""
        try:
            return len(self._chat(request, messages).tokens) < num_ctx
        except TemplateError:
            return False

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


def _parse(text: str) -> Template:
    from engines.chat.gotemplate.template import GoTemplate  # noqa: PLC0415  # most models never need it

    return GoTemplate(text)
