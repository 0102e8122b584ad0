from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.chat.jinja import CHATML, ChatTemplate
from engines.chat.prompt import Prompt, PromptBuilder
from engines.errors import BadRequest, GoTemplateError, PromptTooLong, TemplateError, UnsupportedCapability
from engines.request import GenerateRequest, Message, Origin, ToolCall

BOS = "^"
ORIGIN = Origin(surface="test", caller="test")
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}{% endif %}"
)
"""The prompt opens or closes the reasoning itself."""
OPENS_ITSELF = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    "{# <think> </think> #}"
)
"""The model writes `<think>` itself."""
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)


def tokenize(text: str, add_special: bool) -> list[int]:
    """One token a character, BOS in front where the vocabulary is asked for it."""
    return [ord(character) for character in (BOS if add_special else "") + text]


def builder(template: str = CHATML, *, adds_bos: bool = True) -> PromptBuilder:
    """A builder on characters, for a vocabulary that adds BOS or one that does not."""
    add = tokenize if adds_bos else (lambda text, add_special: tokenize(text, add_special=False))
    return PromptBuilder(ChatTemplate(template, bos=BOS), add, bos=BOS if adds_bos else "")


def request(*messages: Message, **fields: Any) -> GenerateRequest:
    """A chat, or a raw prompt where `fields` has one."""
    chat = messages if messages or not fields.keys() & {"prompt", "prompt_tokens"} else None
    return GenerateRequest(id="req", model="m", origin=ORIGIN, messages=chat, **fields)


def build(template: str, /, *messages: Message, num_ctx: int = 1000, adds_bos: bool = True, **fields: Any) -> Prompt:
    """The prompt of a request."""
    return builder(template, adds_bos=adds_bos).build(request(*messages, **fields), num_ctx=num_ctx)


def text_of(prompt: Prompt) -> str:
    """A prompt's tokens as the characters that they are."""
    return "".join(map(chr, prompt.tokens))


USER, ASSISTANT = Message("user", "Hi"), Message("assistant", "Hello")
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_the_vocabulary_adds_bos_where_the_template_does_not() -> None:
    """A template without BOS gets the vocabulary's."""
    assert text_of(build(PLAIN, USER)) == "^Hi"


def test_bos_is_never_doubled() -> None:
    """A template that writes BOS itself gets no second one, and a vocabulary that adds none adds none."""
    assert text_of(build("{{ bos_token }}" + PLAIN, USER)) == "^Hi"
    assert text_of(build("{{ bos_token }}" + PLAIN, USER, adds_bos=False)) == "^Hi"
    assert text_of(build(PLAIN, USER, adds_bos=False)) == "Hi"


def test_a_raw_prompt_is_used_as_it_is() -> None:
    """No template, but BOS, unless the text begins with it."""
    assert text_of(build(CHATML, prompt="Once")) == "^Once"
    assert text_of(build(CHATML, prompt="^Once")) == "^Once"
    assert build(THINKING, prompt="<think>").in_thinking is False


def test_raw_tokens_are_used_as_they_are() -> None:
    """Nothing is added to token ids."""
    assert build(CHATML, prompt_tokens=(5, 6)).tokens == [5, 6]


def test_earlier_context_comes_first_and_without_a_second_bos() -> None:
    """Ollama's `context` goes before the rendered chat or the raw prompt."""
    assert build(PLAIN, USER, context_tokens=(94, 1)).tokens == [94, 1, *map(ord, "Hi")]
    assert build(PLAIN, prompt="Hi", context_tokens=(94, 1)).tokens == [94, 1, *map(ord, "Hi")]


@pytest.mark.parametrize("fields", [{"prompt": ""}, {"prompt_tokens": ()}, {"messages": ()}])
def test_an_empty_prompt_is_refused(fields: dict[str, Any]) -> None:
    """There is nothing to prefill."""
    messages = fields.pop("messages", None)
    empty = GenerateRequest(id="req", model="m", origin=ORIGIN, messages=messages, **fields)
    with pytest.raises(BadRequest, match="empty"):
        builder(PLAIN, adds_bos=False).build(empty, num_ctx=10)


def test_an_enormous_prompt_is_refused_before_it_is_tokenized() -> None:
    """Reading megabytes that cannot fit would keep everyone else waiting."""

    def never(text: str, add_special: bool) -> list[int]:
        raise NotImplementedError

    enormous = request(prompt="x" * (4 * 1024 * 1024 + 1))
    with pytest.raises(PromptTooLong):
        PromptBuilder(ChatTemplate(CHATML), never, bos="").build(enormous, num_ctx=10)


def test_a_prompt_leaves_room_for_one_token() -> None:
    """`num_ctx - 1` tokens fit, `num_ctx` do not, and the error has the numbers."""
    assert len(build(PLAIN, prompt="12345678", num_ctx=10).tokens) == 9
    with pytest.raises(PromptTooLong) as caught:
        build(PLAIN, prompt="123456789", num_ctx=10)
    assert (caught.value.prompt_tokens, caught.value.num_ctx) == (10, 10)


def test_a_long_chat_is_refused_unless_it_may_be_cut() -> None:
    """Without `truncate` nothing is dropped silently."""
    turns = [Message("user", "12345"), Message("assistant", "12345"), Message("user", "123")]
    with pytest.raises(PromptTooLong):
        build(PLAIN, *turns, num_ctx=10)
    prompt = build(PLAIN, *turns, num_ctx=10, truncate=True)
    assert text_of(prompt) == "^12345123"
    assert prompt.truncated_tokens == 5


def test_system_messages_and_the_last_message_stay() -> None:
    """Everything else may go; what still does not fit is refused."""
    turns = [Message("system", "S"), Message("user", "12345"), Message("system", "T"), Message("user", "67")]
    assert text_of(build(PLAIN, *turns, num_ctx=6, truncate=True)) == "^ST67"
    with pytest.raises(PromptTooLong):
        build(PLAIN, *turns, num_ctx=5, truncate=True)


def test_a_single_long_message_cannot_be_cut() -> None:
    """There is nothing older to drop."""
    with pytest.raises(PromptTooLong):
        build(PLAIN, Message("user", "1234567890"), num_ctx=5, truncate=True)


roles: st.SearchStrategy[str] = st.sampled_from(["system", "user", "assistant", "tool"])
chats = st.lists(st.builds(Message, roles, st.text("ab", max_size=8)), min_size=1, max_size=12).filter(
    lambda chat: chat[-1].role != "assistant"
)


def shortened(chat: list[Message], count: int) -> list[Message]:
    """The chat without its oldest `count` messages, system messages excepted."""
    return [*(message for message in chat[:count] if message.role == "system"), *chat[count:]]


@given(chat=chats, num_ctx=st.integers(2, 90))
def test_the_fewest_messages_go(chat: list[Message], num_ctx: int) -> None:
    """The cut is the first of all that fits, as Ollama finds it by trying one after another."""
    machine = builder(PLAIN + "[a]")
    whole = machine.build(request(*chat), num_ctx=10_000).tokens
    for count in range(len(chat)):
        tokens = machine.build(request(*shortened(chat, count)), num_ctx=10_000).tokens
        if len(tokens) < num_ctx:
            prompt = machine.build(request(*chat, truncate=True), num_ctx=num_ctx)
            assert prompt.tokens == tokens
            assert prompt.truncated_tokens == len(whole) - len(tokens)
            return
    with pytest.raises(PromptTooLong):
        machine.build(request(*chat, truncate=True), num_ctx=num_ctx)


@given(num_turns=st.integers(1, 9), num_ctx=st.integers(6, 60))
def test_a_cut_that_the_template_refuses_is_passed_over(num_turns: int, num_ctx: int) -> None:
    """Where turns must alternate, a long chat is cut before a user's turn instead of being refused."""
    turns = [Message("user" if i % 2 == 0 else "assistant", "1234") for i in range(2 * num_turns - 1)]
    prompt = build(ALTERNATING, *turns, num_ctx=num_ctx, truncate=True)
    assert 5 <= len(prompt.tokens) < num_ctx
    assert (len(prompt.tokens) - 1) // 4 % 2 == 1


def test_a_template_that_refuses_the_whole_chat_is_heard() -> None:
    """Truncation does not hide what is wrong with the messages."""
    with pytest.raises(TemplateError, match="alternate"):
        build(ALTERNATING, USER, USER, num_ctx=4, truncate=True)


def test_a_trailing_assistant_message_is_continued() -> None:
    """It comes after the generation prompt, and its turn stays open."""
    text = text_of(build(CHATML, USER, ASSISTANT, adds_bos=False))
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"


def test_a_trailing_tool_call_cannot_be_continued() -> None:
    """A call without its result is a mistake of the client."""
    with pytest.raises(BadRequest, match="tool call"):
        build(CHATML, USER, Message("assistant", tool_calls=(ToolCall("1", "f", {}),)))


@pytest.mark.parametrize(
    ("template", "think", "prefill", "end", "in_thinking"),
    [
        (THINKING, True, None, "[a]<think>", True),
        (THINKING, False, None, "[a]<think></think>", False),
        (THINKING, None, None, "[a]<think></think>", False),
        (THINKING, True, Message("assistant", thinking="why"), "[a]<think>why", True),
        (THINKING, True, Message("assistant", "so", thinking="why"), "[a]<think>why\n</think>\n\nso", False),
        (THINKING, False, Message("assistant", "so", thinking="why"), "[a]<think></think>so", False),
        (OPENS_ITSELF, True, None, "[a]", False),
        (OPENS_ITSELF, True, Message("assistant", thinking="why"), "[a]<think>\nwhy", True),
        (OPENS_ITSELF, True, Message("assistant", "so", thinking="why"), "[a]<think>\nwhy\n</think>\n\nso", False),
        (OPENS_ITSELF, True, Message("assistant", "so"), "[a]so", False),
        (CHATML, True, Message("assistant", "so", thinking="why"), "assistant\nso", False),
    ],
)
def test_reasoning_is_open_or_closed_as_the_prompt_leaves_it(
    template: str, think: bool | None, prefill: Message | None, end: str, in_thinking: bool
) -> None:
    """The parser's start state follows from what ends the prompt, a continued reasoning included."""
    prompt = build(template, USER, *([prefill] if prefill else []), think=think)
    assert text_of(prompt).endswith(end)
    assert prompt.in_thinking is in_thinking


@pytest.mark.parametrize("prefill", [[], [Message("assistant", "so")]])
def test_what_a_user_writes_does_not_open_reasoning(prefill: list[Message]) -> None:
    """A question about `<think>` is answered in the open."""
    assert build(OPENS_ITSELF, Message("user", "What is <think>?"), *prefill).in_thinking is False
    assert build(THINKING, Message("user", "What is </think>?"), think=True).in_thinking is True


@pytest.mark.parametrize(
    ("think", "expected"), [(None, "-- -"), (True, "TrueTrue -"), (False, "FalseFalse -"), ("low", "TrueTrue low")]
)
def test_the_wish_to_think_reaches_the_template(think: bool | str | None, expected: str) -> None:
    """Both names of the switch and the effort; unsaid, they stay undefined."""
    template = "{{ enable_thinking | default('-') }}{{ thinking | default('-') }} {{ reasoning_effort | default('-') }}"
    assert text_of(build(template, USER, think=think, adds_bos=False)) == expected


def test_template_variables_of_the_client_win() -> None:
    """`chat_template_kwargs` are more precise than `think`."""
    prompt = build("{{ enable_thinking }}", USER, think=True, template_kwargs={"enable_thinking": 0}, adds_bos=False)
    assert text_of(prompt) == "0"


GO = "{{ range .Messages }}{{ if .Thinking }}<r>{{ .Thinking }}</r>{{ end }}[{{ .Role }}]{{ .Content }}{{ end }}<r>"


def test_a_request_may_bring_a_template_in_go() -> None:
    """It renders the chat in place of the model's own, and says whether the prompt leaves reasoning open."""
    prompt = build(PLAIN, USER, template=GO, think=True)
    assert (text_of(prompt), prompt.text, prompt.in_thinking) == ("^[user]Hi<r>", "[user]Hi<r>", True)
    assert not build(PLAIN, USER, template=GO, think=False).in_thinking
    assert builder().reply_format(request(USER, template=GO)).thinking == ("<r>", "</r>")


def test_a_chat_in_go_is_cut_as_any_other() -> None:
    """The oldest messages go, system messages and the last stay."""
    turns = [Message("system", "S"), Message("user", "1" * 9), Message("assistant", "2" * 9), Message("user", "3")]
    template = "{{ range .Messages }}{{ .Content }}{{ end }}"
    prompt = build(PLAIN, *turns, template=template, num_ctx=14, truncate=True)
    assert (text_of(prompt), prompt.truncated_tokens) == ("^S" + "2" * 9 + "3", 9)


def test_an_old_template_goes_on_where_the_answer_began() -> None:
    """A trailing assistant message is what the answer begins with."""
    template = "<{{ .Prompt }}>{{ .Response }}</>"
    assert text_of(build(PLAIN, USER, ASSISTANT, Message("user", "x"), template=template)) == "^<Hi>Hello</><x>"
    assert text_of(build(PLAIN, USER, ASSISTANT, template=template)) == "^<Hi>Hello"


def test_a_wrong_template_is_refused() -> None:
    """Whether it is none or does not go with its data."""
    with pytest.raises(GoTemplateError, match="unclosed action"):
        build(PLAIN, USER, template="{{ .Messages")
    with pytest.raises(GoTemplateError, match="can't evaluate field"):
        build(PLAIN, USER, template="{{ range .Messages }}{{ .Nope }}{{ end }}")


def test_a_gap_is_filled_by_the_template_or_by_the_vocabulary() -> None:
    """The template's own words for it go first."""
    fields: dict[str, Any] = {"prompt": "a", "suffix": "b"}
    with pytest.raises(UnsupportedCapability):
        build(PLAIN, **fields)
    template = "{{ if .Suffix }}{{ .Suffix }}|{{ .Prompt }}{{ end }}{{ .Response }}"
    assert text_of(build(PLAIN, template=template, **fields)) == "^b|a"
    able = PromptBuilder(ChatTemplate(PLAIN), tokenize, bos=BOS, infill=("<p>", "<s>", "<m>"))
    assert text_of(able.build(request(**fields), num_ctx=100)) == "^<p>a<s>b<m>"
    assert text_of(able.build(request(**fields, template="{{ .Prompt }}"), num_ctx=100)) == "^<p>a<s>b<m>"


def test_a_raw_prompt_may_leave_the_template_s_reasoning_open() -> None:
    """Where the template in use says how that looks, and thinking is on."""
    assert build(PLAIN, prompt="x<r>\n", template=GO, think=True).in_thinking
    assert not build(PLAIN, prompt="x<r>\n", template=GO).in_thinking
