import base64
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_fakes import ORIGIN, card

from compat.keep_alive import parse_keep_alive
from compat.openai.decode import decode_chat, decode_completion
from compat.openai.parse import parse_chat, parse_completion
from engines.errors import BadRequest, UnsupportedCapability
from engines.request import (
    FOREVER,
    GenerateRequest,
    LoadOptions,
    Message,
    OutputFormat,
    Priority,
    Sampling,
    Syntax,
    Tool,
    ToolCall,
)

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
BASE64 = base64.b64encode(PNG).decode()
USER = {"role": "user", "content": "hi"}


def chat(*capabilities: str, **body: Any) -> GenerateRequest:
    """A chat body, parsed for a model with these capabilities."""
    decoded = decode_chat(json.dumps({"model": "m", "messages": [USER]} | body).encode())
    return parse_chat(decoded, card("m", *capabilities), request_id="req_1", origin=ORIGIN)


def completions(*capabilities: str, **body: Any) -> list[GenerateRequest]:
    """A completion body, parsed for a model with these capabilities."""
    decoded = decode_completion(json.dumps({"model": "m"} | body).encode())
    return parse_completion(decoded, card("m", *capabilities), request_id="req_1", origin=ORIGIN)


def messages(*bodies: dict[str, Any], capabilities: tuple[str, ...] = ()) -> tuple[Message, ...]:
    """These messages, normalised."""
    return chat(*capabilities, messages=bodies).messages or ()


def refusal(**body: Any) -> tuple[str | None, str | None]:
    """Path and code of a chat body's refusal."""
    with pytest.raises(BadRequest) as caught:
        chat(**body)
    return caught.value.param, caught.value.reason


def test_a_plain_chat_asks_for_the_dialect_s_defaults() -> None:
    """Nothing is said but model and messages; OpenAI's temperature and top_p are only defaults."""
    assert chat() == GenerateRequest(
        id="req_1",
        model="m",
        origin=ORIGIN,
        messages=(Message("user", "hi"),),
        defaults=Sampling(temperature=1.0, top_p=1.0),
    )


def test_sampling_fields_are_passed_on() -> None:
    """OpenAI's fields and llama.cpp's extensions."""
    request = chat(
        temperature=2.5, top_p=0.5, frequency_penalty=1, presence_penalty=-1, seed=5, stop="x", max_tokens=9,
        top_k=40, min_p=0.1, typical_p=0.9, repeat_penalty=1.1, repeat_last_n=-1, n=3, stream=True,
    )  # fmt: skip
    assert request.sampling == Sampling(2.5, 40, 0.5, 0.1, 0.9, -1, 1.1, -1.0, 1.0, 5, ("x",), 9)
    assert (request.num_choices, request.stream) == (3, True)


def test_openai_s_fields_win_over_ollama_s_options() -> None:
    """`options` fills what is not said otherwise, and carries load options."""
    request = chat(temperature=0, options={"temperature": 1, "top_k": 3, "num_ctx": 512})
    assert request.sampling == Sampling(temperature=0.0, top_k=3)
    assert request.load == LoadOptions(num_ctx=512)


def test_a_wrong_option_is_a_bad_request_here() -> None:
    """Ollama's 500 for a wrong option type is Ollama's alone."""
    assert refusal(options={"top_k": "x"}) == ("options.top_k", "invalid_type")


@pytest.mark.parametrize("prefix", ["", "options."])
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("mirostat", 3, "integer_above_max_value"),
        ("mirostat", True, "invalid_type"),
        ("xtc_probability", -0.1, "decimal_below_min_value"),
        ("dry_multiplier", 1e300, "decimal_above_max_value"),
        ("dry_sequence_breakers", ":", "invalid_type"),
        ("dynatemp_range", 10**400, "decimal_above_max_value"),
        ("ignore_eos", 1, "invalid_type"),
        ("logit_bias", {"hello": 1}, "invalid_value"),
        ("logit_bias", [[1]], "invalid_value"),
        ("logit_bias", 3, "invalid_type"),
    ],
)
def test_a_wrong_sampler_is_refused_by_name(prefix: str, name: str, value: Any, reason: str) -> None:
    """As a field and inside `options`."""
    body = {"options": {name: value}} if prefix else {name: value}
    assert refusal(**body) == (prefix + name, reason)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("temperature", 10**400, "decimal_above_max_value"),
        ("presence_penalty", 1e300, "decimal_above_max_value"),
        ("repeat_penalty", -1, "decimal_below_min_value"),
        ("num_ctx", -5, "integer_below_min_value"),
        ("num_predict", 10**400, "integer_above_max_value"),
        ("num_keep", "4", "invalid_type"),
    ],
)
def test_an_absurd_option_is_refused_by_name(name: str, value: Any, reason: str) -> None:
    """What Ollama moves to a bound is told here."""
    assert refusal(options={name: value}) == (f"options.{name}", reason)


LONG = "1" + "0" * 400


@pytest.mark.parametrize("name", ["temperature", "repeat_penalty", "top_p", "min_p", "n", "top_k", "presence_penalty"])
@pytest.mark.parametrize("text", [LONG, f"-{LONG}", LONG * 13, "1e300", "-1e300", "true", '"1"', "[1]"])
def test_absurd_fields_are_refused_by_name(name: str, text: str) -> None:
    """Never a server error."""
    with pytest.raises(BadRequest) as caught:
        decode_chat(
            b'{"model":"m","messages":[{"role":"user","content":"x"}],"%s":%s}' % (name.encode(), text.encode())
        )
    assert caught.value.param == name


def test_llama_cpp_s_samplers_are_passed_on() -> None:
    """Fields win over `options`; a list of breakers is a tuple here."""
    request = chat(
        mirostat=2, mirostat_tau=4, top_n_sigma=1, dry_multiplier=0.5, dry_sequence_breakers=["\n"], ignore_eos=True,
        logit_bias={"5": -100, "7": 2}, options={"mirostat": 1, "xtc_probability": 0.5, "num_keep": 9},
    )  # fmt: skip
    assert request.sampling == Sampling(
        mirostat=2,
        mirostat_tau=4.0,
        top_n_sigma=1.0,
        dry_multiplier=0.5,
        dry_sequence_breakers=("\n",),
        ignore_eos=True,
        logit_bias=((5, -math.inf), (7, 2.0)),
        xtc_probability=0.5,
    )
    assert request.num_keep == 9


@pytest.mark.parametrize(
    ("body", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
        ({"logprobs": True, "n_probs": 3}, 3),
        ({"n_probs": 3}, 3),
        ({"n_probs": 0}, None),
    ],
)
def test_log_probabilities_are_asked_for(body: dict[str, Any], logprobs: int | None) -> None:
    """By `logprobs`, or by llama.cpp's name."""
    assert chat(**body).logprobs == logprobs


def test_alternatives_without_log_probabilities_are_refused() -> None:
    """As by OpenAI."""
    assert refusal(top_logprobs=2) == ("top_logprobs", "invalid_value")
    assert refusal(top_logprobs=21, logprobs=True) == ("top_logprobs", "integer_above_max_value")


@pytest.mark.parametrize(
    ("body", "priority"),
    [
        ({}, Priority.NORMAL),
        ({"stream": True}, Priority.INTERACTIVE),
        ({"service_tier": "flex"}, Priority.BATCH),
        ({"service_tier": "flex", "stream": True}, Priority.BATCH),
        ({"service_tier": "auto"}, Priority.NORMAL),
        ({"service_tier": {"any": "thing"}}, Priority.NORMAL),
    ],
)
def test_who_goes_first(body: dict[str, Any], priority: Priority) -> None:
    """Who reads along, then everybody, then the cheap tier."""
    assert chat(**body).priority is priority


@pytest.mark.parametrize(
    ("body", "truncate"),
    [
        ({}, False),
        ({"truncate": False}, False),
        ({"truncate": True}, True),
        ({"truncation": "auto"}, True),
        ({"truncation": "disabled"}, False),
    ],
)
def test_prompts_are_cut_on_request_only(body: dict[str, Any], truncate: bool) -> None:
    """Otherwise one that is too long is refused."""
    assert chat(**body).truncate is truncate
    assert completions(**body)[0].truncate is truncate


@pytest.mark.parametrize(
    ("seed", "folded"),
    [(5, 5), (-1, -1), (-2, 2**32 - 2), (2**32 + 3, 3), (2**63 - 1, 2**32 - 1), (10**30, 10**30 % 2**32)],
)
def test_seeds_are_folded_to_32_bits(seed: int, folded: int) -> None:
    """Only -1 keeps its meaning of random."""
    assert chat(seed=seed).sampling.seed == folded


@pytest.mark.parametrize(
    ("limits", "max_tokens"),
    [
        ({}, None),
        ({"max_tokens": -1}, -1),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"n_predict": 3}, 3),
        ({"max_tokens": 10**30}, 2**31 - 1),
    ],
)
def test_the_token_limit(limits: dict[str, int], max_tokens: int | None) -> None:
    """`max_completion_tokens` wins, `n_predict` is an alias, and what exceeds every context is clamped."""
    assert chat(**limits).sampling.max_tokens == max_tokens


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict"])
@pytest.mark.parametrize("limit", [0, -2])
def test_a_token_limit_below_one_is_refused(name: str, limit: int) -> None:
    """Only -1 is a negative limit with a meaning."""
    assert refusal(**{name: limit}) == (name, "integer_below_min_value")


@pytest.mark.parametrize(("stop", "strings"), [("a", ("a",)), (["a", "", "b"], ("a", "b")), ([""], None), ([], None)])
def test_empty_stop_strings_are_dropped(stop: Any, strings: tuple[str, ...] | None) -> None:
    """A stop string that is always there would stop everything."""
    assert chat(stop=stop).sampling.stop == strings


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"audio": {"voice": "alloy"}}, "audio", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_value"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tool_choice": "sometimes"}, "tool_choice", "invalid_value"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "invalid_value"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking", "invalid_type"),
        ({"keep_alive": "soon"}, "keep_alive", "invalid_value"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str, reason: str) -> None:
    """Silently ignoring a field would change the answer."""
    assert refusal(**body) == (param, reason)


@pytest.mark.parametrize(
    "body",
    [
        {"logprobs": False, "top_logprobs": 0, "logit_bias": {}, "modalities": ["text"], "functions": []},
        {
            "store": True,
            "user": "u",
            "metadata": {},
            "prediction": {},
            "service_tier": "auto",
            "web_search_options": {},
        },
    ],
)
def test_fields_that_ask_for_nothing_change_nothing(body: dict[str, Any]) -> None:
    """Explicit defaults and fields without effect leave the request as it is."""
    assert chat(**body) == chat()


F = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "$defs": {}}}}
G = {"function": {"name": "g"}}


def test_tools_are_passed_on_with_their_schemas() -> None:
    """Unknown schema keywords stay, missing parameters become an empty object, hosted tools are skipped."""
    assert chat(tools=[F, G, {"type": "web_search"}]).tools == (
        Tool("f", "d", {"type": "object", "$defs": {}}),
        Tool("g"),
    )


def test_of_two_tools_with_one_name_the_last_counts() -> None:
    """A later definition replaces an earlier one."""
    assert chat(tools=[F, {"function": {"name": "f", "description": "new"}}]).tools == (Tool("f", "new"),)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (None, ["f", "g"]),
        ("auto", ["f", "g"]),
        ("none", []),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [G, 1, {}]}}, ["g"]),
    ],
)
def test_tool_choice_narrows_the_tools(choice: Any, names: list[str]) -> None:
    """The model is shown what it may call and nothing else."""
    assert [tool.name for tool in chat(tools=[F, G], tool_choice=choice).tools] == names


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, OutputFormat()),
        ({"response_format": {"type": "json_object", "schema": {"a": 1}}}, OutputFormat({"a": 1})),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}}, OutputFormat({"a": 1})),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, OutputFormat()),
        ({"response_format": {"type": "json_schema", "schema": {"a": 1}}}, OutputFormat({"a": 1})),
        ({"json_schema": {"a": 1}}, OutputFormat({"a": 1})),
    ],
)  # fmt: skip
def test_response_format_becomes_a_constraint(body: dict[str, Any], expected: OutputFormat | None) -> None:
    """All spellings of a schema; an empty one allows any object."""
    assert chat(**body).format == expected


GBNF = 'root ::= "yes" | "no"'
LARK = 'start: "yes" | "no"'


def constraint(syntax: Syntax, grammar: str, *triggers: str) -> OutputFormat:
    """A constraint in another language than JSON Schema."""
    return OutputFormat(syntax=syntax, grammar=grammar, triggers=triggers)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"grammar": ""}, None),
        ({"grammar": GBNF}, constraint(Syntax.GBNF, GBNF)),
        ({"grammar": GBNF, "response_format": {"type": "text"}}, constraint(Syntax.GBNF, GBNF)),
        ({"response_format": {"type": "regex", "regex": "a+"}}, constraint(Syntax.REGEX, "a+")),
        ({"response_format": {"type": "regex", "pattern": "a+"}}, constraint(Syntax.REGEX, "a+")),
        ({"response_format": {"type": "grammar", "grammar": GBNF}}, constraint(Syntax.GBNF, GBNF)),
        ({"response_format": {"type": "grammar", "grammar": LARK}}, constraint(Syntax.LARK, LARK)),
        ({"response_format": {"type": "grammar", "grammar": "x", "syntax": "gbnf"}}, constraint(Syntax.GBNF, "x")),
        ({"guided_regex": "a+"}, constraint(Syntax.REGEX, "a+")),
        ({"guided_json": {"a": 1}}, OutputFormat({"a": 1})),
        ({"guided_json": '{"a": 1}'}, OutputFormat({"a": 1})),
        ({"guided_grammar": LARK}, constraint(Syntax.LARK, LARK)),
        ({"guided_choice": ["a.b", "(c|d)"]}, constraint(Syntax.REGEX, r"(?:a\.b|\(c\|d\))")),
        ({"structured_outputs": {}}, None),
        ({"structured_outputs": {"json": {"a": 1}}}, OutputFormat({"a": 1})),
        ({"structured_outputs": {"choice": ["x"]}}, constraint(Syntax.REGEX, "(?:x)")),
        ({"structured_outputs": {"regex": "a+"}}, constraint(Syntax.REGEX, "a+")),
        ({"structured_outputs": {"grammar": GBNF}}, constraint(Syntax.GBNF, GBNF)),
        ({"grammar": GBNF, "grammar_lazy": False, "grammar_triggers": ["x"]}, constraint(Syntax.GBNF, GBNF)),
        (
            {"grammar": GBNF, "grammar_lazy": True, "grammar_triggers": ["<a>", {"type": "word", "value": "<b>"}]},
            constraint(Syntax.GBNF, GBNF, "<a>", "<b>"),
        ),
        (
            {"grammar": GBNF, "grammar_lazy": True, "grammar_triggers": [{"type": 1, "value": "<c>", "token": 7}]},
            constraint(Syntax.GBNF, GBNF, "<c>"),
        ),
        (
            {"json_schema": {"a": 1}, "grammar_lazy": True, "grammar_triggers": ["<a>"]},
            OutputFormat({"a": 1}, triggers=("<a>",)),
        ),
    ],
)
def test_other_languages_become_a_constraint_too(body: dict[str, Any], expected: OutputFormat | None) -> None:
    """llama.cpp's, vLLM's and our own spellings; a lazy grammar waits for its triggers."""
    assert chat(**body).format == completions(**body)[0].format == expected


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"grammar": GBNF, "json_schema": {"a": 1}}, "grammar", "invalid_value"),
        ({"grammar": GBNF, "response_format": {"type": "json_object"}}, "grammar", "invalid_value"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "invalid_value"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs.regex", "invalid_value"),
        ({"grammar": GBNF, "tools": [{"function": {"name": "f"}}]}, "grammar", "invalid_value"),
        ({"grammar": 7}, "grammar", "invalid_type"),
        ({"response_format": {"type": "regex"}}, "response_format.regex", "missing_required_parameter"),
        ({"response_format": {"type": "regex", "regex": ""}}, "response_format.regex", "invalid_value"),
        ({"response_format": {"type": "grammar"}}, "response_format.grammar", "missing_required_parameter"),
        (
            {"response_format": {"type": "grammar", "grammar": "x", "syntax": "ebnf"}},
            "response_format.syntax",
            "invalid_value",
        ),
        ({"guided_json": "{"}, "guided_json", "invalid_json_schema"),
        ({"guided_json": "[]"}, "guided_json", "invalid_json_schema"),
        ({"guided_choice": []}, "guided_choice", "empty_array"),
        ({"guided_choice": [1]}, "guided_choice[0]", "invalid_type"),
        ({"grammar": GBNF, "grammar_lazy": True}, "grammar_triggers", "missing_required_parameter"),
        (
            {"grammar": GBNF, "grammar_lazy": True, "grammar_triggers": [{"type": "pattern", "value": "x"}]},
            "grammar_triggers[0].type",
            "unsupported_value",
        ),
        ({"grammar": GBNF, "grammar_lazy": True, "grammar_triggers": [""]}, "grammar_triggers[0]", "invalid_value"),
        ({"grammar_triggers": ["x"] * 65}, "grammar_triggers", "invalid_value"),
    ],
)
def test_a_wrong_constraint_is_refused_by_name(body: dict[str, Any], param: str, reason: str) -> None:
    """One at a time, and none that leaves no room for a tool call."""
    assert refusal(**body) == (param, reason)


def test_tools_that_may_not_be_called_leave_room_for_a_grammar() -> None:
    """`tool_choice` none takes them away."""
    assert chat(grammar=GBNF, tools=[G], tool_choice="none").format == constraint(Syntax.GBNF, GBNF)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_choices_match_themselves_and_nothing_else(texts: list[str]) -> None:
    """As a regex, whatever characters they hold."""
    output_format = chat(guided_choice=texts).format
    assert output_format is not None
    assert all(re.fullmatch(output_format.grammar, text) for text in texts)
    assert not re.fullmatch(output_format.grammar, "".join(texts) + "x")


@pytest.mark.parametrize(
    ("body", "think"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal"}, "low"),
        ({"reasoning_effort": "medium"}, "medium"),
        ({"reasoning_effort": "xhigh"}, "max"),
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "high"),
        ({"reasoning": {"enabled": True}}, True),
        ({"reasoning": {"enabled": False, "effort": "high"}}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "high"}, "high"),
        ({"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}, True),
    ],
)
def test_effort_becomes_thinking(body: dict[str, Any], think: bool | str | None) -> None:
    """The template's switch wins over `reasoning`, which wins over `reasoning_effort`."""
    assert chat("thinking", **body).think == think
    assert chat(**body).think is None, "a model that does not think is left alone"


def test_template_variables_are_passed_on() -> None:
    """`verbosity` is one of them unless the client set it itself."""
    assert chat(chat_template_kwargs={"a": 1}, verbosity="low").template_kwargs == {"a": 1, "verbosity": "low"}
    assert chat(chat_template_kwargs={"verbosity": 9}, verbosity="low").template_kwargs == {"verbosity": 9}


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), (0, 0.0), (1.5, 1.5), (-1, FOREVER), ("5m", 300.0), ("1h30m", 5400.0), ("0", 0.0), ("-1s", FOREVER),
     ("250ms", 0.25), (10**400, 1e12), (-(10**400), FOREVER)],
)  # fmt: skip
def test_keep_alive_in_ollama_s_forms(value: Any, seconds: float | None) -> None:
    """Numbers are seconds, text is a Go duration, anything negative is for ever."""
    assert parse_keep_alive(value) == seconds


@given(st.one_of(st.text(), st.integers(), st.floats(allow_nan=False), st.booleans(), st.lists(st.none())))
def test_any_keep_alive_is_a_duration_or_a_bad_request(value: Any) -> None:
    """Nothing else is raised, and no duration is negative or NaN."""
    try:
        seconds = parse_keep_alive(value)
    except BadRequest:
        return
    assert seconds is not None
    assert seconds >= 0
    assert not math.isnan(seconds)


# --- messages ---------------------------------------------------------------------------------------------------------


def test_roles_are_mapped_to_the_four_that_templates_know() -> None:
    """`developer` is a system message and a legacy `function` a tool's answer."""
    parsed = messages(
        {"role": "developer", "content": "d"},
        {"role": "system", "content": "s"},
        {"role": "function", "name": "f", "content": "42"},
    )
    assert parsed == (Message("system", "d"), Message("system", "s"), Message("tool", "42", tool_name="f"))


def test_parts_become_one_message_joined_by_line_breaks() -> None:
    """Coding clients send task and surroundings as parts; their tags must not run together."""
    parts = [{"type": "text", "text": "<task>"}, {"type": "input_text", "text": "x", "cache_control": {}}]
    assert messages({"role": "user", "content": parts}) == (Message("user", "<task>\nx"),)
    assert messages({"role": "user", "content": []}) == (Message("user", ""),)


def test_an_assistant_s_turn_keeps_calls_reasoning_and_refusal() -> None:
    """Arguments become an object where they are one; broken text stays, so an old truncated call does no harm."""
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "c2", "function": {"name": "g", "arguments": '{"a": '}},
        {"id": "c3", "function": {"name": "h", "arguments": {"b": 2}}},
        {"id": "c4", "function": {"name": "i", "arguments": ""}},
        {"id": "c5", "function": {"name": "j", "arguments": "[" * 100_000}},
        {"id": "c6", "type": "custom", "custom": {"name": "k", "input": "free"}},
    ]
    (message,) = messages({"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": calls})
    assert (message.content, message.thinking) == ("", "hm")
    assert message.tool_calls == (
        ToolCall("c1", "f", {"a": 1}),
        ToolCall("c2", "g", '{"a": '),
        ToolCall("c3", "h", {"b": 2}),
        ToolCall("c4", "i", {}),
        ToolCall("c5", "j", "[" * 100_000),
        ToolCall("c6", "k", "free"),
    )
    assert messages({"role": "assistant", "refusal": "no"}) == (Message("assistant", "no"),)


def test_a_tool_s_answer_finds_its_function_by_call_id() -> None:
    """The last call with that id wins; an unknown id falls back to `name`, or to nothing."""
    call = {"id": "c", "function": {"name": "old", "arguments": "{}"}}
    later = {"id": "c", "function": {"name": "new", "arguments": "{}"}}
    parsed = messages(
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        {"role": "assistant", "tool_calls": [later]},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "2"}]},
        {"role": "tool", "tool_call_id": "x", "name": "n", "content": "3"},
        {"role": "tool", "tool_call_id": "y", "content": "4"},
    )
    answers = [(message.tool_name, message.content) for message in parsed if message.role == "tool"]
    assert answers == [("old", "1"), ("new", "2"), ("n", "3"), ("", "4")]


@pytest.mark.parametrize(
    ("message", "param", "reason"),
    [
        ({"role": "user"}, "messages[0].content", "invalid_type"),
        ({"role": "assistant", "content": None}, "messages[0].content", "invalid_type"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id", "missing_required_parameter"),
        (
            {"role": "assistant", "tool_calls": [{"id": "c"}]},
            "messages[0].tool_calls[0].function",
            "missing_required_parameter",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "missing_required_parameter"),
        ({"role": "user", "content": [{"type": "smell"}]}, "messages[0].content[0].type", "invalid_value"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0].type", "unsupported_value"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "messages[0].content[0].image_url",
            "missing_required_parameter",
        ),
    ],
)
def test_a_malformed_message_is_refused_by_path(message: dict[str, Any], param: str, reason: str) -> None:
    """What the shape alone cannot tell."""
    assert refusal(messages=[message]) == (param, reason)


@pytest.mark.parametrize(
    "image_url",
    [
        {"url": f"data:image/png;base64,{BASE64}", "detail": "high"},
        f"data:image/png;base64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"DATA:IMAGE/PNG;charset=x;BASE64,{BASE64}",
        BASE64,
        BASE64.replace("+", "%2B").replace("=", "%3D"),
        base64.urlsafe_b64encode(PNG).decode().rstrip("="),
        "\n".join(BASE64[start : start + 76] for start in range(0, len(BASE64), 76)),
    ],
)
def test_images_arrive_as_file_bytes(image_url: Any) -> None:
    """Every way of writing base64 that clients use."""
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": image_url}]
    assert messages({"role": "user", "content": parts}, capabilities=("vision",)) == (
        Message("user", "look", images=(PNG,)),
    )


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/cat.png", "unsupported_value"),
        ("file:///etc/passwd", "unsupported_value"),
        ("data:text/plain;base64,aGk=", "invalid_image"),
        ("data:image/png,plain", "invalid_image"),
        ("aGk=", "invalid_image"),
        ("!!!", "invalid_image"),
        ("", "invalid_image"),
        ("\u00e9", "invalid_image"),
    ],
)
def test_what_is_no_image_is_refused(url: str, reason: str) -> None:
    """Links are not fetched, and bytes must begin like an image."""
    body = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    assert refusal(messages=[body]) == ("messages[0].content[0].image_url.url", reason)


def test_an_image_for_a_model_without_eyes_is_refused() -> None:
    """Never silently dropped."""
    part = {"type": "image_url", "image_url": BASE64}
    with pytest.raises(UnsupportedCapability):
        messages({"role": "user", "content": [part]})


# --- completions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (None, [("", None)]),
        ("a", [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([1, 2], [(None, (1, 2))]),
        ([[1], [2, 3]], [(None, (1,)), (None, (2, 3))]),
        (["a", [1]], [("a", None), (None, (1,))]),
    ],
)
def test_each_prompt_is_a_request(prompt: Any, expected: list[tuple[Any, Any]]) -> None:
    """A flat list of numbers is one prompt; lists of texts or of lists are several."""
    requests = completions(prompt=prompt)
    assert [(request.prompt, request.prompt_tokens) for request in requests] == expected
    assert [request.id for request in requests] == ["req_1", "req_1-1", "req_1-2"][: len(expected)]


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"prompt": []}, "prompt", "empty_array"),
        ({"prompt": [[]]}, "prompt", "empty_array"),
        ({"prompt": ["a", 1]}, "prompt", "unsupported_value"),
        ({"prompt": ["a"] * 65}, "prompt", "array_above_max_length"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": -2, "echo": True}, "max_tokens", "integer_below_min_value"),
        ({"logprobs": -1}, "logprobs", "integer_below_min_value"),
        ({"logprobs": 21}, "logprobs", "integer_above_max_value"),
        ({"n_probs": 21}, "n_probs", "integer_above_max_value"),
        ({"best_of": 0}, "best_of", "integer_below_min_value"),
        ({"best_of": 9}, "best_of", "integer_above_max_value"),
        ({"best_of": 1, "n": 2}, "best_of", "invalid_value"),
        ({"best_of": 2, "stream": True}, "best_of", "invalid_value"),
    ],
)
def test_a_completion_that_cannot_be_honoured_is_refused(body: dict[str, Any], param: str, reason: str) -> None:
    """By name, with OpenAI's code."""
    with pytest.raises(BadRequest) as caught:
        completions(**body)
    assert (caught.value.param, caught.value.reason) == (param, reason)


def test_a_suffix_is_for_models_that_can_fill_in() -> None:
    """Text on both sides of the answer; token ids before it are not offered."""
    (request,) = completions("insert", prompt="a", suffix="b")
    assert (request.prompt, request.suffix) == ("a", "b")
    with pytest.raises(UnsupportedCapability, match="does not support insert"):
        completions(prompt="a", suffix="b")
    with pytest.raises(BadRequest, match="suffix"):
        completions("insert", prompt=[1], suffix="b")


@pytest.mark.parametrize(
    ("body", "logprobs"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 1), ({"logprobs": 0}, 0), ({"logprobs": 20}, 20),
     ({"n_probs": 4}, 4), ({"logprobs": 2, "n_probs": 4}, 2), ({"best_of": 3}, 0), ({"best_of": 3, "n": 3}, None),
     ({"best_of": 3, "logprobs": 2}, 2)],
)  # fmt: skip
def test_a_completion_s_log_probabilities(body: dict[str, Any], logprobs: int | None) -> None:
    """Zero asks for the chosen tokens alone, which the best of several cannot be found without."""
    assert completions(**body)[0].logprobs == logprobs


def test_the_best_are_chosen_among_more() -> None:
    """Each prompt is answered `best_of` times."""
    assert [request.num_choices for request in completions(prompt=["a", "b"], n=2, best_of=5)] == [5, 5]


def test_a_list_of_prompts_waits_for_everybody_else() -> None:
    """Nobody reads along with several; one is like a chat."""
    assert {request.priority for request in completions(prompt=["a", "b"], stream=True)} == {Priority.BATCH}
    assert completions(prompt=["a"], stream=True)[0].priority is Priority.INTERACTIVE


def test_an_echo_may_be_all_that_is_wanted() -> None:
    """No token limit is as low as zero otherwise."""
    (request,) = completions(prompt="a", echo=True, max_tokens=0)
    assert (request.echo, request.sampling.max_tokens) == (True, 0)


def test_a_completion_s_explicit_defaults_are_accepted() -> None:
    """Old clients spell out every default."""
    assert completions(prompt="a", logprobs=None, echo=False, suffix="", best_of=1, n=1) == completions(prompt="a", n=1)
